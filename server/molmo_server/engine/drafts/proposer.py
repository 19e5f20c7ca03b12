"""What vLLM asks for drafts: foretells the answers of all running requests, in tokens.

vLLM verifies drafted tokens together in its next step and keeps those that the model would have
chosen: answers stay what they are, they take fewer steps. vLLM tells no names of requests, only
rows of token ids, which move when a request ends; a row that does not go on where it was left
is read anew. To mistake one request for another would cost drafts, never an answer.

Knows: vLLM 0.32's interface of custom proposers, which tokens stand for which text. Does not
know: what prompts and answers look like (`asked`, `answer`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.tokenizers import cached_tokenizer_from_config

from molmo_core.tokens import IM_PATCH
from molmo_server.engine.drafts.answer import AnswerSoFar
from molmo_server.engine.drafts.asked import read_prompt

_N_COMPARED = 16
"""So many of a row's latest tokens tell whether it is the same request."""


@dataclass(frozen=True, kw_only=True)
class _Followed:
    """An answer as read up to token `n_read`; `latest` are the ids in front of that."""

    answer: AnswerSoFar
    n_read: int
    latest: bytes


class CoordProposer:
    """`propose` gets the state of vLLM's batch and returns drafts by row."""

    def __init__(self, vllm_config: Any) -> None:
        speculative, model = vllm_config.speculative_config, vllm_config.model_config
        self._n_drafted: int = speculative.num_speculative_tokens
        self._max_model_len: int = model.max_model_len
        self._spelling = Spelling(cached_tokenizer_from_config(model))
        self._followed: dict[int, _Followed] = {}
        # vLLM drafts zeros for everyone when one request comes near the context of the model that
        # drafts. Here is no such model, and what is too long the scheduler cuts.
        unbounded = copy.copy(speculative.draft_model_config)
        unbounded.max_model_len = self._max_model_len + self._n_drafted
        speculative.draft_model_config = unbounded

    def load_model(self, model: Any) -> None:
        """Nothing to load; vLLM calls this of all that draft."""

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Drafts by row, [] for none.

        `token_ids_cpu` (rows, context) holds prompts with their answers, `num_tokens_no_spec` how
        many ids of each row count, `sampled_token_ids` the last of them: none in mid-prompt.
        """
        return [
            self._draft(row, token_ids_cpu[row, : num_tokens_no_spec[row]], len(sampled))
            if sampled
            else []
            for row, sampled in enumerate(sampled_token_ids)
        ]

    def _draft(self, row: int, ids: NDArray[np.int32], n_new: int) -> list[int]:
        followed = self._followed.get(row)
        n_read = len(ids) - n_new
        if followed and (followed.n_read, followed.latest) == (n_read, _latest(ids[:n_read])):
            answer = followed.answer
            answer.read(self._spelling.text_of(ids[n_read:]))
        else:
            asked, said = read_prompt(self._spelling.text_of(ids))
            answer = AnswerSoFar(asked)
            answer.read(said)
        self._followed[row] = _Followed(answer=answer, n_read=len(ids), latest=_latest(ids))
        n_wanted = min(self._n_drafted, self._max_model_len - len(ids) - 1)
        draft: list[int] = []
        for piece in answer.rest() if n_wanted > 0 else ():
            draft += self._spelling.ids_of(piece)
            if len(draft) >= n_wanted:
                break
        return draft[: max(n_wanted, 0)]


def _latest(ids: NDArray[np.int32]) -> bytes:
    return ids[-_N_COMPARED:].tobytes()


class Spelling:
    """Text of token ids and ids of text; each is looked up once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._patch_id = tokenizer.convert_tokens_to_ids(IM_PATCH)
        self._texts: dict[int, str] = {}
        self.ids_of = lru_cache(maxsize=4096)(self._encode)

    def text_of(self, ids: NDArray[np.int32]) -> str:
        """Patches of pictures are left out: they are most of a prompt and say nothing here."""
        return "".join(map(self._text, ids[ids != self._patch_id].tolist()))

    def _text(self, token_id: int) -> str:
        text = self._texts.get(token_id)
        if text is None:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            self._texts[token_id] = text
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))
