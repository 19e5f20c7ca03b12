"""The page: what stands on it is what the model gets, whatever the rows hold."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from molmo_client.__main__ import main
from molmo_core.errors import DataError
from molmo_hf.modeling_molmo2 import attention_mask
from molmo_training.data.example import Tokenized
from molmo_training.data.own.check import mixture_of
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.of_run import viewer_of_files
from molmo_training.data.own.page.mask import draw_mask
from molmo_training.data.own.page.page import Page, render_page
from molmo_training.data.own.page.tokens import Speller, sections_of
from molmo_training.data.own.table import open_tables
from molmo_training.data.own.view import Viewer
from molmo_training.data.packing import pack_rows
from molmo_training.recipes.finetune import finetune
from tests.demo.browsing import running_browser
from tests.training.own.conftest import WriteRows, view_of

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\u202e\"'{{ 7*7 }}\x07"
TREE = {
    "image": "a.png",
    "message_list": [
        {"label": "cats", "points": [[64, 48], [320, 240]]},
        {"messages": ["Why?", "Because.", "And café 日?", "So."]},
    ],
}
TRACKS = {
    "video": "clip.mp4",
    "label": "ball",
    "point_scale": 100,
    "tracks": [{"time_s": k / 2, "points": [{"id": "a", "x": 10 * k, "y": 50}]} for k in range(4)],
}


class Outline(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, css_class: str | None = None) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.tags
            if name == tag
            and (css_class is None or css_class in (attributes.get("class") or "").split())
        ]


def viewer(view: ModelView, *paths: Path) -> Viewer:
    tables = open_tables(list(paths))
    return viewer_of_files(tables, view, finetune().data, mixture_of(tables))


def arrays(view: ModelView, path: Path, index: int = 0) -> Tokenized:
    [table] = open_tables([path])
    return view.tokenizing(view.rows(table).example(index, np.random.default_rng(index)))


def test_every_token_is_shown_as_it_is(write_rows: WriteRows, view: ModelView) -> None:
    row = arrays(view, write_rows(TREE))
    shared, *branches = sections_of(row, Speller(view.tokenizer))
    assert (shared.number, [branch.number for branch in branches]) == (-1, [0, 1])
    assert shared.n_tokens + sum(b.n_tokens for b in branches) == len(row.input_ids)
    assert [block.name for block in shared.blocks if block.name] == [
        "<low_res_im_start> … 27 tokens",
        "<im_start> … 32 tokens",
    ]
    cells = [cell for branch in branches for block in branch.blocks for cell in block.cells]
    behind = slice(shared.n_tokens, None)
    assert [cell.token_id for cell in cells] == row.input_ids[behind].tolist()
    assert [int(cell.position) for cell in cells] == row.position_ids[behind].tolist()
    np.testing.assert_array_equal([cell.weight for cell in cells], row.weights[behind])
    assert max(cell.shade for cell in cells) == 1
    texts = "".join(cell.text for cell in cells)
    assert "<|im_start|>user↵" in texts
    assert "\\xe6\\x97\\xa5" in texts.replace(" ", "")
    learnt = [cell for cell in cells if cell.weight > 0]
    assert learnt[-1].target == "<|im_end|>"
    assert {cell.text for cell in cells if cell.is_special} == {"<|im_start|>", "<|im_end|>"}


def test_the_mask_is_the_models_own(write_rows: WriteRows, view: ModelView) -> None:
    path = write_rows(TREE, {"messages": ["q", "a"]})
    pack = pack_rows([arrays(view, path), arrays(view, path, 1)])
    drawn = draw_mask(pack, view.visual_ids)
    n = len(pack.input_ids)
    visual = torch.from_numpy(np.isin(pack.input_ids, sorted(view.visual_ids)))[None]
    sees = attention_mask(
        torch.ones(1, n, dtype=torch.bool), visual, torch.from_numpy(pack.subsegments)[None]
    )[0, 0].numpy()
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.url.partition(",")[2]))))
    assert drawn.n_shown == n
    np.testing.assert_array_equal(pixels[..., 3] > 0, sees)
    assert drawn.share == pytest.approx(sees.mean())
    assert [span.name for span in drawn.spans] == [
        "example 1, shared",
        "example 1, branch 1",
        "example 1, branch 2",
        "example 2, shared",
        "example 2, branch 1",
    ]
    assert draw_mask(pack, frozenset()).share < drawn.share


def test_marks_are_what_the_answers_say(write_rows: WriteRows, view: ModelView) -> None:
    page = viewer(view, write_rows(TREE, TRACKS)).examples(2, in_order=True)
    image, video = (card.media for card in page.cards)
    assert {(mark.x, mark.y) for mark in image.pictures[0].marks} == {(100, 100), (500, 500)}
    assert [legend.text for legend in image.legends] == ["cats (2 points)"]
    assert [legend.text for legend in video.legends] == ["ball (1 track)"]
    with_marks = [frame for frame in video.pictures if frame.marks]
    assert [frame.caption for frame in with_marks] == ["0.0 s", "0.5 s", "1.0 s", "1.5 s"]
    assert with_marks[3].marks[0].trail == ((0, 500), (100, 500), (200, 500), (300, 500))
    shown = Outline(render_page(page))
    assert len(shown.all("circle", "mark")) == 2 + 4
    assert len(shown.all("polyline")) == 3


def test_crops_are_those_of_the_tower(write_rows: WriteRows, view: ModelView) -> None:
    page = viewer(view, write_rows(TREE)).examples(1, in_order=True)
    [url] = page.cards[0].row.crops
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert pixels.shape == (126, 126, 3)
    assert abs(int(pixels[63, 63, 0]) - 240) < 12


def test_text_of_rows_is_no_html(write_rows: WriteRows, view: ModelView, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": 'a"><svg onload=alert(3)>.png', "label": HOSTILE, "points": [[1, 2]]},
        {"messages": [HOSTILE, HOSTILE], "metadata": HOSTILE},
        {"image": "a.png", HOSTILE: 1},
    ]
    path = write_rows(*rows, name="<u>&.jsonl")
    (tmp_path / "b.jsonl").write_text("{" + HOSTILE, encoding="utf-8")
    html = render_page(viewer(view, path, tmp_path / "b.jsonl").examples(4, in_order=True))
    shown = Outline(html)
    assert not {"script", "iframe", "object", "link", "u", "img src=x"} & {t for t, _ in shown.tags}
    assert all(not name.startswith("on") for _, attributes in shown.tags for name in attributes)
    sources = [a[k] for _, a in shown.tags for k in ("src", "href") if a.get(k)]
    assert sources
    assert all(source and source.startswith("data:image/") for source in sources)
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in shown.text
    assert "{{ 7*7 }}" in shown.text
    [policy] = [a["content"] for a in shown.all("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert shown.text.count("left out: ") == 2


def test_packs_show_each_example_once(write_rows: WriteRows) -> None:
    points = [{"image": f"{k}.png", "label": f"cat {k}", "points": [[k, k]]} for k in range(30)]
    first = write_rows(*points, {"image": "0.png", "lable": "x"})
    second = write_rows({"messages": ["q", "a"]}, TRACKS, name="more.jsonl")
    page = viewer(view_of(n_tokens=900, n_crops=12), first, second).packs(2)
    for pack in page.packs:
        assert max(pack.n_tokens / 900, pack.n_crops / 12) > 0.9
        assert pack.n_tokens == sum(card.row.n_tokens for card in pack.cards) <= 900
        assert pack.n_crops == sum(card.row.n_crops for card in pack.cards) <= 12
    names = [card.where for pack in page.packs for card in pack.cards]
    assert {name.split(":")[0] for name in names} == {"rows.jsonl", "more.jsonl"}
    assert any("unknown field 'lable'" in bad for pack in page.packs for bad in pack.left_out)
    assert dict((name, n) for name, n, _ in page.shares) == {"rows": 31, "more": 2}
    assert len(Outline(render_page(page)).all("section", "pack")) == 2
    with pytest.raises(DataError, match="were bad"):
        viewer(view_of(n_tokens=10, n_crops=1), first).packs(1)


def test_a_recipe_is_shown_with_its_mixture(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert main(["data", "view", "--recipe", "sft-debug", "--n", "6", "--out", str(out)]) == 0
    shown = Outline(out.read_text(encoding="utf-8"))
    assert len(shown.all("article", "card")) == 6
    assert "left out" not in shown.text
    shares = re.findall(r"(drawn_\w+)200,000([\d.]+) %", shown.text)
    assert len(shares) > 10
    assert sum(float(share) for _, share in shares) == pytest.approx(100, abs=1)


def test_examples_are_those_of_the_run(write_rows: WriteRows, view: ModelView) -> None:
    path = write_rows(*[{"messages": ["q", f"a{k}"]} for k in range(20)])

    def places(page: Page) -> list[str]:
        return [card.where for card in page.cards]

    drawn = viewer(view, path)
    assert sorted(places(drawn.examples(20))) == sorted(f"rows.jsonl:{k + 1}" for k in range(20))
    assert places(drawn.examples(20)) != [f"rows.jsonl:{k + 1}" for k in range(20)]
    assert places(drawn.examples(3, start=5)) == places(drawn.examples(20))[5:8]
    assert places(drawn.examples(9, start=18, in_order=True)) == ["rows.jsonl:19", "rows.jsonl:20"]
    with pytest.raises(DataError, match="there is no row 20, the files have 20"):
        drawn.examples(1, start=20, in_order=True)


def test_the_page_in_a_browser(write_rows: WriteRows, tmp_path: Path) -> None:
    """Made by the command; told apart in light and dark, its switches work, nothing overflows."""
    out = tmp_path / "page.html"
    path = write_rows(TREE, TRACKS, {"messages": ["q", HOSTILE]})
    assert main(["data", "view", str(path), "--in-order", "--out", str(out)]) == 0
    with running_browser() as browser:
        page = browser.new_page(viewport={"width": 900, "height": 700}, color_scheme="dark")
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(out.as_uri())
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.emulate_media(color_scheme="light")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
        sizes = "[...document.querySelectorAll('image')].every(i => i.getBBox().width > 10)"
        assert page.evaluate(sizes)
        assert page.evaluate("document.documentElement.scrollWidth") <= 900
        for switch, shown in (("ids", "id"), ("targets", "to"), ("positions", "at")):
            assert not page.is_visible(f".t.learnt .{shown} >> nth=0")
            page.check(f"#{switch}")
            assert page.is_visible(f".t.learnt .{shown} >> nth=0")
        assert page.is_visible("circle.mark >> nth=0")
        page.uncheck("#marks")
        assert not page.is_visible("circle.mark >> nth=0")
        assert page.locator(".card").count() == 3
        assert said == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packed", "--in-order"], "leave out --in-order"),
        (["--recipe", "sft-debug"], "give FILES, or --recipe NAME"),
        (["--out", "{folder}/no/page.html"], "cannot be written"),
    ],
)
def test_wrong_options_are_told(
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    given = [option.format(folder=tmp_path) for option in options]
    out = [] if "--out" in given else ["--out", str(tmp_path / "page.html")]
    path = str(write_rows({"messages": ["q", "a"]}))
    assert main(["data", "view", path, *given, *out]) == 1
    assert message in capsys.readouterr().err
    assert not re.search(r"page\.html$", capsys.readouterr().out)
    assert json.loads(Path(path).read_text())
