"""vLLM's renderer with two rules of Molmo2's processor that vLLM does not apply.

BOS stands in front of every prompt: the processor inserts it, but vLLM calls that for prompts
with media only, and a text-only prompt would begin with a token the model never saw first. And a
prompt holds images or a video, not both: the model was trained on one kind at a time.

Knows: vLLM 0.32's renderer. Does not know: chat layouts (the template), media.
"""

from __future__ import annotations

from typing import Any

from vllm.renderers.hf import HfRenderer


class MolmoRenderer(HfRenderer):
    """HfRenderer with the rules above for Molmo2; prompts of other models pass unchanged."""

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        return super()._process_tokens(self._as_trained(prompt), **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        return await super()._process_tokens_async(self._as_trained(prompt), **kwargs)

    def _as_trained(self, prompt: Any) -> Any:
        if self.model_config.hf_config.model_type != "molmo2" or self.tokenizer is None:
            return prompt
        media = prompt.get("multi_modal_data") or {}
        if media.get("image") and media.get("video"):
            raise ValueError(
                "the prompt holds images and a video; Molmo2 knows one kind at a time: send the "
                "images or the video"
            )
        bos = self.tokenizer.bos_token_id
        bos = self.tokenizer.eos_token_id if bos is None else bos
        ids = prompt["prompt_token_ids"]
        if ids and ids[0] == bos:
            return prompt
        begun = {**prompt, "prompt_token_ids": [bos, *ids]}
        if offsets := prompt.get("prompt_token_offsets"):
            begun["prompt_token_offsets"] = [(0, 0), *offsets]
        return begun
