"""An engine that knows the truth about eval samples and writes it as the model was trained to.

It looks a request up by its media. Knows: samples of the task `scenes`. Does not know: scoring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from aiohttp import web

from molmo_client import encode
from molmo_core.clips import Clip
from molmo_core.points import PointGroup, TrackFrame, render_answer, render_points, render_tracks
from molmo_core.scene_questions import attribute_questions
from molmo_core.scenes import Query, Scene, describe, parse_query
from molmo_core.videos import VideoGeometry, sample_times
from molmo_evals.task import Sample
from molmo_server.engine_pool.fake import FakeEngine


def points_text(scenes: Sequence[Scene], query: Query, *, mode: str = "pointing") -> str:
    groups = [
        PointGroup(
            points=[(item.x_px, item.y_px) for item in scene.objects if query.matches(item)],
            media_index=index,
            scale_xy=(scene.width_px, scene.height_px),
        )
        for index, scene in enumerate(scenes)
    ]
    n_points = sum(len(group.points) for group in groups)
    tag = render_points(groups, query.label.removeprefix("the "), clip=True)
    return render_answer(mode, tag=tag, n_points=n_points)


def video_points_text(clip: Clip, query: Query) -> str:
    first = clip.scene_at(0.0)
    group = PointGroup(
        points=[(item.x_px, item.y_px) for item in first.objects if query.matches(item)],
        time_s=0.0,
        scale_xy=(clip.width_px, clip.height_px),
    )
    tag = render_points([group], query.label, clip=True)
    return render_answer("pointing", tag=tag, n_points=len(group.points))


def tracks_text(clip: Clip, query: Query, times_s: Iterable[float]) -> str:
    frames = [
        TrackFrame(
            time_s=time_s,
            points={
                key: (item.x_px, item.y_px)
                for key, item in enumerate(clip.scene_at(time_s).objects)
                if query.matches(item)
            },
            scale_xy=(clip.width_px, clip.height_px),
        )
        for time_s in times_s
    ]
    return render_tracks(frames, query.label, clip=True)


def true_text(sample: Sample, geometry: VideoGeometry) -> str:
    """What a perfect model would write."""
    drawn = cast("partial[list[bytes]]", sample.media).args[0]
    if sample.verb == "caption":
        return describe(drawn[0])
    if sample.verb == "query":
        return dict(attribute_questions(drawn[0].objects))[sample.text]
    query = parse_query(sample.text)
    if sample.verb == "track":
        times_s = sample_times(drawn.duration_s, geometry, source_fps=drawn.fps)
        return tracks_text(drawn, query, times_s)
    if isinstance(drawn, Clip):
        return video_points_text(drawn, query)
    return points_text(drawn, query, mode="point_count" if sample.verb == "count" else "pointing")


@dataclass(kw_only=True)
class Oracle(FakeEngine):
    """`answers` by `media_key`; `default` for media that it does not know."""

    answers: dict[str, str] = field(default_factory=dict)
    forgets_after: int | None = None
    """So many requests; it knows nothing any more then."""

    def learn(self, samples: Iterable[Sample], geometry: VideoGeometry) -> None:
        for sample in samples:
            urls = [encode(file).url for file in sample.media()]
            self.answers[media_key(urls)] = true_text(sample, geometry)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        # The body is kept by the request, so nothing else runs between here and its use.
        urls = media_urls(await request.json())
        if self.forgets_after is not None and len(self.requests) >= self.forgets_after:
            self.answers.clear()
        self.script = {"": self.answers.get(media_key(urls), self.default)}
        return await super()._chat(request)


def media_key(urls: Sequence[str]) -> str:
    payloads = "\n".join(url.partition(",")[2] for url in urls)
    return hashlib.sha256(payloads.encode()).hexdigest()


def media_urls(body: dict[str, Any]) -> list[str]:
    parts = [part for part in body["messages"][-1]["content"] if part["type"] != "text"]
    return [part[part["type"]]["url"] for part in parts]
