"""What a verb's request asks of the model: one question, or one for each object or given point.

Knows: wordings, options of the verbs. Does not know: how questions are answered, what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from molmo_core import api
from molmo_core.errors import InvalidRequest
from molmo_core.prompts import Turn, Verb, track_prompt, verb_prompt
from molmo_server.answers.confidence import N_ALTERNATIVES
from molmo_server.answers.grammar import AnswerShape
from molmo_server.answers.verbs import VERBS
from molmo_server.media.gate import CheckedMedia
from molmo_server.questions.chat import Question
from molmo_server.settings import MolmoSettings
from molmo_server.tenancy.callers import Caller


@dataclass(frozen=True, kw_only=True)
class VerbQuestion:
    """`label`: the object, where a request asks about several."""

    question: Question
    label: str | None = None

    def about(self, media: CheckedMedia | None) -> VerbQuestion:
        """The same about media that were checked for another question."""
        if media is None:
            return self
        return replace(self, question=replace(self.question, media=media))

    def streamed(self) -> VerbQuestion:
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        question = replace(self.question, options=self.question.options | streaming)
        return replace(self, question=question)


def questions_of(
    verb: Verb, asked: api.GenerationOptions, settings: MolmoSettings, caller: Caller
) -> list[VerbQuestion]:
    """Raises InvalidRequest for more of them than the settings allow, and for a confidence that
    they do not allow."""
    video_url: str | None = asked.video_url  # type: ignore[attr-defined]
    plain = Question(
        turns=(),
        image_urls=asked.image_urls,  # type: ignore[attr-defined]
        video_urls=() if video_url is None else (video_url,),
        model=asked.model,
        max_tokens=asked.max_tokens,
        region=getattr(asked, "region", None),
        media_options=asked.media_options,
        options=_sampling(asked, settings),
        caller=caller,
    )
    if isinstance(asked, api.TrackRequest):
        return _tracking(asked, plain, settings)
    wording = partial(
        verb_prompt, verb, n_images=len(plain.image_urls), has_video=video_url is not None
    )
    if isinstance(asked, api.PointingRequest):
        shape = AnswerShape(form=VERBS[verb].form or "point", max_points=asked.max_points)
        plain = replace(plain, shape=shape, constrained=asked.constrained)
        labels = _limited(asked.labels, "objects", settings)
        return [
            VerbQuestion(
                question=replace(plain, turns=_turn(wording(label))),
                label=label if asked.objects is not None else None,
            )
            for label in labels
        ]
    text = asked.question if isinstance(asked, api.QueryRequest) else ""
    return [VerbQuestion(question=replace(plain, turns=_turn(wording(text))))]


def _tracking(
    asked: api.TrackRequest, plain: Question, settings: MolmoSettings
) -> list[VerbQuestion]:
    shape = AnswerShape(form="track", max_points=asked.max_points, frame_rate=asked.frame_rate)
    plain = replace(plain, shape=shape, constrained=asked.constrained)
    if asked.points is None:
        return [
            VerbQuestion(
                question=replace(
                    plain, turns=_turn(track_prompt(label, frame_rate=asked.frame_rate))
                ),
                label=label if asked.objects is not None else None,
            )
            for label in _limited(asked.labels, "objects", settings)
        ]
    [label] = asked.labels
    return [
        VerbQuestion(question=_continuing(plain, shape, label, point))
        for point in _limited(asked.points, "points", settings)
    ]


def _continuing(plain: Question, shape: AnswerShape, label: str, point: api.GivenPoint) -> Question:
    start_s = (plain.media_options and plain.media_options.start) or 0.0
    if point.t < start_s:
        raise InvalidRequest(
            f"got a point at {point.t:g} s of a part that begins at {start_s:g} s; give points in "
            "the part",
            param="points",
        )
    seen_at = (point.t - start_s, point.x, point.y)
    wording = track_prompt(label, frame_rate=shape.frame_rate, seen_at=seen_at)
    one = replace(shape, max_points=1, after_s=point.t)
    return replace(plain, turns=_turn(wording), shape=one)


def _turn(wording: str) -> tuple[Turn, ...]:
    return (Turn(role="user", text=wording),)


def _limited(many: Sequence[Any], name: str, settings: MolmoSettings) -> Sequence[Any]:
    if len(many) > settings.max_labels:
        raise InvalidRequest(
            f"got {len(many)} {name}, allowed are {settings.max_labels} in a request; send fewer",
            param=name,
        )
    return many


def _sampling(asked: api.GenerationOptions, settings: MolmoSettings) -> dict[str, Any]:
    options: dict[str, Any] = {"temperature": asked.temperature}
    if asked.seed is not None:
        options["seed"] = asked.seed
    if not isinstance(asked, api.PointingRequest):
        return options
    is_allowed = settings.max_logprobs >= N_ALTERNATIVES
    if asked.confidence and not is_allowed:
        raise InvalidRequest(
            f"got confidence, which needs {N_ALTERNATIVES} alternatives of each token, and this "
            f"server gives {settings.max_logprobs}; leave it out",
            param="confidence",
        )
    wanted = asked.confidence if asked.confidence is not None else settings.gives_confidence
    if wanted and is_allowed:
        options |= {"logprobs": True, "top_logprobs": N_ALTERNATIVES}
    return options
