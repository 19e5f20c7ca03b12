"""One HTML file of examples or packs: everything inside, no script, all text escaped.

Knows: which parts a page has, its template. Does not know: how examples are drawn or read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np

from molmo_core.prompts import Turn
from molmo_training.data.example import Example, Tokenized
from molmo_training.data.own.model_view import ModelView
from molmo_training.data.own.page.mask import MaskPicture, draw_mask
from molmo_training.data.own.page.pictures import ShownMedia, show_crops, show_media
from molmo_training.data.own.page.tokens import Section, Speller, sections_of
from molmo_training.data.packing import pack_rows

_LONGEST_SOURCE_CHARS = 20_000
NO_MEDIA = ShownMedia()


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """An example as arrays, ready to be read."""

    n_tokens: int
    n_learnt: int
    n_crops: int
    weight: float
    sections: tuple[Section, ...]
    mask: MaskPicture | None
    crops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A row of a file; without `row` it is left out, and `fault` says why."""

    anchor: str
    where: str
    source: str
    fault: str = ""
    styles: tuple[str, ...] = ()
    branches: tuple[tuple[Turn, ...], ...] = ()
    media: ShownMedia = NO_MEDIA
    row: ShownRow | None = None


@dataclass(frozen=True, kw_only=True)
class PackCard:
    cards: tuple[Card, ...]
    n_tokens: int
    n_crops: int
    mask: MaskPicture
    left_out: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    model: str
    shares: tuple[tuple[str, int, float], ...]
    n_tokens: int
    n_crops: int
    cards: tuple[Card, ...] = ()
    packs: tuple[PackCard, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Showing:
    """Makes cards of examples as a model sees them."""

    view: ModelView
    speller: Speller

    def card(
        self,
        where: str,
        source: Any,
        *,
        anchor: str,
        example: Example,
        row: Tokenized,
        styles: Sequence[str] = (),
        has_mask: bool = True,
    ) -> Card:
        """Raises InvalidMedia where pixels cannot be opened."""
        tokenizing = self.view.tokenizing
        geometry = tokenizing.videos if len(example.frames) else tokenizing.images
        return Card(
            anchor=anchor,
            where=where,
            source=source_text(source),
            styles=tuple(styles),
            branches=tuple(branch.turns for branch in example.branches),
            media=show_media(example, tokenizing),
            row=ShownRow(
                n_tokens=len(row.input_ids),
                n_learnt=int((row.weights > 0).sum()),
                n_crops=len(row.crops),
                weight=float(row.weights.sum()),
                sections=sections_of(row, self.speller),
                mask=draw_mask(row, self.view.visual_ids) if has_mask else None,
                crops=show_crops(row, geometry.patch_px),
            ),
        )

    def pack(
        self, cards: Sequence[Card], rows: Sequence[Tokenized], left_out: Sequence[str]
    ) -> PackCard:
        packed = pack_rows(rows)
        return PackCard(
            cards=tuple(cards),
            n_tokens=len(packed.input_ids),
            n_crops=len(packed.crops),
            mask=draw_mask(packed, self.view.visual_ids),
            left_out=tuple(left_out),
        )


def source_text(record: Any) -> str:
    """What a file says of a row, as JSON; bytes by their number."""
    text = json.dumps(record, ensure_ascii=False, indent=2, default=_plain)
    if len(text) > _LONGEST_SOURCE_CHARS:
        text = f"{text[:_LONGEST_SOURCE_CHARS]}\n… {len(text) - _LONGEST_SOURCE_CHARS:,} more"
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return f"pixels {value.shape}" if isinstance(value, np.ndarray) else str(value)


def render_page(page: Page) -> str:
    """The file's text."""
    folder = files("molmo_training.data.own.page")
    template = _environment().from_string((folder / "page.html.jinja").read_text(encoding="utf-8"))
    css = (folder / "page.css").read_text(encoding="utf-8")
    html = template.render(page=page, css=css)
    return html.encode("utf-8", "replace").decode("utf-8")  # a text may hold half a surrogate


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
