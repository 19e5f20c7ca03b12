"""Molmo2's image processor: pictures in, crops and pooling index out.

Knows: kinds of picture a caller may hand over, the fields of a released
`preprocessor_config.json`. Does not know: the arithmetic (`molmo_core.images`), tokens, text.
Native to transformers 5, importable under 4.57; an export carries it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import ImagesKwargs

from .molmo2_errors import InvalidMedia
from .molmo2_images import ImageGeometry, prepare_image

BILINEAR = 2
_SETTINGS_OF_THE_LOADER = ("image_processor_type", "video_processor_type", "processor_class")


class Molmo2ImagesKwargs(ImagesKwargs, total=False):
    """Settings that a caller may replace while loading."""

    max_crops: int
    overlap_margins: list[int]
    patch_size: int
    pooling_size: list[int]


class Molmo2ImageProcessor(BaseImageProcessor):
    """Cuts pictures into crops as the released processor does, pixel for pixel."""

    model_input_names = [  # noqa: RUF012 - transformers' own form
        "pixel_values",
        "image_token_pooling",
        "image_grids",
        "image_num_crops",
    ]
    valid_kwargs = Molmo2ImagesKwargs

    def __init__(
        self,
        size: Mapping[str, int] | None = None,
        resample: int = BILINEAR,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        do_convert_rgb: bool = True,
        max_crops: int = 8,
        overlap_margins: Sequence[int] = (4, 4),
        patch_size: int = 14,
        pooling_size: Sequence[int] = (2, 2),
        **kwargs: Any,
    ) -> None:
        super().__init__(**without_loader_settings(kwargs))
        self.size = square_size(size)
        self.resample = resample
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.do_convert_rgb = do_convert_rgb
        self.max_crops = max_crops
        self.overlap_margins = list(overlap_margins)
        self.patch_size = patch_size
        self.pooling_size = list(pooling_size)
        require_trained_pixels(resample, self.image_mean, self.image_std)

    def geometry(self, max_crops: int | None = None) -> ImageGeometry:
        """How pictures are cut; the fields on tokens keep their defaults."""
        return ImageGeometry(
            crop_px=self.size["height"],
            patch_px=self.patch_size,
            pooling_hw=(self.pooling_size[0], self.pooling_size[1]),
            max_crops=max_crops or self.max_crops,
            overlap_margins=(self.overlap_margins[0], self.overlap_margins[1]),
        )

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        *,
        max_crops: int | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Cut one picture or (nested) lists of them.

        Returns `pixel_values` (crops, patches, patch² · 3), `image_token_pooling` (tokens, window;
        indices count per picture, −1 = none), `image_grids` (n, 4), `image_num_crops` (n,).
        Raises InvalidMedia for what is no picture.
        """
        geometry = self.geometry(max_crops)
        prepared = [prepare_image(rgb_pixels(image), geometry) for image in flat_images(images)]
        if not prepared:
            raise InvalidMedia("no image was given; pass at least one")
        arrays = {
            "pixel_values": np.concatenate([p.crops for p in prepared]),
            "image_token_pooling": np.concatenate([p.pooling for p in prepared]),
            "image_grids": np.array([p.grid for p in prepared], dtype=np.int64),
            "image_num_crops": np.array([len(p.crops) for p in prepared], dtype=np.int64),
        }
        return BatchFeature(arrays, tensor_type=return_tensors)


def flat_images(images: Any) -> Iterator[Any]:
    """Yield the pictures of nested lists in order; arrays of four axes are several pictures."""
    if images is None:
        return
    if isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4:
        for item in images:
            yield from flat_images(item)
    else:
        yield images


def rgb_pixels(image: Any) -> NDArray[np.uint8]:
    """(H, W, 3) bytes of a picture, upright, its alpha dropped, as in training.

    Takes a PIL image, an array or tensor of bytes (channels last or first), the bytes of a file,
    a path, or a URL (for trusted offline use: it is fetched).
    """
    if isinstance(image, bytes | str | PathLike):
        image = _open(image)
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise _unreadable(error) from error
        return np.asarray(upright)
    return _array_pixels(np.asarray(image))


def _open(source: bytes | str | PathLike[str]) -> Image.Image:
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
            return load_image(source)
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> InvalidMedia:
    return InvalidMedia(
        f"the image cannot be read ({type(error).__name__}); send a complete PNG, JPEG or WebP"
    )


def _array_pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    channels = (1, 3, 4)
    if array.ndim == 3 and array.shape[2] not in channels and array.shape[0] in channels:
        array = array.transpose(1, 2, 0)
    if (
        array.ndim != 3
        or array.shape[2] not in channels
        or array.dtype != np.uint8
        or 0 in array.shape
    ):
        raise InvalidMedia(
            f"got an array of shape {array.shape} and type {array.dtype} as image; allowed are "
            "bytes (uint8) of shape (height, width, 3); convert it, or pass a PIL image"
        )
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array[:, :, :3])


def square_size(size: Mapping[str, int] | None) -> dict[str, int]:
    """Side of a crop in pixels, in transformers' form. Raises ValueError unless it is square."""
    sides = {"height": 378, "width": 378} if size is None else dict(size)
    height, width = sides.get("height"), sides.get("width")
    if height is None or height != width:
        raise ValueError(f"size is {sides}; crops are square: give equal 'height' and 'width'")
    return {"height": height, "width": width}


def require_trained_pixels(resample: int, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse settings of the pixels that no Molmo2 was trained with."""
    if resample != BILINEAR or {*mean, *std} != {0.5}:
        raise ValueError(
            f"resample {resample}, image_mean {list(mean)}, image_std {list(std)}; Molmo2 takes "
            f"{BILINEAR} (bilinear) and 0.5 in every channel: correct the processor's settings"
        )


def without_loader_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' base class should see of the fields of a settings file."""
    return {k: v for k, v in settings.items() if k not in _SETTINGS_OF_THE_LOADER}

import typing

if typing.TYPE_CHECKING:  # never run: tells transformers 4.57 which files to copy
    from .molmo2_pixels import *  # noqa: F403
    from .molmo2_tokens import *  # noqa: F403
