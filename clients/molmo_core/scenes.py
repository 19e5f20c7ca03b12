"""Drawn scenes: simple coloured shapes on a quiet background, with exact ground truth.

Knows: how a scene is sampled and drawn, which labels select which objects, and how a scene is
put into words. Does not know: prompts, point formats, models, moving objects (`clips`).
Coordinates are pixels from the top left corner of the canvas, x first, y down; the centre of the
first pixel is (0.5, 0.5), so `x_px / width_px` is the 0-1 position. Source: this project's own.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from molmo_core.errors import InvalidRequest

Rgb = tuple[int, int, int]
BackgroundKind = Literal["plain", "gradient", "blotches"]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, Rgb] = {
    "red": (225, 30, 35),
    "green": (25, 150, 55),
    "blue": (30, 75, 225),
    "yellow": (245, 222, 30),
    "purple": (142, 45, 165),
    "orange": (248, 142, 22),
}
COLOUR_JITTER = 16  # per channel, either way
MAX_OBJECTS, MAX_CROWD = 6, 16  # of a scene left to itself; on demand
MIN_SIDE_PX, MAX_SIDE_PX, MAX_ASPECT = 160, 1024, 2.0
RADIUS_FRACTION = (0.04, 0.12)  # of the shorter side
GAP_FRACTION = 0.02  # of the shorter side, kept free between two circumscribed circles
MAX_TILT_RAD = math.radians(20)

_SUPERSAMPLING = 4
_STAR_INNER_RADIUS = 0.42
_PLACES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_PLACE_ORDER = tuple(itertools.chain(*_PLACES))
_PREPOSITIONS = {"left": "on", "right": "on", "centre": "in"}  # the others: "at"
_ANY_NOUNS = ("object", "thing", "shape")


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """What fills the canvas. `seed` fixes blotches and grain; `grain_sigma` is in 0-255 levels."""

    kind: BackgroundKind
    first_rgb: Rgb
    second_rgb: Rgb
    angle_rad: float
    grain_sigma: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One shape inside its circumscribed circle of `radius_px`; `rgb` is its jittered colour."""

    shape: str
    colour: str
    rgb: Rgb
    x_px: float
    y_px: float
    radius_px: float
    rotation_rad: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    width_px: int
    height_px: int
    background: Background
    objects: tuple[SceneObject, ...]


class Kind(Protocol):
    """What a query looks at: still and moving objects both have it."""

    @property
    def shape(self) -> str: ...
    @property
    def colour(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Query:
    """A label and what it selects: every object of `shape` and `colour`, None meaning any."""

    label: str
    shape: str | None
    colour: str | None

    def matches(self, kind: Kind) -> bool:
        return self.shape in (None, kind.shape) and self.colour in (None, kind.colour)


# --- sampling ---------------------------------------------------------------------------------


def sample_scene(
    rng: np.random.Generator,
    *,
    n_objects: int | None = None,
    min_side_px: int = MIN_SIDE_PX,
    max_side_px: int = MAX_SIDE_PX,
    side_multiple_px: int = 1,
) -> Scene:
    """A random scene; left to itself, 1 in 20 is empty and the rest hold 1-6 objects evenly.

    The longer side is log-uniform in [min_side_px, max_side_px], both sides lie in it and are
    multiples of `side_multiple_px`. Raises ValueError for limits that no scene can meet.
    """
    if n_objects is None:
        n_objects = 0 if rng.random() < 0.05 else int(rng.integers(1, MAX_OBJECTS + 1))
    if not 0 <= n_objects <= MAX_CROWD:
        raise ValueError(f"n_objects is {n_objects}, a scene holds 0 to {MAX_CROWD}")
    low, high = -(-min_side_px // side_multiple_px), max_side_px // side_multiple_px
    if not 1 <= low <= high:
        raise ValueError(
            f"sides of {min_side_px} to {max_side_px} px hold no multiple of {side_multiple_px}; "
            "widen the range"
        )
    longer = round(math.exp(rng.uniform(math.log(low), math.log(high))))
    aspect = math.exp(rng.uniform(0.0, math.log(min(MAX_ASPECT, longer / low))))
    shorter = max(low, math.ceil(longer / MAX_ASPECT), round(longer / aspect))
    sides = [longer * side_multiple_px, shorter * side_multiple_px]
    width_px, height_px = sides if rng.random() < 0.5 else sides[::-1]
    return Scene(
        width_px=width_px,
        height_px=height_px,
        background=_sample_background(rng),
        objects=_sample_objects(rng, n_objects, width_px, height_px),
    )


def _sample_background(rng: np.random.Generator) -> Background:
    kinds: tuple[BackgroundKind, ...] = ("plain", "gradient", "blotches")
    kind = kinds[rng.choice(3, p=(0.45, 0.3, 0.25))]
    first_rgb = _sample_neutral(rng)
    return Background(
        kind=kind,
        first_rgb=first_rgb,
        second_rgb=first_rgb if kind == "plain" else _sample_neutral(rng),
        angle_rad=rng.uniform(0.0, 2 * math.pi),
        grain_sigma=rng.uniform(3.0, 22.0) if rng.random() < 0.4 else 0.0,
        seed=int(rng.integers(2**32)),
    )


def _sample_neutral(rng: np.random.Generator) -> Rgb:
    """Light, mid or dark, and too pale to be taken for the colour of an object."""
    lightest, darkest, most_saturated = (
        (1.0, 0.8, 0.18),
        (0.8, 0.3, 0.1),
        (0.3, 0.0, 0.3),
    )[rng.choice(3, p=(0.4, 0.3, 0.3))]
    rgb = colorsys.hsv_to_rgb(
        rng.random(), rng.uniform(0.0, most_saturated), rng.uniform(darkest, lightest)
    )
    red, green, blue = (round(255 * channel) for channel in rgb)
    return red, green, blue


def _sample_objects(
    rng: np.random.Generator, n_objects: int, width_px: int, height_px: int
) -> tuple[SceneObject, ...]:
    objects: list[SceneObject] = []
    for x_px, y_px, radius_px in _sample_circles(rng, n_objects, width_px, height_px):
        # Kinds repeat more often than chance would have it, or plurals and counts would be rare.
        if objects and rng.random() < 0.3:
            twin = objects[rng.integers(len(objects))]
            shape, colour = twin.shape, twin.colour
        else:
            shape = SHAPES[rng.integers(len(SHAPES))]
            colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
        jitter = rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
        red, green, blue = np.clip(np.add(COLOURS[colour], jitter), 0, 255).tolist()
        objects.append(
            SceneObject(
                shape=shape,
                colour=colour,
                rgb=(red, green, blue),
                x_px=x_px,
                y_px=y_px,
                radius_px=radius_px,
                rotation_rad=0.0 if shape == "circle" else rng.uniform(-MAX_TILT_RAD, MAX_TILT_RAD),
            )
        )
    return tuple(objects)


def _sample_circles(
    rng: np.random.Generator, n_circles: int, width_px: int, height_px: int
) -> list[tuple[float, float, float]]:
    """(x_px, y_px, radius_px) of circles apart from each other and wholly inside; a crowd that
    does not fit is drawn again smaller, so this always ends."""
    shorter_px = min(width_px, height_px)
    smallest, largest = RADIUS_FRACTION
    while True:
        placed: list[tuple[float, float, float]] = []
        for _ in range(40 * n_circles):
            if len(placed) == n_circles:
                break
            radius = rng.uniform(smallest, largest) * shorter_px
            x, y = rng.uniform(radius, width_px - radius), rng.uniform(radius, height_px - radius)
            apart = radius + GAP_FRACTION * shorter_px
            if all(math.hypot(x - x2, y - y2) >= apart + r2 for x2, y2, r2 in placed):
                placed.append((x, y, radius))
        if len(placed) == n_circles:
            return placed
        largest = smallest + 0.9 * (largest - smallest)


# --- drawing ----------------------------------------------------------------------------------


def draw_scene(scene: Scene) -> np.ndarray:
    """(height, width, 3) uint8, the same for the same scene."""
    canvas = _background_image(scene.background, scene.width_px, scene.height_px)
    return _draw_on(canvas, scene.objects)


def draw_background(background: Background, width_px: int, height_px: int) -> np.ndarray:
    """(height, width, 3) uint8, without objects."""
    return np.array(_background_image(background, width_px, height_px))


def draw_objects(objects: Iterable[SceneObject], background: np.ndarray) -> np.ndarray:
    """The objects over a copy of `background` ((height, width, 3) uint8)."""
    return _draw_on(Image.fromarray(background), objects)


def _draw_on(canvas: Image.Image, objects: Iterable[SceneObject]) -> np.ndarray:
    for item in objects:
        left, top = math.floor(item.x_px - item.radius_px), math.floor(item.y_px - item.radius_px)
        side_px = math.ceil(2 * item.radius_px) + 1
        mask = Image.new("L", (side_px * _SUPERSAMPLING, side_px * _SUPERSAMPLING))
        # Pillow's whole numbers are pixel centres, ours are pixel corners: hence the half.
        x = (item.x_px - left) * _SUPERSAMPLING - 0.5
        y = (item.y_px - top) * _SUPERSAMPLING - 0.5
        radius = item.radius_px * _SUPERSAMPLING
        pen = ImageDraw.Draw(mask)
        if item.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        else:
            pen.polygon(_corners(item.shape, x, y, radius, item.rotation_rad), fill=255)
        canvas.paste(item.rgb, (left, top), mask.reduce(_SUPERSAMPLING))
    return np.array(canvas)


def _corners(
    shape: str, x: float, y: float, radius: float, rotation_rad: float
) -> list[tuple[float, float]]:
    n_corners, first_rad = {
        "square": (4, math.pi / 4),
        "triangle": (3, -math.pi / 2),
        "star": (10, -math.pi / 2),
    }[shape]
    corners = []
    for index in range(n_corners):
        reach = radius * (_STAR_INNER_RADIUS if shape == "star" and index % 2 else 1.0)
        angle = first_rad + rotation_rad + 2 * math.pi * index / n_corners
        corners.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return corners


def _background_image(background: Background, width_px: int, height_px: int) -> Image.Image:
    """Every pattern is one byte a pixel looked up in a palette: far cheaper than float pixels."""
    rng = np.random.default_rng(background.seed)
    size = (width_px, height_px)
    if background.kind == "plain":
        image = Image.new("RGB", size, background.first_rgb)
    else:
        if background.kind == "gradient":
            field = _ramp(background.angle_rad, width_px, height_px).tobytes()
        else:
            cells = rng.integers(256, size=rng.integers(3, 10, size=2), dtype=np.uint8)
            field = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).tobytes()
        steps = np.linspace(background.first_rgb, background.second_rgb, 256)
        image = _through_palette(field, size, steps)
    if background.grain_sigma > 0:
        n_channels = 3 if rng.random() < 0.5 else 1
        steps = 128 + rng.normal(scale=background.grain_sigma, size=(256, n_channels))
        steps = np.broadcast_to(steps, (256, 3))
        grain = _through_palette(rng.bytes(width_px * height_px), size, steps)
        image = ImageChops.add(image, grain, scale=1, offset=-128)
    return image


def _ramp(angle_rad: float, width_px: int, height_px: int) -> np.ndarray:
    """(height, width) uint8 rising from 0 to 255 along `angle_rad`."""
    across = np.linspace(0.0, math.cos(angle_rad), width_px, dtype=np.float32)
    down = np.linspace(0.0, math.sin(angle_rad), height_px, dtype=np.float32)
    lowest = across.min() + down.min()
    scale = 255 / (across.max() + down.max() - lowest)
    levels: np.ndarray = (across - lowest) * scale + (down * scale)[:, None]
    return levels.astype(np.uint8)


def _through_palette(indices: bytes, size: tuple[int, int], steps: np.ndarray) -> Image.Image:
    image = Image.frombytes("P", size, indices)
    image.putpalette(np.clip(np.rint(steps), 0, 255).astype(np.uint8).tobytes())
    return image.convert("RGB")


# --- labels and words -------------------------------------------------------------------------


def wordings(shape: str | None, colour: str | None) -> tuple[str, ...]:
    """The labels that select `shape` and `colour` (None: any), the plain plural first.

    Singular or plural, a label selects every object that matches.
    """
    nouns = (shape,) if shape else _ANY_NOUNS
    plurals = [f"{colour} {noun}s" if colour else f"{noun}s" for noun in nouns]
    singulars = [plural[:-1] for plural in plurals]
    named = plurals + singulars if shape or colour else plurals
    return (*named, *(f"the {name}" for name in named))


def parse_query(label: str) -> Query:
    """The query that a label means; raises InvalidRequest for one that is not of `wordings`."""
    words = label.lower().split()
    rest = words[1:] if words[:1] == ["the"] else words
    colour = rest[0] if rest and rest[0] in COLOURS else None
    noun = " ".join(rest[1:] if colour else rest).removesuffix("s")
    shape = noun if noun in SHAPES else None
    if " ".join(words) not in wordings(shape, colour):
        raise InvalidRequest(
            f"label {label!r} names no drawn object; use [the] [colour] noun with a noun of "
            f"{', '.join((*SHAPES, *_ANY_NOUNS))} and a colour of {', '.join(COLOURS)}"
        )
    return Query(label=label, shape=shape, colour=colour)


def all_queries() -> tuple[Query, ...]:
    """One query, in its plain plural, for each of the 35 selections that labels can make."""
    return tuple(
        Query(label=wordings(shape, colour)[0], shape=shape, colour=colour)
        for shape in (*SHAPES, None)
        for colour in (*COLOURS, None)
    )


def sample_queries(
    rng: np.random.Generator,
    objects: Sequence[Kind],
    n_queries: int,
    *,
    negative_rate: float = 0.2,
) -> tuple[Query, ...]:
    """Random queries, different selections as long as there are any left; each one matches
    nothing with probability `negative_rate`. Without objects none can match."""
    choices = all_queries()
    matched = np.array([any(query.matches(item) for item in objects) for query in choices])
    unused = np.ones(len(choices), dtype=bool)
    weights = np.array([_query_weight(query, objects) for query in choices])
    queries = []
    for _ in range(n_queries):
        wants_match = len(objects) > 0 and rng.random() >= negative_rate
        pool = matched == wants_match
        chances = weights * (pool & unused if (pool & unused).any() else pool)
        index = rng.choice(len(choices), p=chances / chances.sum())
        unused[index] = False
        shape, colour = choices[index].shape, choices[index].colour
        names = wordings(shape, colour)
        queries.append(Query(names[rng.integers(len(names))], shape, colour))
    return tuple(queries)


def _query_weight(query: Query, objects: Sequence[Kind]) -> float:
    """Exact kinds are asked for most; a kind whose shape and colour are both there, be it in one
    object or (the hard negative) in two, far more than one that is nowhere near."""
    if query.shape and query.colour:
        shape_is_there = any(item.shape == query.shape for item in objects)
        colour_is_there = any(item.colour == query.colour for item in objects)
        return 5.0 if shape_is_there and colour_is_there else 1.0
    return 2.0


def grid_place(x: float, y: float) -> str:
    """The name of the ninth of the canvas at (x, y), both 0-1: "top left" ... "bottom right"."""
    row, column = (min(2, max(0, int(3 * value))) for value in (y, x))
    return _PLACES[row][column]


def describe(scene: Scene) -> str:
    """A short caption: every object and its ninth of the canvas, row by row, left to right."""
    parts = []
    for item in scene.objects:
        x, y = item.x_px / scene.width_px, item.y_px / scene.height_px
        place = grid_place(x, y)
        article = "an" if item.colour[0] in "aeiou" else "a"
        where = f"{_PREPOSITIONS.get(place, 'at')} the {place}"
        phrase = f"{article} {item.colour} {item.shape} {where}"
        parts.append((_PLACE_ORDER.index(place), x, phrase))
    phrases = [phrase for _, _, phrase in sorted(parts)]
    if not phrases:
        return "An empty scene."
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))
    return f"{listed[0].upper()}{listed[1:]}."
