"""`molmo demo` as a process: the address it prints, how it ends, a port that is taken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from molmo_client.__main__ import main

COMMAND = (sys.executable, "-m", "molmo_client", "demo")


def test_serves_the_page_and_ends_in_order(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "MOLMO_SERVER": "http://127.0.0.1:9"}
    demo = subprocess.Popen(
        [*COMMAND, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=environment
    )
    with demo:
        try:
            assert demo.stdout is not None
            line = demo.stdout.readline()
            assert f"http://127.0.0.1:{port}/" in line
            assert "asks http://127.0.0.1:9" in line
            assert httpx2.get(f"http://127.0.0.1:{port}/").status_code == 200
            demo.send_signal(signal.SIGTERM)
            assert demo.wait(timeout=300) == 0
        finally:
            demo.kill()
    # Gradio makes empty folders when it is imported; uploads and drawings were elsewhere.
    left = [path for path in tmp_path.rglob("*") if path.is_file() or "molmo" in path.name]
    assert left == []


def test_a_taken_port_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"molmo: cannot listen on port {port}")
    assert told.count("\n") == 1
