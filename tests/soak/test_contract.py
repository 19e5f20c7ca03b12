"""At least 1,000 examples of every operation of the OpenAPI document; prints what was answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.contract import contract

N_EXAMPLES = 1000


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_examples_of_every_operation(
    folder: Path, tmp_path: Path, show: Callable[..., None]
) -> None:
    with contract(folder, tmp_path) as asked:
        asked.ask(n_examples=N_EXAMPLES)

    by_operation: dict[str, Counter[int]] = {}
    for (operation, status), n in asked.answers.items():
        by_operation.setdefault(operation, Counter())[status] += n
    show(*(f"{of}: {a.total()} {dict(a.most_common())}" for of, a in sorted(by_operation.items())))
    assert not asked.complaints, "\n\n".join(asked.complaints)
