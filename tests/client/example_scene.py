"""The bundled example picture: what is on it, and the command that draws it again.

    python -m tests.client.example_scene

writes clients/molmo_client/examples/shapes.png.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from PIL import Image

from molmo_core.scenes import COLOURS, Background, Scene, SceneObject, draw_scene

_PLACED = (  # shape, colour, x_px, y_px, radius_px, tilt in rad
    ("circle", "red", 104.0, 96.0, 38.0, 0.0),
    ("star", "blue", 352.0, 84.0, 40.0, 0.1),
    ("square", "green", 232.0, 200.0, 38.0, -0.1),
    ("star", "blue", 396.0, 268.0, 40.0, -0.15),
)
EXAMPLE_SCENE = Scene(
    width_px=480,
    height_px=360,
    background=Background(
        kind="plain",
        first_rgb=(236, 234, 230),
        second_rgb=(236, 234, 230),
        angle_rad=0.0,
        grain_sigma=0.0,
        seed=20261123,
    ),
    objects=tuple(
        SceneObject(
            shape=shape,
            colour=colour,
            rgb=COLOURS[colour],
            x_px=x_px,
            y_px=y_px,
            radius_px=radius_px,
            rotation_rad=tilt_rad,
        )
        for shape, colour, x_px, y_px, radius_px, tilt_rad in _PLACED
    ),
)


def main() -> None:
    with as_file(files("molmo_client")) as package:
        Image.fromarray(draw_scene(EXAMPLE_SCENE)).save(
            package / "examples" / "shapes.png", optimize=True
        )


if __name__ == "__main__":
    main()
