"""In what settings differ, and which may."""

from __future__ import annotations

import pytest

from molmo_core.errors import TrainingError
from molmo_training.runs.comparison import check_same, differences

SAVED = {"seed": 1, "optim": {"rate": 0.1, "betas": [0.9, 0.95]}, "stages": [{"n": 1}], "old": None}
GIVEN = {"seed": 2, "optim": {"rate": 0.2, "betas": (0.9, 0.99)}, "stages": [{"n": 1}, {"n": 2}]}


def test_differences_have_the_names_of_fields() -> None:
    assert differences(SAVED, GIVEN) == {
        "seed": (1, 2),
        "optim.rate": (0.1, 0.2),
        "optim.betas.1": (0.95, 0.99),
        "stages.1": ("nothing", {"n": 2}),
        "old": (None, "nothing"),
    }
    assert differences(GIVEN, GIVEN) == {}
    assert differences({"a": []}, {"a": ()}) == {}
    assert differences({"a": {"b": 1}}, {"a": 1}) == {"a": ({"b": 1}, 1)}


def test_only_what_may_differ_may() -> None:
    check_same(SAVED, GIVEN, may_differ=["seed", "optim.*", "stages.*", "old"])
    with pytest.raises(TrainingError, match=r"settings: seed is 2, was 1; old is 'nothing', was N"):
        check_same(SAVED, GIVEN, may_differ=["optim.*", "stages*"])
    many = {str(number): number for number in range(10)}
    with pytest.raises(TrainingError, match=r"8 is 0, was 8 and 1 more\. Give those"):
        check_same(many, dict.fromkeys(many, 0))
