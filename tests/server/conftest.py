"""Gateways of other settings (narrow limits, uploads in sight), a store, and an internet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from molmo_core.checkpoints import FolderStore
from tests.server.exchange import Stored
from tests.server.internet import Internet, internet
from tests.support.fake_completions import FakeWithCompletions
from tests.support.gateway import RunningGateway, running_gateway


@pytest.fixture(scope="session")
def shared_small_gateway(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    limits: dict[str, Any] = {
        "max_body_bytes": 1_000_000,
        "max_image_bytes": 200_000,
        "max_video_duration_s": 1,
        "body_timeout_s": 0.5,
    }
    with running_gateway(folder, tmp_path_factory.mktemp("sockets"), **limits) as gateway:
        yield gateway


@pytest.fixture
def small_gateway(shared_small_gateway: RunningGateway) -> RunningGateway:
    """One with narrow limits."""
    shared_small_gateway.engine.requests.clear()
    return shared_small_gateway


@pytest.fixture(scope="session")
def shared_openai_gateway(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    sockets = tmp_path_factory.mktemp("sockets")
    with running_gateway(folder, sockets, FakeWithCompletions()) as gateway:
        yield gateway


@pytest.fixture
def openai_gateway(shared_openai_gateway: RunningGateway) -> RunningGateway:
    """One whose engine has completions as well."""
    engine = shared_openai_gateway.engine
    engine.script.clear()
    engine.requests.clear()
    engine.n_dropped = 0
    return shared_openai_gateway


@pytest.fixture
def client(openai_gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    """OpenAI's own, without retries."""
    url = f"{openai_gateway.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    """A store whose current checkpoint is `first`."""
    found = Stored(store=FolderStore(tmp_path / "store"), first="")
    found.first = found.publish("first")
    return found


@pytest.fixture(scope="session")
def media_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parent") / "media"


@pytest.fixture(scope="session")
def shared_keeping_gateway(
    folder: Path, media_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    sockets = tmp_path_factory.mktemp("sockets")
    with running_gateway(folder, sockets, media_dir=media_dir) as gateway:
        yield gateway


@pytest.fixture
def keeping(shared_keeping_gateway: RunningGateway, media_dir: Path) -> RunningGateway:
    """One that keeps uploads where the test can see them; nothing is uploaded yet."""
    for path in media_dir.iterdir():
        shared_keeping_gateway.http.delete(f"/v1/media/{path.name}")
    assert list(media_dir.iterdir()) == []
    shared_keeping_gateway.engine.requests.clear()
    return shared_keeping_gateway


@pytest.fixture
async def world() -> AsyncIterator[Internet]:
    async with internet() as world:
        yield world
