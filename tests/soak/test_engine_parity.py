"""Every architecture variant over all conversations: engine against plain forward.

    make soak ARGS=tests/soak/test_engine_parity.py

prints the table of `docs/fidelity.md`. With MOLMO_ENGINE_STOCK=1 in the environment every engine
is vLLM's own Molmo2 and the comparison fails, as it must.
"""

from __future__ import annotations

import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest

from molmo_server.engine.plugin import STOCK_SWITCH
from tests.support.checkpoint import VARIANTS, write_checkpoint
from tests.support.conversations import Conversation, many_conversations
from tests.support.engine import Wanted, running_engine
from tests.support.parity import TOLERANCE, Difference, ask, compare, distance
from tests.support.reference import Reference

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

N_STEPS = 64
N_AT_ONCE = 8


@pytest.fixture
def report(show):
    """Show a row of the table."""
    return lambda *cells: show(f"| {' | '.join(map(str, cells))} |")


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_computes_what_the_plain_forward_computes(variant, tmp_path_factory, report):
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = write_checkpoint(folder / "checkpoint", variant)
    reference, conversations = Reference(checkpoint), many_conversations()
    assert len(conversations) >= 40

    def difference(conversation: Conversation, *, with_prompt: bool) -> Difference:
        answer = ask(engine, conversation, n_steps=N_STEPS, with_prompt=with_prompt)
        return compare(answer, reference, conversation)

    with running_engine(Wanted(checkpoint=checkpoint), folder) as engine:
        alone = [difference(c, with_prompt=True) for c in conversations]
        with ThreadPoolExecutor(N_AT_ONCE) as pool:
            beside = list(pool.map(lambda c: difference(c, with_prompt=False), conversations))

    largest = {
        "prompt": max(d.prompt for d in alone),
        "answer": max(d.answer for d in alone),
        "beside": max(d.answer for d in beside),
    }
    n_equal = [sum(d.greedy_equal and d.prompt_ids_equal for d in run) for run in (alone, beside)]
    report(variant, len(alone), *(f"{v:.1e}" for v in largest.values()), *n_equal)
    assert n_equal == [len(conversations)] * 2
    assert max(largest.values()) <= TOLERANCE


def test_vllms_own_model_fails_the_same_comparison(tmp_path_factory, report):
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = write_checkpoint(folder / "checkpoint", "qwen3")
    reference, conversations = Reference(checkpoint), many_conversations()
    stock = Wanted(checkpoint=checkpoint, environment={STOCK_SWITCH: "1"})
    with running_engine(stock, folder) as engine:
        found = [distance(engine, reference, c, n_steps=8) for c in conversations]
    comparable = [d for d in found if math.isfinite(d)]
    report(
        "vLLM's own",
        f"{sum(d > TOLERANCE for d in found)} of {len(found)} fail",
        f"{len(found) - len(comparable)} with other ids or refused",
        f"the others off by {min(comparable):.2g} to {max(comparable):.2g}",
        f"median {statistics.median(comparable):.2g}",
    )
    assert min(found) > 100 * TOLERANCE
