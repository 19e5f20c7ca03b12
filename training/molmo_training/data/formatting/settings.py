"""How rows become text: the choices that differ between the stages of training.

Knows: the names that Ai2's own configurations use for these choices. Does not know: rows, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from molmo_core.points.render import TagFormat

PromptTemplates = Literal["none", "uber_model", "uber_model_v2"]
"""none: the bare label or question; uber_model_v2: a drawn template and drawn multiple choice;
uber_model: drawn templates, but one layout of multiple choice."""

SystemPrompt = Literal[
    "none",
    "style",
    "demo_or_style",
    "demo_or_style_v2",
    "style_and_length",
    "style_and_length_v2",
    "style_and_length_v3",
]
"""What stands before the first question: see `style_prefix`."""

TimestampMode = Literal["50-percent-seconds", "seconds", "clock"]


@dataclass(frozen=True, kw_only=True)
class FormatSettings:
    """The defaults are those of the SFT and long-context stages."""

    prompt_templates: PromptTemplates = "uber_model_v2"
    system_prompt: SystemPrompt = "demo_or_style_v2"
    pointing_format: TagFormat = "html-v2"
    timestamp_mode: TimestampMode = "50-percent-seconds"
    p_multi_point_all_image: float = 0.5
    """How often a question of several pictures is about all of them."""
    p_choice_content_in_mc: float = 1.0
    """How often the answer of the fixed layout names the option beside its letter."""
    p_random_query_point: float = 0.2
    """How often a single-point track starts at a drawn moment instead of the first one."""
    keep_count_without_pointing: bool = False
    """Whether styles keep their ending `_count_without_pointing` in training."""
    is_training: bool = True
    """False: nothing is varied that changes the kind of answer, as for a validation loss."""

    def __post_init__(self) -> None:
        if self.system_prompt == "demo_or_style" and self.prompt_templates == "uber_model_v2":
            raise ValueError(
                "system_prompt 'demo_or_style' does not go with prompt_templates "
                "'uber_model_v2': use 'demo_or_style_v2'"
            )


PRETRAIN = FormatSettings(
    prompt_templates="none", system_prompt="style_and_length_v2", pointing_format="html-v1"
)
SFT = FormatSettings()
