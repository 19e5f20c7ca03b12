"""vLLM's renderer with BOS in front of every Molmo2 prompt.

The Hugging Face processor inserts BOS; vLLM calls it for prompts with media only, so a text-only
prompt would begin with a token the model never saw first. Knows: vLLM 0.32's renderer.
Does not know: chat layouts (the template), media.
"""

from __future__ import annotations

from typing import Any

from vllm.renderers.hf import HfRenderer


class MolmoRenderer(HfRenderer):
    """HfRenderer that begins token prompts of Molmo2 with BOS; other models pass unchanged."""

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        return super()._process_tokens(self._with_bos(prompt), **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        return await super()._process_tokens_async(self._with_bos(prompt), **kwargs)

    def _with_bos(self, prompt: Any) -> Any:
        if self.model_config.hf_config.model_type != "molmo2" or self.tokenizer is None:
            return prompt
        bos = self.tokenizer.bos_token_id
        bos = self.tokenizer.eos_token_id if bos is None else bos
        ids = prompt["prompt_token_ids"]
        if ids and ids[0] == bos:
            return prompt
        begun = {**prompt, "prompt_token_ids": [bos, *ids]}
        if offsets := prompt.get("prompt_token_offsets"):
            begun["prompt_token_offsets"] = [(0, 0), *offsets]
        return begun
