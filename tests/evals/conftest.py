"""A real gateway in front of an engine that knows the truth about eval samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evals.oracle import Oracle
from tests.support.gateway import RunningGateway, running_gateway


@pytest.fixture(scope="package")
def shared_gateway(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(folder, tmp_path_factory.mktemp("sockets"), Oracle()) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: RunningGateway) -> RunningGateway:
    """Its engine knows nothing yet and has been asked nothing."""
    oracle_of(shared_gateway).answers.clear()
    oracle_of(shared_gateway).forgets_after = None
    shared_gateway.engine.requests.clear()
    return shared_gateway


def oracle_of(gateway: RunningGateway) -> Oracle:
    assert isinstance(gateway.engine, Oracle)
    return gateway.engine
