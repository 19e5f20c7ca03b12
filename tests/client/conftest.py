"""A real gateway with a scripted engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.conftest import RunningGateway, running_gateway, write_folder


@pytest.fixture(scope="package")
def shared_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    folder = write_folder(tmp_path_factory.mktemp("checkpoint") / "small")
    with running_gateway(folder, tmp_path_factory.mktemp("sockets")) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: RunningGateway) -> RunningGateway:
    shared_gateway.engine.script.clear()
    shared_gateway.engine.requests.clear()
    return shared_gateway
