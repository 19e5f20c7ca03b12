"""The documents stay true: every path that they name exists, every make target too.

Run: python -m pytest tests/repo
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    *(f"{root}/README.md" for root in ("clients", "server", "training", "evals", "demo")),
]
_PATH = re.compile(
    r"`((?:clients|server|training|evals|demo|deploy|tests|docs|requirements)/[\w./*-]*)`"
)
_TARGET = re.compile(r"\bmake ([a-z][a-z-]*)\b")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    named = _PATH.findall((ROOT / name).read_text())
    assert named, f"{name} names no path: the map is missing"
    assert [path for path in named if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = re.findall(r"`[^`]+`|```.*?```", (ROOT / name).read_text(), re.DOTALL)
    asked = {target for block in blocks for target in _TARGET.findall(block)}
    assert asked - targets == set()


def test_changelog_has_an_unreleased_part() -> None:
    assert "## Unreleased" in (ROOT / "CHANGELOG.md").read_text()


def test_no_machine_path_or_registry_is_named() -> None:
    roots = "|".join(("work", "root"))
    private = re.compile(rf"(?<![\w.~-])/(?:{roots})/|/{'simple'}/")
    hits = []
    for path in ROOT.rglob("*"):
        top = path.relative_to(ROOT).parts[0]
        if (top.startswith(".") and top != ".ci") or top == "runs" or not path.is_file():
            continue
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".jinja", ".sh", ""}:
            text = path.read_text(errors="ignore")
            hits += [str(path.relative_to(ROOT))] if private.search(text) else []
    assert hits == []
