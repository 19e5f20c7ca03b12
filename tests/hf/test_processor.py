"""The joint processor: BOS, padding, kinds of media, settings, and what it refuses."""

from __future__ import annotations

import io
from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_core.errors import InvalidMedia, InvalidRequest, TooManyMedia
from molmo_core.tokens import IMAGE, VIDEO
from molmo_core.videos import sample_times
from tests.support.conversations import draw_image, draw_video
from tests.support.reference_values import CASES, FOLDER, reference_processor

BOS, PAD = 2, 0
PATH = FOLDER / "media" / "image_57x43_0.png"


@pytest.fixture(scope="module")
def processor():
    loaded = reference_processor()
    loaded.chat_template = files("molmo_hf").joinpath("chat_template.jinja").read_text()
    return loaded


@pytest.fixture(scope="module")
def clip() -> bytes:
    return draw_video(Fraction(25), 60, 3, (96, 64))


def test_bos_stands_before_every_text(processor):
    rows = processor(text=["Hi", "<|im_end|>Hi", "<|im_start|>user\nx"])["input_ids"]
    assert [row[0] for row in rows] == [BOS] * 3
    assert rows[0] == rows[1], "a text that has its BOS gets no second one"


def test_bos_is_eos_where_the_tokenizer_has_none():
    processor = reference_processor()
    processor.tokenizer.bos_token = None
    assert processor.bos_token_id == processor.tokenizer.eos_token_id == BOS


def test_ragged_rows_are_padded_on_the_left(processor):
    texts = [CASES["text_only"]["text"], "Hi"]
    inputs = processor(text=texts, return_tensors="pt")
    long, short = processor(text=texts)["input_ids"]
    n_missing = len(long) - len(short)
    assert inputs["input_ids"].tolist() == [long, [PAD] * n_missing + short]
    assert inputs["attention_mask"][1].tolist() == [0] * n_missing + [1] * len(short)
    assert inputs["token_type_ids"].sum() == 0
    wide = processor(text="Hi", padding="max_length", max_length=9)
    assert len(wide["input_ids"][0]) == 9


def test_media_are_given_out_in_order_over_the_batch(processor):
    small, wide = np.zeros((50, 50, 3), np.uint8), np.zeros((300, 1000, 3), np.uint8)
    inputs = processor(text=[f"a{IMAGE}", "b", f"c{IMAGE}"], images=[[small], [], [wide]])
    one = [processor(text=t, images=i)["input_ids"][0] for t, i in
           ((f"a{IMAGE}", small), ("b", None), (f"c{IMAGE}", wide))]  # fmt: skip
    assert inputs["input_ids"] == one
    assert inputs["image_num_crops"].tolist() == [2, 5]


def test_every_kind_of_picture_gives_the_same_pixels(processor):
    opened = Image.open(PATH)
    array = np.asarray(opened.convert("RGB"))
    with_alpha = opened.convert("RGB")
    with_alpha.putalpha(7)
    expected = processor(text=IMAGE, images=opened)["pixel_values"]
    for image in (
        str(PATH), PATH, PATH.read_bytes(), array, torch.from_numpy(array.copy()),
        array.transpose(2, 0, 1), with_alpha, np.asarray(with_alpha), [[opened]], array[None],
    ):  # fmt: skip
        assert np.array_equal(processor(text=IMAGE, images=image)["pixel_values"], expected)


def test_rotated_photos_stand_upright(processor):
    picture, buffer = Image.open(io.BytesIO(draw_image(300, 100, 1))), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    picture.save(buffer, "PNG", exif=exif)
    found = processor(text=IMAGE, images=buffer.getvalue())
    turned = processor(text=IMAGE, images=picture.transpose(Image.Transpose.ROTATE_270))
    assert found["image_grids"].tolist() == turned["image_grids"].tolist()
    assert np.array_equal(found["pixel_values"], turned["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "CMYK", "RGBA"])
def test_pictures_of_every_mode(processor, mode):
    picture = Image.open(io.BytesIO(draw_image(60, 40, 2))).convert(mode)
    inputs = processor(text=IMAGE, images=picture)
    assert inputs["pixel_values"].shape == (2, 729, 588)
    assert np.abs(inputs["pixel_values"]).max() <= 1


def test_a_file_is_sampled_by_time(processor, clip, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    inputs = processor(text=VIDEO, videos=str(path), videos_kwargs={"return_metadata": True})
    times = sample_times(2.4, processor.video_geometry())
    assert times == [0.0, 0.5, 1.0, 1.5, 2.0, 2.4]
    assert inputs["video_metadata"] == [{"frame_times_s": times}]
    assert inputs["video_grids"].tolist() == [[6, 9, 9]]
    assert processor(text=VIDEO, videos=clip)["input_ids"] == inputs["input_ids"]


def test_a_chat_with_media_is_tokenized_as_its_text(processor, clip, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    for kind, media in (("image", {"images": str(PATH)}), ("video", {"videos": str(path)})):
        (source,) = media.values()
        content = [{"type": kind, "path": source}, {"type": "text", "text": "Where?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={},
        )
        expected = processor(text=text, return_tensors="pt", **media)
        assert inputs["input_ids"].tolist() == expected["input_ids"].tolist()
        assert inputs.keys() == expected.keys()


def test_frames_with_their_times_are_not_sampled_again(processor):
    frames = np.zeros((3, 20, 20, 3), np.uint8)
    for metadata in ({"frame_times_s": [0, 4, 9]}, {"fps": 0.5, "frames_indices": [0, 2, 4.5]}):
        inputs = processor(text=VIDEO, videos=[frames], video_metadata=[metadata])
        assert inputs["video_grids"].tolist() == [[3, 9, 9]]
    pair = processor(text=VIDEO, videos=[(frames, {"fps": 0.5, "frames_indices": [0, 2, 4.5]})])
    assert pair["input_ids"] == inputs["input_ids"]


def test_whole_clips_of_frames_are_sampled_by_time(processor):
    frames = np.stack([np.full((20, 20, 3), k, np.uint8) for k in range(61)])
    inputs = processor(
        text=VIDEO, videos=[frames], video_metadata=[{"fps": 30}],
        videos_kwargs={"return_metadata": True},
    )  # fmt: skip
    times = inputs["video_metadata"][0]["frame_times_s"]
    assert times == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 61 / 30])
    shown = np.rint((inputs["pixel_values_videos"][:, 0, 0] + 1) / 2 * 255).astype(int).tolist()
    assert shown == [0, 15, 30, 45, 60, 60]
    all_of_them = processor(
        text=VIDEO, videos=[frames], video_metadata=[{"fps": 30}], do_sample_frames=False
    )
    assert all_of_them["video_grids"].tolist() == [[61, 9, 9]]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"text": IMAGE}, InvalidRequest, "0 images for 1 placeholders"),
        ({"text": "x", "images": np.zeros((9, 9, 3), np.uint8)}, InvalidRequest, "1 images for 0"),
        ({"text": VIDEO * 2}, TooManyMedia, "2 videos in one text"),
        ({"text": []}, InvalidRequest, "no text"),
        ({"text": "x", "audio": 1}, InvalidRequest, "audio"),
        ({"text": "x", "images": [1], "videos": [1]}, InvalidRequest, "one kind at a time"),
        ({"text": IMAGE, "images": b"no picture"}, InvalidMedia, "cannot be read"),
        ({"text": IMAGE, "images": PATH.read_bytes()[:500]}, InvalidMedia, "cannot be read"),
        ({"text": IMAGE, "images": np.zeros((9, 9, 3))}, InvalidMedia, "float64"),
        ({"text": IMAGE, "images": np.zeros((0, 9, 3), np.uint8)}, InvalidMedia, "shape"),
        ({"text": IMAGE, "images": []}, InvalidMedia, "no image"),
        ({"text": VIDEO, "videos": b"no clip"}, InvalidMedia, "cannot be read"),
        ({"text": VIDEO, "videos": []}, InvalidMedia, "no video"),
        ({"text": VIDEO, "videos": 7}, InvalidMedia, "int as video"),
        ({"text": VIDEO, "videos": np.zeros((2, 9, 9, 3), np.uint8)}, InvalidRequest, "times"),
        (
            {"text": VIDEO, "videos": np.zeros((2, 9, 9, 3), np.uint8),
             "video_metadata": {"frame_times_s": [0]}}, InvalidMedia, "1 frames, 2 came",
        ),
        (
            {"text": VIDEO, "videos": np.zeros((2, 9, 9, 3), np.uint8),
             "video_metadata": {"duration": 3}}, InvalidMedia, "fps",
        ),
        ({"text": "many words", "max_length": 2}, InvalidRequest, "max_length is 2"),
        ({"text": "x", "max_pixels": 2}, TypeError, "max_pixels"),
    ],
)  # fmt: skip
def test_what_is_refused(processor, call, error, message):
    with pytest.raises(error, match=message):
        processor(**call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 378, "width": 300}}, "square"),
        ({"resample": 3}, "bilinear"),
        ({"image_mean": [0.48, 0.45, 0.4]}, "0.5 in every channel"),
    ],
)
def test_settings_that_no_molmo2_was_trained_with_are_refused(processor, settings, message):
    for part in (processor.image_processor, processor.video_processor):
        with pytest.raises(ValueError, match=message):
            type(part)(**settings)
