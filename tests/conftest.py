"""A real gateway on a real socket in front of a scripted engine, for all that ask one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.gateway import RunningGateway, running_gateway, write_folder

# A loaded machine is slow now and then; how fast things are is measured by `make bench`.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="session")
def shared_gateway(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(folder, tmp_path_factory.mktemp("sockets")) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: RunningGateway) -> RunningGateway:
    """One gateway for all tests of a session, with a clean script."""
    shared_gateway.engine.script.clear()
    shared_gateway.engine.requests.clear()
    return shared_gateway
