"""`/v1/files`: what is kept, for whom, how much, how long, and what a full disk says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from molmo_core.api_batches import BatchRequest
from molmo_core.errors import BatchStoreError, InvalidRequest, NotFound
from molmo_server.batches.files import FileStore
from molmo_server.batches.folder import BatchFolder
from molmo_server.batches.jobs import JobStore, Result
from molmo_server.batches.lines import Reading
from molmo_server.batches.results import end_batch
from molmo_server.tenancy.callers import Errand
from tests.server.batches import CHAT, create, ended, jsonl, line, upload
from tests.support.gateway import RunningGateway, error_of, running_gateway

DAY_S = 24 * 3600


@pytest.fixture(scope="module")
def narrow(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A file may be larger than other bodies here."""
    limits: dict[str, Any] = {
        "max_body_bytes": 100_000,
        "max_file_bytes": 300_000,
        "files_quota_bytes": 500_000,
        "body_timeout_s": 5,
        "batch_dir": tmp_path_factory.mktemp("batches"),
        "max_batches": 2,
    }
    with running_gateway(folder, tmp_path_factory.mktemp("sockets"), **limits) as gateway:
        yield gateway


@pytest.fixture
def empty(narrow: RunningGateway) -> RunningGateway:
    for file in narrow.http.get("/v1/files").json()["data"]:
        narrow.http.delete(f"/v1/files/{file['id']}")
    return narrow


def test_a_file(gateway: RunningGateway) -> None:
    content = jsonl([line("a")])
    response = gateway.http.post(
        "/v1/files", files={"file": ("my requests.jsonl", content)}, data={"purpose": "batch"}
    )
    told = response.json()
    assert told == {
        "id": told["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": told["created_at"],
        "expires_at": told["created_at"] + 30 * DAY_S,
        "filename": "my requests.jsonl",
        "purpose": "batch",
        "status": "processed",
    }
    path = f"/v1/files/{told['id']}"
    assert gateway.http.get(path).json() == told
    got = gateway.http.get(f"{path}/content")
    assert got.content == content
    assert got.headers["content-disposition"] == f'attachment; filename="{told["id"]}.jsonl"'
    assert (
        gateway.http.get(f"{path}/content", headers={"range": "bytes=1-3"}).content
        == (content[1:4])
    )
    deleted = gateway.http.delete(path).json()
    assert deleted == {"id": told["id"], "object": "file", "deleted": True}
    for method, where in (("GET", path), ("GET", f"{path}/content"), ("DELETE", path)):
        assert gateway.http.request(method, where).status_code == 404


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"../../etc/passwd", "../../etc/passwd"),
        (b"/dev/null", "/dev/null"),
        (b"a\xff\xfeb", "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"),
        (b"tab\there", "tab\N{REPLACEMENT CHARACTER}here"),
        ("\u202eexe.jsonl".encode(), "\N{REPLACEMENT CHARACTER}exe.jsonl"),
        (b"x" * 1000, "x" * 255),
        (b"", "file"),
        (b"file-000000000000000000000000", "file-000000000000000000000000"),
    ],
)
def test_hostile_names(gateway: RunningGateway, given: bytes, kept: str) -> None:
    body = (
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="' + given + b'"\r\n\r\n'
        b"{}\r\n--b--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    told = gateway.http.post("/v1/files", content=body, headers=headers).json()
    assert (told["filename"], told["bytes"]) == (kept, 2)
    assert gateway.http.get(f"/v1/files/{told['id']}/content").content == b"{}"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename else ""
    head = f'--b\r\ncontent-disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


FILE, PURPOSE, END = part("file", b"{}", "a.jsonl"), part("purpose", b"batch"), b"--b--\r\n"
BAD_FORMS: dict[str, tuple[bytes, str]] = {
    "no file": (PURPOSE + END, "the form has no file"),
    "two files": (FILE + FILE + PURPOSE + END, "several files"),
    "no purpose": (FILE + END, "purpose"),
    "other purpose": (FILE + part("purpose", b"vision") + END, "send 'batch'"),
    "two purposes": (FILE + PURPOSE + PURPOSE + END, "twice"),
    "text as file": (part("file", b"{}") + PURPOSE + END, "got text in the field 'file'"),
    "file elsewhere": (part("image", b"{}", "a") + PURPOSE + END, "in the field 'image'"),
    "unknown field": (FILE + PURPOSE + part("model", b"x") + END, "'model'"),
    "many fields": (b"".join(part(f"f{k}", b"") for k in range(9)) + END, "more than 8"),
    "long field": (FILE + part("purpose", b"x" * 2000) + END, "1024 bytes"),
    "cut": (FILE + PURPOSE, "cut short"),
    "empty": (b"", "cut short"),
    "no form": (b"{}", "cannot be read"),
    "bad time": (
        FILE + PURPOSE + part("expires_after[seconds]", b"3600") + END,
        "expires_after.anchor",
    ),
}


@pytest.mark.parametrize("case", BAD_FORMS)
def test_bad_forms(empty: RunningGateway, case: str) -> None:
    body, says = BAD_FORMS[case]
    headers = {"content-type": "multipart/form-data; boundary=b"}
    response = empty.http.post("/v1/files", content=body, headers=headers)
    assert response.status_code == 400
    assert says in error_of(response)["message"]
    assert empty.http.get("/v1/files").json()["data"] == []


def test_bodies_that_are_no_forms(gateway: RunningGateway) -> None:
    for kind, status in (("application/json", 415), ("multipart/form-data", 400), ("", 415)):
        response = gateway.http.post("/v1/files", content=b"{}", headers={"content-type": kind})
        assert response.status_code == status


def test_limits(empty: RunningGateway) -> None:
    large = b"x" * 300_000
    fields: dict[str, Any] = {"data": {"purpose": "batch"}}
    too_large = empty.http.post("/v1/files", files={"file": ("a", large + b"x")}, **fields)
    stored = upload(empty, large)
    assert empty.http.get(f"/v1/files/{stored}/content").content == large

    over_quota = empty.http.post("/v1/files", files={"file": ("a", b"x" * 250_000)}, **fields)
    huge = empty.http.post("/v1/files", files={"file": ("a", b"x" * 900_000)}, **fields)

    assert "300,000 bytes" in error_of(too_large)["message"]
    assert [r.status_code for r in (too_large, over_quota, huge)] == [413, 413, 413]
    assert "200,000 bytes" in error_of(over_quota)["message"]
    upload(empty, b"x" * 200_000)
    full = empty.http.post("/v1/files", files={"file": ("a", b"x")}, **fields)
    assert (full.status_code, "500,000 bytes" in full.text) == (400, True)
    other = empty.http.post("/v1/point", json={"object": "x" * 200_000})
    assert (other.status_code, "100,000 bytes" in other.text) == (413, True)
    empty.http.delete(f"/v1/files/{stored}")
    upload(empty, b"x")


def test_a_refused_upload_leaves_its_connection_in_order(empty: RunningGateway) -> None:
    for size in (900_000, 301_000) * 10:
        form: dict[str, Any] = {"files": {"file": ("a", b"x" * size)}, "data": {"purpose": "batch"}}
        assert empty.http.post("/v1/files", **form).status_code == 413
        assert empty.http.get("/v1/files").json()["data"] == []


def test_pages(empty: RunningGateway) -> None:
    made = [upload(empty, b"{}") for _ in range(5)][::-1]
    first = empty.http.get("/v1/files?limit=3").json()
    assert [one["id"] for one in first["data"]] == made[:3]
    assert (first["first_id"], first["last_id"], first["has_more"]) == (made[0], made[2], True)
    rest = empty.http.get(f"/v1/files?after={first['last_id']}").json()
    assert ([one["id"] for one in rest["data"]], rest["has_more"]) == (made[3:], False)
    upwards = empty.http.get(f"/v1/files?order=asc&after={made[3]}").json()
    assert [one["id"] for one in upwards["data"]] == made[2::-1]
    assert empty.http.get("/v1/files?purpose=batch_output").json()["data"] == []
    for query, status in (("after=file-none", 404), ("limit=0", 400), ("order=up", 400)):
        assert empty.http.get(f"/v1/files?{query}").status_code == status


def test_too_many_batches(empty: RunningGateway) -> None:
    empty.engine.seconds_per_piece = 0.02
    try:
        made = [create(empty, jsonl([line("a")])) for _ in range(2)]
        file_id = upload(empty, jsonl([line("a")]))
        more = {"input_file_id": file_id, "endpoint": CHAT}
        refused = empty.http.post("/v1/batches", json=more)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        for batch_id in made:
            ended(empty, batch_id)
        taken = empty.http.post("/v1/batches", json=more).json()
        ended(empty, taken["id"])
    finally:
        empty.engine.seconds_per_piece = 0


# --- the store ----------------------------------------------------------------------------------


class Clock:
    now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Store:
    def __init__(self, path: Path) -> None:
        self.clock = Clock()
        self.folder = BatchFolder(path)
        self.files = FileStore(self.folder, quota_bytes=10**9, ttl_s=10 * DAY_S, now_s=self.clock)
        self.jobs = JobStore(self.folder, max_unfinished=10, ttl_s=10 * DAY_S, now_s=self.clock)

    def put(self, content: bytes, **fields: Any) -> str:
        with self.folder.part() as part:
            part.write(content)
            return self.files.add(part, tenant="us", filename="a", **fields).id

    def start(self, file_id: str) -> str:
        request = BatchRequest(input_file_id=file_id, endpoint=CHAT)
        return self.jobs.create(Errand(tenant="us", key_prefix=""), request).id


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "batches")
    yield opened
    opened.folder.close()


def reading(**fields: Any) -> Reading:
    return Reading(**{"endpoint": CHAT, "max_line_bytes": 10**6, "max_lines": 50_000, **fields})


def test_what_is_over_its_time_goes(store: Store, tmp_path: Path) -> None:
    short, long = store.put(b"{}", ttl_s=3600), store.put(b"{}")
    in_use = store.put(b"{}", ttl_s=3600)
    batch_id = store.start(in_use)
    store.clock.now_s += 3600
    for file_id in (short, in_use):
        with pytest.raises(NotFound):
            store.files.get("us", file_id)
    store.files.sweep()
    assert {path.name for path in (tmp_path / "batches").glob("file-*")} == {long, in_use}
    store.jobs.checked(batch_id, 0, [])
    job = store.jobs.job(batch_id)
    store.jobs.finalize(batch_id)
    end_batch(store.folder, store.files, store.jobs, job, "completed", reading())
    store.files.sweep()
    assert {path.name for path in (tmp_path / "batches").glob("file-*")} == {long}
    store.jobs.sweep()
    assert store.jobs.get("us", batch_id).status == "completed"
    store.clock.now_s += 10 * DAY_S
    store.jobs.sweep()
    with pytest.raises(NotFound):
        store.jobs.get("us", batch_id)


def test_one_server_a_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(BatchStoreError, match="another server uses it"):
        BatchFolder(tmp_path / "batches")


def test_a_folder_of_another_version(tmp_path: Path) -> None:
    opened = BatchFolder(tmp_path / "batches")
    with opened.using(writes=True) as db:
        db.execute("PRAGMA user_version = 9")
    opened.close()
    for _ in range(2):  # the lock is given back
        with pytest.raises(BatchStoreError, match="format 9"):
            BatchFolder(tmp_path / "batches")


def test_what_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BatchStoreError, match="MOLMO_BATCH_DIR"):
        BatchFolder(tmp_path / "file")


def test_leftovers_of_a_crash_go(store: Store, tmp_path: Path) -> None:
    kept = store.put(b"{}")
    store.folder.close()
    path = tmp_path / "batches"
    (path / "file-aaaaaaaaaaaaaaaaaaaaaaaa").write_text("no row")
    (path / ".part-1").write_text("half")
    (path / "other").write_text("not ours")
    again = BatchFolder(path)
    names = {one.name for one in path.iterdir() if not one.name.startswith("batches.db")}
    assert names == {kept, "lock", "other"}
    again.close()


def test_an_answer_is_kept_once(store: Store) -> None:
    batch_id = store.start(store.put(b"{}"))
    store.jobs.checked(batch_id, 2, [])
    first, second = (Result(line=1, is_good=True, text=text) for text in (b"1\n", b"2\n"))
    assert store.jobs.keep(batch_id, first)
    assert not store.jobs.keep(batch_id, second)
    assert list(store.jobs.results(batch_id)) == [first]
    store.jobs.cancel("us", batch_id)
    job = store.jobs.job(batch_id)
    end_batch(store.folder, store.files, store.jobs, job, "cancelled", reading())
    assert not store.jobs.keep(batch_id, Result(line=2, is_good=True, text=b"late\n"))
    assert list(store.jobs.results(batch_id)) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is written to a file does not find room, as on a disk that is full."""

    def without_room(path: str, flags: int) -> int:
        return os.open("/dev/full", os.O_WRONLY)

    monkeypatch.setattr("molmo_server.batches.folder._private", without_room)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_under_an_upload(empty: RunningGateway) -> None:
    for size in (2, 250_000):
        response = empty.http.post(
            "/v1/files", files={"file": ("a", b"x" * size)}, data={"purpose": "batch"}
        )
        error = error_of(response)
        assert (response.status_code, error["code"]) == (503, "batch_store_error")
        assert "the disk is full" in error["message"]
    assert empty.http.get("/v1/files").json()["data"] == []


def test_a_full_disk_under_the_answers(
    store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = store.start(store.put(jsonl([line("a")])))
    store.jobs.checked(batch_id, 1, [])
    store.jobs.keep(batch_id, Result(line=1, is_good=True, text=b"{}\n"))
    store.jobs.finalize(batch_id)
    job = store.jobs.job(batch_id)

    request.getfixturevalue("full_disk")
    with pytest.raises(BatchStoreError, match="the disk is full"):
        end_batch(store.folder, store.files, store.jobs, job, "completed", reading())
    monkeypatch.undo()

    end_batch(store.folder, store.files, store.jobs, job, "completed", reading())
    batch = store.jobs.get("us", batch_id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 1)


def test_a_full_disk_under_the_database(store: Store) -> None:
    file_id = store.put(b"{}")
    batch_id = store.start(file_id)
    store.jobs.checked(batch_id, 2, [])
    store.jobs.keep(batch_id, Result(line=1, is_good=True, text=b"1\n"))
    with store.folder.using() as db:
        [n_pages] = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {n_pages}")
    large = Result(line=2, is_good=True, text=b"x" * 100_000)
    with pytest.raises(BatchStoreError, match=r"full.*nothing that was kept is lost"):
        store.jobs.keep(batch_id, large)
    assert store.jobs.answered(batch_id) == {1}
    with store.folder.using() as db:
        db.execute(f"PRAGMA max_page_count = {n_pages + 1000}")
    assert store.jobs.keep(batch_id, large)
    assert store.jobs.answered(batch_id) == {1, 2}


def memory_bytes(what: str) -> int:
    """Of this process: VmRSS, what it has; VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(one for one in lines if one.startswith(what)).split()[1]) * 1024


def test_many_lines_take_little_memory(store: Store, tmp_path: Path) -> None:
    n_lines = 50_000
    with store.folder.part() as part:
        [before, after] = jsonl([line("line-#", "x" * 1000)]).split(b"#")
        for k in range(n_lines):
            part.write(b"%s%d%s" % (before, k, after))
        file_id = store.files.add(part, tenant="us", filename="a").id
    path = store.files.path("us", file_id)
    batch_id = store.start(file_id)
    with store.folder.using(writes=True) as db:
        store_all = ((batch_id, k + 1, True, b"x" * 1000 + b"\n") for k in range(n_lines))
        db.executemany("INSERT INTO results VALUES (?, ?, ?, ?)", store_all)

    before_bytes = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    assert reading().check(path) == (n_lines, [])
    store.jobs.checked(batch_id, n_lines, [])
    assert len(store.jobs.answered(batch_id)) == n_lines
    store.jobs.finalize(batch_id)
    job = store.jobs.job(batch_id)
    end_batch(store.folder, store.files, store.jobs, job, "completed", reading())
    peak_bytes = memory_bytes("VmHWM") - before_bytes
    assert store.jobs.get("us", batch_id).request_counts.completed == n_lines
    assert peak_bytes < 25_000_000 < 50_000_000 < path.stat().st_size
    assert reading(max_lines=10).check(path)[1][0].code == "too_many_lines"


def test_the_quota_holds_for_uploads_side_by_side(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "batches")
    files = FileStore(folder, quota_bytes=100, ttl_s=3600)
    with folder.part() as one, folder.part() as other:
        for part in (one, other):
            assert files.check_room("us") == 100
            part.write(b"x" * 60)
        files.add(one, tenant="us", filename="a")
        with pytest.raises(InvalidRequest, match="delete files"):
            files.add(other, tenant="us", filename="b")
    assert files.check_room("us") == 40
    assert files.check_room("them") == 100
    assert len(list((tmp_path / "batches").glob("file-*"))) == 1
    folder.close()
