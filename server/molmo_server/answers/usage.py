"""What a caller is told of the tokens of a request.

Knows: OpenAI's usage. Does not know: who counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def tell_visual_tokens(usage: dict[str, Any], visual: Mapping[str, int]) -> None:
    """Add to the engine's usage how many of the prompt's tokens are seen, not read.

    The engine's own figure (`multimodal_tokens`) counts the rows around the patches as well.
    """
    if visual:
        details = usage.get("prompt_tokens_details") or {}
        usage["prompt_tokens_details"] = {**details, **visual}
