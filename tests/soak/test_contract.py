"""At least 1,000 examples of every operation of the OpenAPI document; prints what was answered."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.contract import contract

N_EXAMPLES = 1000


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_examples_of_every_operation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contract(folder, tmp_path) as asked:
        asked.ask(n_examples=N_EXAMPLES)

    by_operation: dict[str, Counter[int]] = {}
    for (operation, status), n in asked.answers.items():
        by_operation.setdefault(operation, Counter())[status] += n
    with capsys.disabled():
        for operation, answers in sorted(by_operation.items()):
            print(f"\n{operation}: {sum(answers.values())} {dict(answers.most_common())}", end="")  # noqa: T201
    assert not asked.complaints, "\n\n".join(asked.complaints)
