"""The jinja chat template against `molmo_core.prompts.render_chat`; both against golden text."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError

from molmo_core.prompts import (
    NO_PREFIX_STYLES,
    Subtitle,
    Turn,
    render_chat,
    render_subtitles,
    with_style,
)
from tests.support.reference_values import reference_processor

CASES = json.loads((Path(__file__).parents[1] / "golden" / "chat.json").read_text())["cases"]
TEMPLATE = files("molmo_hf").joinpath("chat_template.jinja").read_text()
TOKENIZER = reference_processor().tokenizer

texts = st.text(max_size=30) | st.sampled_from(
    ["{{ x }}", "{% if %}", "\n\n a \n", "<b>&amp;'\"", "Ünï ☃"]
)
styles = st.none() | st.sampled_from([*sorted(NO_PREFIX_STYLES)[::7], "vqa2", "user_qa", "x y"])
words = st.lists(st.tuples(texts, styles), min_size=1, max_size=3)
talks = st.lists(words, min_size=1, max_size=5)
spoken = st.lists(
    st.builds(
        Subtitle,
        start_s=st.floats(0, 100),
        end_s=st.floats(0, 100),
        text=st.text(alphabet="abc ?", max_size=8),
    ),
    max_size=2,
)


def render(messages: list[dict], *, open_answer: bool = True, **fields: object) -> str:
    return TOKENIZER.apply_chat_template(
        messages,
        chat_template=TEMPLATE,
        tokenize=False,
        add_generation_prompt=open_answer,
        **fields,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden_text(case):
    assert render(case["messages"]) == case["text"]


def messages_of(talk, media, *, plain: bool) -> tuple[list[dict], list[Turn]]:
    """Messages with the media spread over the user turns, and the same as turns."""
    messages, turns = [], []
    n_users = (len(talk) + 1) // 2
    for index, parts in enumerate(talk):
        role = "user" if index % 2 == 0 else "assistant"
        turns.append(Turn(role=role, text=" ".join(with_style(*part) for part in parts)))
        content = [{"type": "text", "text": text, "style": style} for text, style in parts]
        if role == "user":
            content[1:1] = [{"type": kind} for kind in media[index // 2 :: n_users]]
        is_plain = plain and all(part["type"] == "text" for part in content)
        messages.append({"role": role, "content": turns[-1].text if is_plain else content})
    return messages, turns


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    talk=talks,
    n_images=st.integers(0, 4),
    has_video=st.booleans(),
    subtitles=spoken,
    told_as=st.sampled_from(["message", "argument"]),
    system=st.just("") | texts,
    open_answer=st.booleans(),
    plain=st.booleans(),
)
def test_the_template_is_render_chat(
    talk, n_images, has_video, subtitles, told_as, system, open_answer, plain
):
    media = ["image"] * n_images + ["video"] * has_video
    messages, turns = messages_of(talk, media, plain=plain)
    block = render_subtitles(subtitles)
    opening = [{"role": "system", "content": system}] if system else []
    fields = {"subtitles": block} if told_as == "argument" else {}
    if told_as == "message" and block:
        opening.append({"role": "subtitle", "content": block})
    assert render([*opening, *messages], open_answer=open_answer, **fields) == render_chat(
        turns,
        n_images=n_images,
        n_videos=int(has_video),
        subtitles=block,
        system=system,
        open_answer=open_answer,
    )


def test_styles_without_prefix_are_the_same_in_both():
    for style in [*sorted(NO_PREFIX_STYLES), "vqa2", "video_point_ground_start_end", "chart_qa"]:
        content = [{"type": "text", "text": "Q", "style": style}]
        assert render([{"role": "user", "content": content}]) == render_chat(
            [Turn(role="user", text=with_style("Q", style))]
        )


@pytest.mark.parametrize(
    "roles", [["assistant"], ["user", "user"], ["user", "system"], ["system"], ["user", "tool"]]
)
def test_other_orders_of_roles_are_refused(roles):
    with pytest.raises(TemplateError, match="user"):
        render([{"role": role, "content": "x"} for role in roles])


def test_the_processor_renders_with_the_same_template():
    processor = reference_processor()
    processor.chat_template = TEMPLATE
    for case in CASES:
        found = processor.apply_chat_template(
            case["messages"], tokenize=False, add_generation_prompt=True
        )
        assert found == case["text"]
