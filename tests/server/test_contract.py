"""The OpenAPI document is true: every operation answers as it says, whatever it is sent."""

from __future__ import annotations

from pathlib import Path

from tests.support.contract import contract


def test_every_operation_answers_as_the_document_says(folder: Path, tmp_path: Path) -> None:
    with contract(folder, tmp_path) as asked:
        asked.ask(n_examples=8)

        assert not asked.complaints, "\n\n".join(asked.complaints)
        assert {operation for operation, _ in asked.answers} == asked.operations
        for operation in ("chat/completions", "completions", "point", "query", "media"):
            assert asked.answers[f"POST /v1/{operation}", 200] > 0, operation
