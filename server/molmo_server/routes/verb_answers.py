"""The answers to a verb's questions: asked, put together, and sent whole or as events.

Several questions of a request are about the same media: the first goes by itself, so that the
engine has looked at the media when the others come.

Knows: the order of questions, events of a streamed verb. Does not know: what is asked
(`verb_questions`), what answers hold (`answers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
from starlette.types import Scope, Send

from molmo_core import api
from molmo_core.errors import MolmoError
from molmo_server.answers import merging
from molmo_server.answers.events import END, LAST, EngineEvents, error_events, event
from molmo_server.answers.interpolation import interpolated, moments_between
from molmo_server.answers.reading import AnswerReader
from molmo_server.answers.usage import tell_visual_tokens
from molmo_server.answers.verbs import VerbSpec, written
from molmo_server.errors import note_error
from molmo_server.gateway import Gateway
from molmo_server.media.gate import CheckedMedia
from molmo_server.prompt import Prompt
from molmo_server.questions.chat import Asked
from molmo_server.routes.sending import STREAM_HEADERS, send_json
from molmo_server.routes.verb_questions import VerbQuestion
from molmo_server.telemetry import tell_checkpoint


@dataclass(frozen=True, kw_only=True)
class Answering:
    gateway: Gateway
    spec: VerbSpec
    asked: api.GenerationOptions
    questions: Sequence[VerbQuestion]

    async def send(self, scope: Scope, send: Send) -> None:
        """The whole answer."""
        first, *others = self.questions
        answer, media = await self._ask(first, 0, scope)
        answers = [answer]
        if others:
            answers += await self._ask_all([one.about(media) for one in others], scope)
        whole = self._as_one(answers).model_dump_json()
        await send_json(orjson.Fragment(whole), scope, send)

    async def stream(self, scope: Scope, send: Send) -> None:
        """Places as they are written, one question after the other, then the whole answer.

        Errors before the first byte are raised, later ones end the stream with an error event.
        """
        outlet = _Outlet(send)
        answers: list[api.VerbAnswer] = []
        media: CheckedMedia | None = None
        try:
            for number, question in enumerate(self.questions):
                about = question.about(media).streamed()
                answer, media = await self._ask_streamed(about, number, scope, outlet)
                answers.append(answer)
            whole = self._as_one(answers).model_dump_json().encode()
            await outlet.put(event(b'{"op":"done","answer":' + whole + b"}") + LAST + END)
        except MolmoError as error:
            if not outlet.has_begun:
                raise
            note_error(scope, error)
            await outlet.put(error_events(error))
        await send({"type": "http.response.body", "body": b""})

    async def _ask_all(
        self, questions: Sequence[VerbQuestion], scope: Scope
    ) -> list[api.VerbAnswer]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._ask(question, number, scope))
                    for number, question in enumerate(questions, 1)
                ]
        except* MolmoError as failures:
            raise _first(failures) from None
        return [task.result()[0] for task in tasks]

    async def _ask(
        self, question: VerbQuestion, number: int, scope: Scope
    ) -> tuple[api.VerbAnswer, CheckedMedia]:
        completion = await self.gateway.complete(
            question.question, request_id=_request_id(scope, number)
        )
        reader = self._reader(question, completion.prompt)
        choice = completion.answer["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content")
        reader.feed(choice["message"]["content"] or "", tokens)
        answer = await self._read(
            question,
            completion.prompt,
            reader,
            finish_reason=choice["finish_reason"],
            usage=completion.answer["usage"],
            checkpoint=tell_checkpoint(scope, completion.checkpoint_id),
            request_id=_request_id(scope),
        )
        return answer, completion.prompt.media

    async def _ask_streamed(
        self, question: VerbQuestion, number: int, scope: Scope, outlet: _Outlet
    ) -> tuple[api.VerbAnswer, CheckedMedia]:
        opened = self.gateway.open(
            question.question, request_id=_request_id(scope, number), whole=False
        )
        async with opened as (asked, reply):
            checkpoint = tell_checkpoint(scope, asked.answering)
            await outlet.begin()
            events = EngineEvents(lambda: self._reader(question, asked.prompt))
            reader = events.reader(0)
            try:
                chunk = reply.first
                while chunk:
                    found = [item for one in events.feed(chunk) for _, item in one.observed]
                    await outlet.put(self._events(found, question, number))
                    if events.has_ended:
                        await reply.end()
                        break
                    chunk = await reply.more()
                events.check_end()
            finally:
                asked.note_tokens(prompt=events.n_prompt_tokens, completion=events.n_tokens)
        answer = await self._read(
            question,
            asked.prompt,
            reader,
            finish_reason=events.finish_reason,
            usage=_used(asked, events),
            checkpoint=checkpoint,
            request_id=_request_id(scope),
        )
        await outlet.put(self._events(reader.late, question, number))
        return answer, asked.prompt.media

    def _reader(self, question: VerbQuestion, prompt: Prompt) -> AnswerReader:
        shape = question.question.shape
        return AnswerReader(
            prompt.media, self.gateway.note, max_points=shape.max_points if shape else None
        )

    async def _read(
        self, question: VerbQuestion, prompt: Prompt, reader: AnswerReader, **beside: Any
    ) -> api.VerbAnswer:
        answer = self.spec.read(written(reader, **beside))
        video, shape = prompt.media.video, question.question.shape
        wish = getattr(self.asked, "interpolate", False)
        if not wish or video is None or shape is None or not isinstance(answer, api.TrackAnswer):
            return answer
        tracks = await asyncio.to_thread(
            interpolated,
            answer.tracks,
            at_s=moments_between(video.info, None if wish is True else float(wish)),
            seen_s=[video.start_s + t for t in shape.moments_s(video)],
            info=video.info,
            medium=answer.media[0],
        )
        return answer.model_copy(update={"tracks": tracks})

    def _as_one(self, answers: Sequence[api.VerbAnswer]) -> api.VerbAnswer:
        labels = [question.label for question in self.questions]
        if labels[0] is not None:
            pointing = cast("Sequence[api.PointingAnswer]", answers)
            return merging.of_objects([label or "" for label in labels], pointing)
        if len(answers) > 1:
            return merging.of_points(cast("Sequence[api.TrackAnswer]", answers))
        return answers[0]

    def _events(
        self, observed: Sequence[api.Observation], question: VerbQuestion, number: int
    ) -> bytes:
        changes: dict[str, Any] = {}
        if question.label is not None:
            changes = {"object": question.label}
        elif len(self.questions) > 1:
            changes = {"id": number + 1}
        items = [item.model_copy(update=changes) for item in observed] if changes else observed
        return b"".join(
            event(orjson.dumps(api.Added(item=item).model_dump(mode="json"))) for item in items
        )


class _Outlet:
    """The events of one answer on their way to the caller."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def begin(self) -> None:
        if not self.has_begun:
            start = {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
            await self._send(start)
            self.has_begun = True

    async def put(self, events: bytes) -> None:
        if events:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})


def _request_id(scope: Scope, number: int = 0) -> str:
    """An engine knows requests by their id: each question has its own."""
    request_id: str = scope["state"]["request_id"]
    return f"{request_id}-{number}" if number else request_id


def _used(asked: Asked, events: EngineEvents) -> Mapping[str, Any]:
    """As the engine told, or counted here."""
    n_prompt = asked.prompt.n_tokens
    counted = {
        "prompt_tokens": n_prompt,
        "completion_tokens": events.n_tokens,
        "total_tokens": n_prompt + events.n_tokens,
    }
    usage = dict(events.usage or counted)
    tell_visual_tokens(usage, asked.prompt.visual_usage())
    return usage


def _first(failures: BaseExceptionGroup[MolmoError]) -> MolmoError:
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
