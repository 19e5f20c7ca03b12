"""Fields that OpenAI's requests share: numbers with their ranges, and what is not served here.

Knows: names, ranges, and why something is refused. Does not know: engines, prompts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field

from molmo_core.api_requests import Seed, StrictRequest
from molmo_core.errors import InvalidRequest

Number = Annotated[float, Field(allow_inf_nan=False)]
MOST = 1_000_000
"""Larger counts make no difference to an answer and do not fit into the engine's integers."""

Count = Annotated[int, Field(ge=1)]
MinTokens = Annotated[int, Field(ge=0, le=MOST)]
Temperature = Annotated[Number, Field(ge=0, le=2)]
TopP = Annotated[Number, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, le=MOST)]
MinP = Annotated[Number, Field(ge=0, le=1)]
Penalty = Annotated[Number, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[Number, Field(ge=0.01, le=10)]
"""Logits are divided by it: by less, they are infinite and the engine has no answer."""
NLogprobs = Annotated[int, Field(ge=0)]

SAMPLING = {
    *("temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "ignore_eos", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
}
"""Passed on to the engine as they are."""

Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
]
"""The caller's own notes, in OpenAI's limits."""


class StreamOptions(StrictRequest):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None
    """Taken for OpenAI's sake; nothing is padded."""


def not_served(why: str, *allowed: Any) -> BeforeValidator:
    """Of a field that OpenAI has and this service has not, in `Annotated[Any, …]`.

    Null and the values in `allowed`, which ask for nothing, are taken; `why` says what to do else.
    """

    def refuse(value: Any) -> Any:
        if value is None or any(type(value) is type(a) and value == a for a in allowed):
            return value
        raise ValueError(why)

    return BeforeValidator(refuse, json_schema_input_type=_documented(allowed))


def _documented(allowed: tuple[Any, ...]) -> Any:
    """For the document only: a list or object that is allowed is one without members."""
    types: list[Any] = [Literal[None]]
    for value in allowed:
        is_plain = isinstance(value, (str, bool, int))
        types.append(
            Literal[value] if is_plain else Annotated[type(value), Field(max_length=len(value))]
        )
    return Union[tuple(types)]  # noqa: UP007  (the members are only known here)


NO_TOOLS = "Molmo2 calls no tools; leave it out"


class TakenFields(StrictRequest):
    """What OpenAI's callers send about themselves: taken, not used and not kept."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: Metadata | None = None
    store: Annotated[Any, not_served("nothing is stored; send false", False)] = None
    service_tier: Annotated[Any, not_served("there is one tier", "auto", "default")] = None


def check_most(got: int | None, allowed: int, name: str, unit: str = "") -> None:
    """Raises InvalidRequest for a value above what this service allows."""
    if got is not None and got > allowed:
        raise InvalidRequest(
            f"got {got}{unit} in {name}, allowed are {allowed}; ask for fewer", param=name
        )


def check_min_p(min_p: float | None, takes_min_p: bool) -> None:
    """Raises InvalidRequest for a `min_p` that the engine cannot do."""
    if min_p and not takes_min_p:
        raise InvalidRequest(
            f"min_p is {min_p}, and the engine drafts answers ahead, which it cannot under "
            "min_p: leave it out or use top_p, or start the server with MOLMO_DRAFTS=off",
            param="min_p",
        )


def n_stops(stop: str | list[str] | None) -> int:
    return len(stop) if isinstance(stop, list) else 0


class NoTools(StrictRequest):
    """What asks for tools is refused with the reason; what asks for none is taken."""

    tools: Annotated[Any, not_served(NO_TOOLS, [])] = None
    tool_choice: Annotated[Any, not_served(NO_TOOLS, "none", "auto")] = None
    parallel_tool_calls: bool | None = None


class Generated(TakenFields):
    """How an answer is generated and sent, of a chat and of a text."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    min_tokens: MinTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    n: Count | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    return_token_ids: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    ignore_eos: bool | None = None

    @property
    def hides_usage(self) -> bool:
        """OpenAI's streams tell it only when asked."""
        return not (self.stream_options and self.stream_options.include_usage)

    def streaming(self) -> dict[str, Any]:
        """The engine's options of a stream; none for a whole answer.

        The engine is to tell the usage also where the caller does not ask.
        """
        if not self.stream:
            return {}
        if self.stream_options is None or self.hides_usage:
            wishes = {"include_usage": True}
        else:
            wishes = self.stream_options.model_dump(
                exclude={"include_obfuscation"}, exclude_defaults=True
            )
        return {"stream": True, "stream_options": wishes}
