"""Names of Molmo2's tensors: native (Ai2's training) and Hugging Face (released).

Knows: the rule that turns one into the other. Does not know: which tensors a model has.
"""

from __future__ import annotations

import re

from molmo_hf.export import HEAD

NATIVE_HEAD = "transformer.ff_out.weight"
_PREFIX = "model."
_IN_ATTENTION = "att_proj|attn_out|q_norm|k_norm"
_IN_MLP = "ff_proj|ff_out"
_NATIVE_BLOCK = re.compile(rf"(transformer\.blocks\.\d+\.)({_IN_ATTENTION}|{_IN_MLP})(\..+)")
_HF_BLOCK = re.compile(
    rf"(transformer\.blocks\.\d+\.)(?:self_attn\.({_IN_ATTENTION})|mlp\.({_IN_MLP}))(\..+)"
)


def to_hf(name: str) -> str:
    if name == NATIVE_HEAD:
        return str(HEAD)
    if match := _NATIVE_BLOCK.fullmatch(name):
        block, part, rest = match.groups()
        home = "mlp" if part.startswith("ff_") else "self_attn"
        return f"{_PREFIX}{block}{home}.{part}{rest}"
    return _PREFIX + name


def to_native(name: str) -> str:
    if name == HEAD:
        return NATIVE_HEAD
    name = name.removeprefix(_PREFIX)
    if match := _HF_BLOCK.fullmatch(name):
        block, in_attention, in_mlp, rest = match.groups()
        return f"{block}{in_attention or in_mlp}{rest}"
    return name


__all__ = ["HEAD", "NATIVE_HEAD", "to_hf", "to_native"]
