"""The patches: they refuse what was not tested, and repair what kills stock vLLM."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from molmo_core.errors import UnsupportedEngine
from molmo_server.engine import patches


@pytest.fixture
def stock_functions(monkeypatch):
    """vLLM's two functions as they are; what a test puts in their place is taken out again."""
    from vllm.model_executor.layers import utils
    from vllm.v1.sample.sampler import Sampler

    gather = getattr(Sampler.gather_logprobs, "molmo_original", Sampler.gather_logprobs)
    count = utils.get_token_bin_counts_and_mask
    count = getattr(count, "molmo_original", count)
    monkeypatch.setattr(Sampler, "gather_logprobs", staticmethod(gather))
    monkeypatch.setattr(utils, "get_token_bin_counts_and_mask", count)
    return gather, count


def test_the_installed_engine_is_the_tested_one():
    patches.check_engine()


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.320.0"])
def test_any_other_version_is_refused(version):
    with pytest.raises(UnsupportedEngine, match=rf"vLLM {version} is installed"):
        patches.check_engine(version)


@pytest.mark.parametrize(
    "place",
    [
        "vllm.v1.sample.sampler:Sampler.gather_logprobs",
        "vllm.v1.sample.sampler:Sampler.no_such_function",
    ],
)
def test_changed_or_missing_code_is_refused_by_name(place):
    with pytest.raises(UnsupportedEngine, match=place):
        patches.check_engine(tested={place: "000000000000"})


def test_stock_sampling_breaks_on_ids_without_a_logit(stock_functions):
    gather, count = stock_functions
    with pytest.raises(RuntimeError, match="out of bounds"):
        gather(torch.zeros(1, 5), 1, torch.tensor([5]))
    with pytest.raises(RuntimeError, match="out of bounds"):
        count(torch.tensor([[9]]), 5, 1)


@pytest.mark.usefixtures("stock_functions")
def test_ids_without_a_logit_get_zero_and_rank_zero():
    from vllm.v1.sample.sampler import Sampler

    patches.repair_sampling()
    logprobs = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]).log()
    gathered = Sampler.gather_logprobs(logprobs, 2, torch.tensor([5, 1]))
    assert gathered.logprob_token_ids.tolist() == [[5, 2, 1], [1, 0, 1]]
    assert gathered.logprobs[0].exp().tolist() == pytest.approx([1.0, 0.7, 0.2])
    assert gathered.logprobs[1].exp().tolist() == pytest.approx([0.3, 0.5, 0.3])
    assert gathered.selected_token_ranks.tolist() == [0, 2]


@pytest.mark.usefixtures("stock_functions")
def test_ids_without_a_logit_are_not_counted_in_penalties():
    from vllm.model_executor.layers import utils

    patches.repair_sampling()
    counts, mask = utils.get_token_bin_counts_and_mask(torch.tensor([[1, 1, 9, 4]]), 4, 1)
    assert counts.tolist() == [[0, 2, 0, 0]]
    assert mask.tolist() == [[False, True, False, False]]


def test_a_setting_is_spread_over_the_drafted_tokens_of_its_request():
    from vllm.v1.sample import rejection_sampler

    patches.repair_sampling()
    spread = rejection_sampler.expand_batch_to_tokens
    n_tokens = torch.tensor([2, 2, 5, 6])  # 2, none, 3, 1
    temperature = spread(torch.tensor([0.7, 0.4, 0.0, 1.5]), n_tokens, 6, 0, 1)
    assert temperature.tolist() == pytest.approx([0.7, 0.7, 1, 1, 1, 1.5])
    top_k = spread(torch.tensor([3, 4, 0, 7], dtype=torch.int32), n_tokens, 6)
    assert top_k.dtype == torch.int32
    assert top_k.tolist() == [3, 3, 0, 0, 0, 7]


def test_a_step_without_drafted_tokens_has_nothing_to_constrain():
    from vllm.v1.sample import rejection_sampler

    patches.repair_sampling()
    settings = SimpleNamespace(
        all_greedy=False,
        temperature=torch.ones(1),
        top_k=torch.tensor([5], dtype=torch.int32),
        top_p=None,
    )
    none, ends = torch.zeros(0, 9), torch.zeros(1, dtype=torch.int32)
    constrain = rejection_sampler.apply_sampling_constraints
    with pytest.raises(RuntimeError, match="numel"):
        constrain.molmo_original(none, ends, settings)
    assert constrain(none, ends, settings).shape == (0, 9)


def test_drafted_answers_are_sampled_with_the_model_s_probabilities():
    """Many answers of one drafted token, of four possible ones, as vLLM samples them."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.rejection_sampler import apply_sampling_constraints, rejection_sample

    patches.repair_sampling()
    current_platform.import_kernels()
    with warnings.catch_warnings():  # vLLM looks for its kernels in all of torch
        warnings.simplefilter("ignore")
        current_platform.register_triton_kernel_overrides()
    n, temperature = 20_000, 0.7
    probabilities = torch.tensor([0.1, 0.6, 0.25, 0.05])
    logits = (probabilities.log() * temperature).expand(n, 4).contiguous()
    settings = SimpleNamespace(
        all_greedy=False,
        all_random=True,
        temperature=torch.full((n,), temperature),
        top_k=None,
        top_p=None,
        generators={},
    )
    ends = torch.arange(1, n + 1, dtype=torch.int32)
    torch.manual_seed(0)
    for draft in range(4):
        found = rejection_sample(
            torch.full((n,), draft, dtype=torch.int32),
            [1] * n,
            1,
            ends,
            None,
            apply_sampling_constraints(logits.clone(), ends, settings),
            torch.full((n, 1), 9),
            settings,
        )
        shares = found[:, 0].bincount(minlength=4) / n
        assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=0.012)
        assert ((found[:, 1] == 9) == (found[:, 0] == draft)).all()


@pytest.mark.usefixtures("stock_functions")
def test_repairing_twice_wraps_once():
    from vllm.v1.sample.sampler import Sampler

    patches.repair_sampling()
    wrapped = Sampler.gather_logprobs
    patches.repair_sampling()
    assert Sampler.gather_logprobs is wrapped
