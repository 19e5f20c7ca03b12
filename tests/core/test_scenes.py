"""The drawn scenes keep their promises: limits, pixels, labels and words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from molmo_core.errors import InvalidRequest
from molmo_core.scenes import (
    COLOUR_JITTER,
    COLOURS,
    SHAPES,
    Background,
    Query,
    Scene,
    SceneObject,
    all_queries,
    describe,
    draw_background,
    draw_objects,
    draw_scene,
    grid_place,
    parse_query,
    sample_queries,
    sample_scene,
    wordings,
)

WHITE = Background(
    kind="plain",
    first_rgb=(255, 255, 255),
    second_rgb=(255, 255, 255),
    angle_rad=0.0,
    grain_sigma=0.0,
    seed=0,
)


def thing(shape: str, colour: str, x_px: float = 50.0, y_px: float = 50.0) -> SceneObject:
    return SceneObject(
        shape=shape, colour=colour, rgb=COLOURS[colour], x_px=x_px, y_px=y_px, radius_px=20.0
    )


def scene_of(*objects: SceneObject) -> Scene:
    return Scene(width_px=300, height_px=300, background=WHITE, objects=objects)


def many_scenes(n_scenes: int, **limits: int) -> list[Scene]:
    rng = np.random.default_rng(20)
    return [sample_scene(rng, **limits) for _ in range(n_scenes)]


def test_canvases_span_the_whole_range_and_no_more():
    sizes = np.array([(s.width_px, s.height_px) for s in many_scenes(2000)])
    assert sizes.min() >= 160
    assert sizes.max() <= 1024
    assert sizes.max(axis=0).min() > 1000  # both ways round
    aspects = sizes[:, 0] / sizes[:, 1]
    assert aspects.min() >= 0.5
    assert aspects.max() <= 2.0
    assert aspects.min() < 0.6
    assert aspects.max() > 1.7
    longer = sizes.max(axis=1)
    assert 0.4 < np.mean(longer < math.sqrt(160 * 1024)) < 0.6  # log-uniform


def test_objects_are_inside_apart_and_of_the_promised_size():
    for scene in many_scenes(500):
        shorter_px = min(scene.width_px, scene.height_px)
        for item in scene.objects:
            assert 0.04 <= item.radius_px / shorter_px <= 0.12
            assert item.radius_px <= item.x_px <= scene.width_px - item.radius_px
            assert item.radius_px <= item.y_px <= scene.height_px - item.radius_px
            assert abs(item.rotation_rad) <= math.radians(20)
            assert np.abs(np.subtract(item.rgb, COLOURS[item.colour])).max() <= COLOUR_JITTER
        for one, other in itertools.combinations(scene.objects, 2):
            distance_px = math.hypot(one.x_px - other.x_px, one.y_px - other.y_px)
            assert distance_px >= one.radius_px + other.radius_px + 0.02 * shorter_px - 1e-9


def test_every_kind_and_every_number_of_objects_occurs():
    scenes = many_scenes(2000)
    counts = np.bincount([len(scene.objects) for scene in scenes], minlength=7)
    assert len(counts) == 7
    assert 50 <= counts[0] <= 160
    assert counts[1:].min() > 230
    kinds = {(item.shape, item.colour) for scene in scenes for item in scene.objects}
    assert kinds == set(itertools.product(SHAPES, COLOURS))
    repeats = [
        len({(item.shape, item.colour) for item in scene.objects}) < len(scene.objects)
        for scene in scenes
    ]
    assert np.mean(repeats) > 0.4


def test_the_caller_can_fix_the_number_and_the_canvas():
    scenes = many_scenes(50, n_objects=6, min_side_px=64, max_side_px=97, side_multiple_px=4)
    assert {len(scene.objects) for scene in scenes} == {6}
    sides = {side for scene in scenes for side in (scene.width_px, scene.height_px)}
    assert sides <= set(range(64, 97, 4))
    assert len(sides) > 4


def test_impossible_limits_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="n_objects is 17, a scene holds 0 to 16"):
        sample_scene(rng, n_objects=17)
    with pytest.raises(ValueError, match="sides of 160 to 100 px"):
        sample_scene(rng, max_side_px=100)


def test_the_pixels_of_every_object_have_its_colour():
    for scene in many_scenes(150, max_side_px=500):
        pixels = draw_scene(scene)
        assert pixels.shape == (scene.height_px, scene.width_px, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.writeable
        for item in scene.objects:
            assert tuple(pixels[int(item.y_px), int(item.x_px)]) == item.rgb
        background = draw_background(scene.background, scene.width_px, scene.height_px)
        y_px, x_px = np.nonzero((pixels != background).any(axis=2))
        inside = np.zeros(len(x_px), dtype=bool)
        for item in scene.objects:
            distance_px = np.hypot(x_px + 0.5 - item.x_px, y_px + 0.5 - item.y_px)
            inside |= distance_px <= item.radius_px + 1
        assert inside.all()


@pytest.mark.parametrize(
    ("shape", "share_of_circle"),
    [
        ("circle", 1.0),
        ("square", 2 / math.pi),
        ("triangle", 3 * math.sqrt(3) / 4 / math.pi),
        ("star", 5 * 0.42 * math.sin(math.pi / 5) / math.pi),
    ],
)
def test_shapes_have_their_exact_area_and_centre(shape: str, share_of_circle: float):
    item = SceneObject(
        shape=shape, colour="red", rgb=(0, 0, 0), x_px=101.3, y_px=97.8, radius_px=60.0
    )
    darkness = (255.0 - draw_scene(scene_of(item))[..., 0]) / 255
    assert darkness.sum() == pytest.approx(share_of_circle * math.pi * 60**2, rel=0.01)
    y_px, x_px = np.indices(darkness.shape) + 0.5
    assert (darkness * x_px).sum() / darkness.sum() == pytest.approx(101.3, abs=0.2)
    assert (darkness * y_px).sum() / darkness.sum() == pytest.approx(97.8, abs=0.2)


def test_backgrounds_keep_away_from_the_colours_of_objects():
    kinds = set()
    for scene in many_scenes(300, n_objects=0, max_side_px=240):
        background = scene.background
        kinds.add((background.kind, background.grain_sigma > 0))
        pixels = draw_scene(scene).reshape(-1, 3).astype(float)
        for rgb in COLOURS.values():
            distances = np.linalg.norm(pixels - rgb, axis=1)
            # Single grains may come near a colour; a patch of them does not.
            assert np.percentile(distances, 0 if background.grain_sigma == 0 else 5) > 60
    assert kinds == set(itertools.product(("plain", "gradient", "blotches"), (False, True)))


def test_a_gradient_runs_along_its_angle():
    down = Background(
        kind="gradient",
        first_rgb=(0, 0, 0),
        second_rgb=(200, 100, 50),
        angle_rad=math.pi / 2,
        grain_sigma=0.0,
        seed=0,
    )
    pixels = draw_background(down, 40, 80)
    assert pixels[0].max() == 0
    assert np.abs(pixels[-1].astype(int) - (200, 100, 50)).max() <= 1
    assert (np.diff(pixels[:, 7, 0].astype(int)) >= 0).all()


def test_grain_has_the_strength_it_says():
    grainy = Background(
        kind="plain",
        first_rgb=(120, 120, 120),
        second_rgb=(120, 120, 120),
        angle_rad=0.0,
        grain_sigma=12.0,
        seed=5,
    )
    pixels = draw_background(grainy, 300, 200)
    assert pixels.std() == pytest.approx(12, rel=0.15)
    assert pixels.mean() == pytest.approx(120, abs=2.5)


def test_a_seed_fixes_scene_pixels_and_queries():
    first, again, other = (
        sample_scene(np.random.default_rng(seed), n_objects=4) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    np.testing.assert_array_equal(draw_scene(first), draw_scene(again))
    queries = [sample_queries(np.random.default_rng(1), first.objects, 6) for _ in range(2)]
    assert queries[0] == queries[1]


def test_drawing_leaves_the_given_background_alone():
    background = np.full((100, 100, 3), 200, dtype=np.uint8)
    drawn = draw_objects([thing("circle", "red")], background)
    assert tuple(drawn[50, 50]) == COLOURS["red"]
    assert (background == 200).all()


@pytest.mark.parametrize(
    ("label", "shape", "colour"),
    [
        ("red circle", "circle", "red"),
        ("red circles", "circle", "red"),
        ("the red circle", "circle", "red"),
        ("star", "star", None),
        ("stars", "star", None),
        ("The  Stars", "star", None),
        ("blue things", None, "blue"),
        ("blue objects", None, "blue"),
        ("the orange shape", None, "orange"),
        ("objects", None, None),
        ("shapes", None, None),
    ],
)
def test_labels_are_understood(label: str, shape: str | None, colour: str | None):
    assert parse_query(label) == Query(label, shape, colour)


@pytest.mark.parametrize(
    "label", ["", "the", "pink circle", "red", "circle red", "starss", "red big star", "ducks"]
)
def test_other_labels_are_refused_with_what_is_allowed(label: str):
    with pytest.raises(InvalidRequest, match="circle, square, triangle, star"):
        parse_query(label)


def test_every_wording_of_every_selection_comes_back():
    queries = all_queries()
    assert len({(query.shape, query.colour) for query in queries}) == 35
    labels = [name for query in queries for name in wordings(query.shape, query.colour)]
    assert len(labels) == len(set(labels))
    for query in queries:
        assert query.label == wordings(query.shape, query.colour)[0]
        for name in wordings(query.shape, query.colour):
            assert parse_query(name) == Query(name, query.shape, query.colour)


def test_queries_match_what_they_name():
    red_circle, red_star = thing("circle", "red"), thing("star", "red")
    assert parse_query("red circles").matches(red_circle)
    assert not parse_query("red circles").matches(red_star)
    assert not parse_query("blue circles").matches(red_circle)
    assert parse_query("red things").matches(red_star)
    assert not parse_query("circles").matches(red_star)
    assert parse_query("objects").matches(red_star)


def test_sampled_queries_hold_the_asked_share_of_negatives():
    rng = np.random.default_rng(8)
    n_negative = n_hard = n_queries = 0
    for scene in many_scenes(500):
        if not scene.objects:
            continue
        queries = sample_queries(rng, scene.objects, 4, negative_rate=0.2)
        assert len({(query.shape, query.colour) for query in queries}) == 4
        for query in queries:
            assert parse_query(query.label) == query
            n_queries += 1
            if not any(query.matches(item) for item in scene.objects):
                n_negative += 1
                shapes = {item.shape for item in scene.objects}
                colours = {item.colour for item in scene.objects}
                n_hard += query.shape in shapes and query.colour in colours
    assert 0.16 < n_negative / n_queries < 0.24
    assert n_hard / n_negative > 0.2


def test_an_empty_scene_gets_only_negatives_and_many_queries_may_repeat():
    rng = np.random.default_rng(0)
    assert len(sample_queries(rng, (), 40)) == 40
    item = thing("star", "blue")
    queries = sample_queries(rng, [item], 40, negative_rate=0.0)
    assert all(query.matches(item) for query in queries)
    assert len({(query.shape, query.colour) for query in queries}) == 4


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [
        (0.0, 0.0, "top left"),
        (0.5, 0.32, "top"),
        (0.34, 0.34, "centre"),
        (0.1, 0.5, "left"),
        (0.67, 0.5, "right"),
        (1.0, 1.0, "bottom right"),
        (0.5, 0.9, "bottom"),
    ],
)
def test_the_canvas_has_nine_places(x: float, y: float, place: str):
    assert grid_place(x, y) == place


def test_captions_name_objects_in_reading_order():
    assert describe(scene_of()) == "An empty scene."
    red, blue = thing("circle", "red", 40, 40), thing("star", "blue", 150, 150)
    expected = "A red circle at the top left and a blue star in the centre."
    assert describe(scene_of(blue, red)) == expected
    orange, green = thing("square", "orange", 160, 130), thing("triangle", "green", 20, 160)
    assert describe(scene_of(red, orange, blue, green)) == (
        "A red circle at the top left, a green triangle on the left, a blue star in the centre "
        "and an orange square in the centre."
    )
    assert describe(scene_of(orange)) == "An orange square in the centre."
