"""The engines' own metrics in the gateway's `/metrics`, each sample with its engine's name.

Knows: Prometheus' text format, vLLM's names. Does not know: how an engine is asked for them.
"""

from __future__ import annotations

from collections.abc import Mapping

ENGINE_METRICS = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits",
    "vllm:mm_cache_queries",
    "vllm:mm_cache_hits",
    "vllm:num_preemptions",
    "vllm:admission_rejections",
    "vllm:prompt_tokens",
    "vllm:generation_tokens",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)
"""Those that dashboards and alerts may name, as vLLM 0.32 registers them (a counter's samples end
in `_total`, a histogram's in `_bucket`, `_sum`, `_count`). All of vLLM's are passed on."""

_FAMILY = "vllm:"
_LABEL = "gateway_engine"
"""vLLM's own label `engine` is a number inside one server."""


def merged(texts: Mapping[str, str]) -> str:
    """One text of the families of all engines, from each engine's own text by its name.

    What is not vLLM's (figures of the engine's process) is left out.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for engine, text in texts.items():
        family, is_new = "", False
        for line in text.splitlines():
            if line.startswith("#"):
                words = line.split(" ", 3)
                named = words[2] if len(words) > 2 else ""
                if named != family:
                    family, is_new = named, named not in heads
                if is_new and family.startswith(_FAMILY):
                    heads.setdefault(family, []).append(line)
            elif line.startswith(_FAMILY):
                owner = family if line.startswith(family) and family else _name_of(line)
                samples.setdefault(owner, []).append(_labelled(line, engine))
    lines = [line for owner in samples for line in (*heads.get(owner, ()), *samples[owner])]
    return "".join(f"{line}\n" for line in lines)


def _name_of(line: str) -> str:
    return line.partition(" ")[0].partition("{")[0]


def _labelled(line: str, engine: str) -> str:
    name = _name_of(line)
    rest = line[len(name) :]
    label = f'{_LABEL}="{engine}"'
    return f"{name}{{{label},{rest[1:]}" if rest.startswith("{") else f"{name}{{{label}}}{rest}"
