"""Figures of slow checks, where whoever runs them sees them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def show(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Write each argument as a line, past pytest's capturing."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def write(*lines: object) -> None:
        with capture.global_and_fixture_disabled():
            sys.stdout.write("\n".join(("", *map(str, lines), "")))
            sys.stdout.flush()

    return write
