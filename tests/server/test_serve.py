"""`molmo serve` as a person runs it: a process, its words, its exit codes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from molmo_client.__main__ import main
from molmo_server.engine_pool.fake import DEFAULT_ANSWER
from molmo_server.tenancy.store import KeyStore, prefix_of
from tests.server.media import data_url, picture
from tests.server.processes import child_pid, engine_pid, is_alive
from tests.support.gateway import until

_WITH_FAKE_ENGINE = """
import sys
from pathlib import Path
import molmo_server.engines as engines
from tests.server.processes import fake_command
folder = Path(sys.argv.pop(1))
def command(settings):
    options = ("--child-pid-file", str(folder / "child"), "--fail-if", str(folder / "fail"))
    return fake_command(settings.socket, *options), {}
engines.engine_command = command
from molmo_client.__main__ import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@contextmanager
def started(command: list[str], **settings: str) -> Iterator[subprocess.Popen[str]]:
    """A server as a process; killed at the end if it still runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOLMO_")}
    server = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment
        | {"MOLMO_MAX_FAILED_STARTS": "1", "MOLMO_FIRST_BACKOFF_S": "0.1"}
        | settings,
    )
    with server:
        try:
            yield server
        finally:
            if server.poll() is None:
                server.kill()


def serve_fake(folder: Path, tmp_path: Path, *options: str) -> list[str]:
    """`molmo serve` with the scripted engine in the place of vLLM."""
    command = [sys.executable, "-c", _WITH_FAKE_ENGINE, str(tmp_path)]
    return [*command, "--checkpoint", str(folder), "--port", "0", *options]


def address_of(server: subprocess.Popen[str]) -> tuple[str, str]:
    """(address, command to try) as printed when the engine is ready."""
    assert server.stdout is not None
    first, second = server.stdout.readline(), server.stdout.readline()
    found = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+)/docs or ask for points:\n", first)
    assert found, first
    return found[1], second


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_says_where_it_is_answers_and_ends_in_order(
    folder: Path, tmp_path: Path, number: int
) -> None:
    with started(serve_fake(folder, tmp_path)) as server:
        address, command = address_of(server)
        assert f'shapes.png "the red circle" --server {address}' in command
        first, child = engine_pid(tmp_path), child_pid(tmp_path)
        body = {"image_url": data_url(picture()), "object": "the red circle"}
        answer = httpx2.post(f"{address}/v1/point", json=body, timeout=60).json()
        assert answer["points"][0]["label"] == "red circle"

        server.send_signal(number)
        _, words = server.communicate(timeout=60)

    assert server.returncode == 0
    assert "the engine is starting, its log is in" in words
    assert "molmo: ready after" in words
    assert "molmo: ending; requests in flight may finish" in words
    assert "Traceback" not in words
    until(lambda: not any(map(is_alive, (first, child))))


def test_a_request_in_flight_is_finished_before_the_end(folder: Path, tmp_path: Path) -> None:
    with started(serve_fake(folder, tmp_path)) as server:
        address, _ = address_of(server)
        body = {"messages": [{"role": "user", "content": "[slow] Hi"}], "stream": True}
        url = f"{address}/v1/chat/completions"
        with httpx2.stream("POST", url, json=body, timeout=60) as response:
            chunks = response.iter_bytes()
            next(chunks)
            server.send_signal(signal.SIGTERM)
            rest = b"".join(chunks)

        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"grounding"' in rest
        server.communicate(timeout=60)
    assert server.returncode == 0


def test_a_server_that_ends_says_so_first(folder: Path, tmp_path: Path) -> None:
    with started(serve_fake(folder, tmp_path), MOLMO_LEAVE_NOTICE_S="3") as server:
        address, _ = address_of(server)
        assert httpx2.get(f"{address}/ready").status_code == 200
        server.send_signal(signal.SIGTERM)

        until(lambda: httpx2.get(f"{address}/ready").status_code == 503, limit_s=2)
        refused = httpx2.get(f"{address}/ready")
        assert "this server is ending" in refused.json()["error"]["message"]
        body = {"messages": [{"role": "user", "content": "Hi"}]}
        assert httpx2.post(f"{address}/v1/chat/completions", json=body).status_code == 200
        server.communicate(timeout=60)
    assert server.returncode == 0


def test_what_does_not_end_in_time_is_cut(folder: Path, tmp_path: Path) -> None:
    with started(serve_fake(folder, tmp_path), MOLMO_DRAIN_S="1") as server:
        address, _ = address_of(server)
        body = {"messages": [{"role": "user", "content": "[hang]"}]}
        url = f"{address}/v1/chat/completions"
        with ThreadPoolExecutor(1) as threads:
            asking = threads.submit(httpx2.post, url, json=body, timeout=60)
            running = 'molmo_engine_in_flight{engine="engine-0"} 1.0'
            until(lambda: running in httpx2.get(f"{address}/metrics").text)
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            _, words = server.communicate(timeout=60)
            assert time.monotonic() - began < 10
            refused = asking.result()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "engine_unavailable"
    assert "Traceback" not in words
    assert server.returncode == 0


def test_keys_are_counted_to_the_end_and_never_logged(folder: Path, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.db")
    key = store.create("acme")
    with started(serve_fake(folder, tmp_path), MOLMO_KEYS=str(tmp_path / "keys.db")) as server:
        address, _ = address_of(server)
        body = {"messages": [{"role": "user", "content": "[slow] Hi"}], "stream": True}
        url, headers = f"{address}/v1/chat/completions", {"authorization": f"Bearer {key}"}
        assert httpx2.post(url, json=body, timeout=60).status_code == 401
        with httpx2.stream("POST", url, json=body, headers=headers, timeout=60) as response:
            chunks = response.iter_bytes()
            next(chunks)
            server.send_signal(signal.SIGTERM)
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
        _, words = server.communicate(timeout=60)

    [used] = store.usage(n_days=1, now_s=time.time())
    store.close()
    assert (used.name, used.requests) == ("acme", 1)
    assert used.completion_tokens == -(-len(DEFAULT_ANSWER) // 4)
    assert f'"tenant": "acme", "key_prefix": "{prefix_of(key)}"' in words
    assert key not in words


def test_a_killed_server_leaves_no_engine_behind(folder: Path, tmp_path: Path) -> None:
    with started(serve_fake(folder, tmp_path)) as server:
        address_of(server)
        first, child = engine_pid(tmp_path), child_pid(tmp_path)
        server.kill()

    until(lambda: not any(map(is_alive, (first, child))))


def test_an_engine_that_cannot_start_ends_the_server(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    with started(serve_fake(folder, tmp_path)) as server:
        out, words = server.communicate(timeout=60)

    assert (server.returncode, out) == (1, "")
    assert "the engine could not be started: the engine process ended; given up after 1" in words
    assert "told to fail while starting" in words


def run_here(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of what ends before anything is started."""
    code = main(["serve", *options])
    written = capsys.readouterr()
    return code, written.out, written.err


def test_a_taken_port_is_said_before_the_engine_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        options = ["--checkpoint", str(folder), "--port", port, "--run-dir", str(tmp_path / "run")]
        code, out, words = run_here(capsys, *options)

    assert (code, out) == (3, "")
    assert words == (
        f"molmo serve: port {port} on 127.0.0.1 is taken by another program; end that one, or "
        f"choose another: molmo serve --port {int(port) + 1}\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--checkpoint", "nowhere"], "config.json of checkpoint 'nowhere' cannot be read"),
        (["--port", "70000"], "settings: port: Input should be less than or equal to 65535"),
        (["--host", "999.0.0.1", "--port", "0"], "cannot listen on 999.0.0.1"),
    ],
)
def test_unusable_settings(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    given = options if "--checkpoint" in options else [*options, "--checkpoint", str(folder)]

    code, out, words = run_here(capsys, *given)

    assert (code, out) == (2, "")
    assert words.startswith(f"molmo serve: {says}")


def test_help_explains_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_here(capsys, "--help")

    assert code == 0
    for option in ("--host", "--port", "--checkpoint", "--engine-url", "--run-dir"):
        assert option in out
    assert "Serve a checkpoint" in out
