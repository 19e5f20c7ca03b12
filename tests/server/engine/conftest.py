"""Engines that all tests of this folder share: starting one costs more than all its answers.

The context is short, so that prompts compete for the tokens of a step.
"""

from __future__ import annotations

import warnings

import pytest

# vLLM and torch warn while they are imported; that is not what these tests are about.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import vllm.model_executor.layers.utils
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.sample.sampler  # noqa: F401

from molmo_server.engine.plugin import STOCK_SWITCH
from tests.support.checkpoint import write_checkpoint
from tests.support.engine import Wanted, engines_side_by_side
from tests.support.reference import Reference

SHORT = {"max_model_len": 2560}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    variants = ("qwen3", "olmo3", "causal")
    return {variant: write_checkpoint(folder / variant, variant) for variant in variants}


@pytest.fixture(scope="session")
def references(checkpoints):
    return {variant: Reference(folder) for variant, folder in checkpoints.items()}


@pytest.fixture(scope="session")
def handed(tmp_path_factory):
    """The folder whose files may be named in requests."""
    return tmp_path_factory.mktemp("handed")


@pytest.fixture(scope="session")
def engines(checkpoints, handed, tmp_path_factory):
    """Two architectures as trained: "qwen3" and "olmo3"."""
    fields = {**SHORT, "media_folder": handed}
    wanted = {v: Wanted(checkpoint=checkpoints[v], fields=fields) for v in ("qwen3", "olmo3")}
    with engines_side_by_side(wanted, tmp_path_factory.mktemp("engines")) as engines:
        yield engines


@pytest.fixture(scope="module")
def contrasts(checkpoints, tmp_path_factory):
    """ "stock": vLLM's own Molmo2; "causal": steps of 160 tokens, which cut images into several.

    Their tests come first by name and end before the others start: an engine takes 3 GB.
    """
    cut = {**SHORT, "extra_arguments": ("--max-num-batched-tokens", "160")}
    wanted = {
        "stock": Wanted(
            checkpoint=checkpoints["qwen3"], fields=SHORT, environment={STOCK_SWITCH: "1"}
        ),
        "causal": Wanted(checkpoint=checkpoints["causal"], fields=cut),
    }
    with engines_side_by_side(wanted, tmp_path_factory.mktemp("contrasts")) as engines:
        yield engines
