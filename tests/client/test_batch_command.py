"""`molmo batch` and `Client.batches`, at a gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from molmo_client import AsyncClient, Client, RetryPolicy, ServerUnreachable, WrongUsage
from molmo_client.__main__ import main
from molmo_core import errors
from molmo_server.engine_pool.fake import Trick
from tests.server.batches import CHAT, jsonl, line
from tests.support.gateway import RunningGateway

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(gateway: RunningGateway, capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """(exit code, output, errors) of `molmo batch`."""

    def run(*tokens: object) -> tuple[int, str, str]:
        code = main(["batch", *map(str, tokens), "--server", gateway.url])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(jsonl([line("a"), line("b", f"{Trick.REFUSE} x"), line("c")]))
    return path


def test_from_a_file_to_its_answers(run: Run, requests: Path, tmp_path: Path) -> None:
    code, out, err = run("submit", requests, "--endpoint", CHAT, "--wait")
    batch_id = out.strip()
    assert code == 0
    assert err.endswith("molmo: completed: 3 of 3 answered, 1 without success\n")

    assert run("status", batch_id)[:2] == (0, "completed: 3 of 3 answered, 1 without success\n")
    code, out, _ = run("status", batch_id, "--json", "--wait")
    assert (code, json.loads(out)["id"]) == (0, batch_id)
    assert run("list", "--limit", 1)[1].startswith(f"{batch_id}  completed")

    code, out, err = run("results", batch_id)
    assert [json.loads(one)["custom_id"] for one in out.splitlines()] == ["a", "c"]
    assert (code, err) == (
        0,
        "molmo: 1 lines have no good answer: name a file for them with --errors\n",
    )
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    assert run("results", batch_id, "--output", good, "--errors", bad)[:2] == (0, "")
    assert good.read_text() == out
    assert json.loads(bad.read_text())["custom_id"] == "b"
    code, _, err = run("cancel", batch_id)
    assert (code, "only one that has not ended" in err) == (1, True)


def test_a_bad_line_is_named(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(jsonl([line("a"), line("a")]))
    code, _, err = run("submit", path, "--endpoint", CHAT, "--wait")
    assert code == 1
    assert "the batch has failed (line 2: the custom_id 'a' is there before" in err


def test_usage(run: Run, tmp_path: Path) -> None:
    for tokens, code, says in (
        (("submit", tmp_path / "none", "--endpoint", CHAT), 2, "there is no file"),
        (("submit", __file__, "--endpoint", "/v1/none"), 1, "/v1/point"),
        (("status", "batch_none"), 1, "there is no batch"),
        (("results", "batch_none"), 1, "there is no batch"),
    ):
        got, _, err = run(*tokens)
        assert (got, says in err) == (code, True), err


def test_from_python(gateway: RunningGateway, requests: Path) -> None:
    changes: list[str] = []
    with Client(gateway.url) as client:
        file = client.batches.upload(requests)
        batch = client.batches.submit(file, CHAT, window="48h")
        batch = client.batches.wait(batch.id, on_change=lambda told: changes.append(told.status))
        found = list(client.batches.results(batch))
        assert changes[-1] == "completed"
        assert client.batches.latest(1) == [batch]
        assert [one.custom_id for one in found] == ["a", "c", "b"]
        with pytest.raises(errors.NotFound):
            list(client.batches.results(batch.model_copy(update={"output_file_id": "file-none"})))
        with pytest.raises(WrongUsage):
            client.batches.upload(requests / "none")


async def test_awaited_from_python(gateway: RunningGateway, requests: Path, tmp_path: Path) -> None:
    changes: list[str] = []
    async with AsyncClient(gateway.url) as client:
        batches = client.batches
        batch = await batches.submit(requests, CHAT, window="48h")
        batch = await batches.wait(batch.id, on_change=lambda told: changes.append(told.status))
        assert (await batches.get(batch.id), await batches.latest(1)) == (batch, [batch])
        assert changes[-1] == "completed"
        assert [one.custom_id async for one in batches.results(batch)] == ["a", "c", "b"]
        with (tmp_path / "whole.jsonl").open("w+b") as to:
            await batches.download(batch.input_file_id, to)
            to.seek(0)
            assert to.read() == requests.read_bytes()
        with pytest.raises(errors.InvalidRequest, match="only one that has not ended"):
            await batches.cancel(batch.id)
        with pytest.raises(errors.NotFound):
            await batches.download("file-none", to)
        with pytest.raises(WrongUsage):
            await batches.upload(requests / "none")
    async with AsyncClient("http://127.0.0.1:9", retries=RetryPolicy(n_retries=0)) as client:
        with pytest.raises(ServerUnreachable):
            [one async for one in client.batches.results(batch)]
