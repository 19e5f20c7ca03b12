"""The mixtures of the three stages as data: groups, rates, caps, loss weights.

The released model's second and third stage have one mixture. Rates of groups need not sum to 1.
Names of the list of Molmo2's training that no dataset has yet count as missing.
Knows: which dataset is drawn how often in which stage, and how it counts in the loss. Does not
know: rows, schedules. Source: spec of Molmo2's training, sections 6.7 to 6.9.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from molmo_core.errors import DataError
from molmo_training.data.formatting import FormatSettings, Formatter, LossWeight
from molmo_training.data.lanes import RowSource
from molmo_training.data.mixture import Group, Part
from molmo_training.data.rows import FormattedRows
from molmo_training.data.sampling import P_HIGH_RES_POINTING, MediaSettings
from molmo_training.data.tokenize import Tokenizing
from molmo_training.datasets import open_dataset

logger = logging.getLogger(__name__)

AS_ALL = LossWeight()
POINTING = LossWeight(factor=0.2, root_subsegments=False, root_length=False)
VIDEO_CAPTIONS = LossWeight(factor=0.1, root_subsegments=False, root_length=False)


@dataclass(frozen=True, kw_only=True)
class Use:
    """A dataset in a mixture: how it is drawn (`part`) and how its answers count."""

    part: Part
    loss: LossWeight = AS_ALL
    p_high_res: float | None = None
    """In place of the media settings'."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Groups of uses with the rate of each group."""

    name: str
    groups: tuple[tuple[str, float, tuple[Use, ...]], ...]

    def uses(self) -> Iterator[Use]:
        for _, _, uses in self.groups:
            yield from uses


@dataclass(frozen=True, kw_only=True)
class OpenedMixture:
    """What of a mixture is on this machine, for `StreamConfig` and `PackedStream`."""

    group: Group
    sources: dict[str, RowSource]
    missing: tuple[str, ...]
    """Why each of the others is left out."""


def open_mixture(
    mixture: Mixture,
    root: Path,
    *,
    format_settings: FormatSettings,
    tokenizing: Tokenizing,
    media: MediaSettings,
    split: str = "train",
    needs_all: bool = False,
) -> OpenedMixture:
    """Open what is there and log what is not; groups of which nothing is there are left out.

    Raises DataError when nothing is there, or with `needs_all` when anything is missing.
    """
    sources: dict[str, RowSource] = {}
    missing: list[str] = []
    for use in mixture.uses():
        name = use.part.dataset
        try:
            table = open_dataset(name, root, split)
        except DataError as error:
            missing.append(error.message)
            continue
        p_high_res = media.p_high_res if use.p_high_res is None else use.p_high_res
        sources[name] = FormattedRows(
            table=table,
            formatter=Formatter(settings=format_settings, weight=use.loss),
            tokenizing=tokenizing,
            media=replace(media, p_high_res=p_high_res),
        )
    if missing and (needs_all or not sources):
        raise DataError(
            f"{len(missing)} of the {len(missing) + len(sources)} datasets of the mixture "
            f"{mixture.name} are missing: {' | '.join(missing)}"
        )
    for reason in missing:
        logger.warning("left out of the mixture %s: %s", mixture.name, reason)
    groups = []
    for name, rate, uses in mixture.groups:
        parts = tuple(use.part for use in uses if use.part.dataset in sources)
        if parts:
            groups.append(Group(name=name, rate=rate, parts=parts))
    group = Group(name=mixture.name, parts=tuple(groups))
    return OpenedMixture(group=group, sources=sources, missing=tuple(missing))


Named = str | tuple[str, int]


def _uses(
    *names: Named,
    loss: LossWeight = AS_ALL,
    weight: float = 1.0,
    rate: float | None = None,
    p_high_res: float | None = None,
) -> tuple[Use, ...]:
    """Datasets drawn by the root of their size, or of the number given with the name."""
    uses = []
    for named in names:
        name, cap = (named, None) if isinstance(named, str) else named
        part = Part(dataset=name, as_size=cap, weight=weight, rate=rate)
        uses.append(Use(part=part, loss=loss, p_high_res=p_high_res))
    return tuple(uses)


PRETRAIN_MIXTURE = Mixture(
    name="pretrain",
    groups=(
        ("captions", 0.6, _uses("pixmo_cap_with_transcripts")),
        (
            "pointing",
            0.3,
            _uses(
                "pixmo_points_train",
                "pixmo_count_train",
                "pixmo_points_high_freq_train",
                "cosyn_point",
            ),
        ),
        ("nlp", 0.1, _uses("tulu4_max_2304")),
    ),
)

_DEMO = (
    *_uses(
        "pixmo_ask_model_anything",
        ("pixmo_cap", 100_000),
        "pixmo_cap_qa_as_user_qa",
        "pixmo_multi_image_qa_multi_only_max5",
        "molmo2_human_qa",
    ),
    *_uses("vixmo3_top_level_captions_min_3", loss=VIDEO_CAPTIONS, weight=1.5),
)
_COSYN = ("chart", "chemical", "diagram", "math", "music", "table")
_COSYN_DOCUMENTS = ("chart", "chemical", "diagram", "doc", "music", "table")
_IMAGE_ACADEMIC = _uses(
    "coco_2014_vqa_multi",
    "text_vqa",
    "okvqa",
    "chart_qa_weighted",
    "doc_qa",
    "info_qa",
    "ai2_diagram_v2_mix_transparent",
    "a_okvqa_mc",
    "a_okvqa_da",
    "science_qa_img",
    "tabwmp_da",
    "st_qa",
    "tally_qa",
    "mantis_instruct_llava_665k_multi_multi_only",
    "mantis_instruct_nlvr2_multi_only",
    "mantis_instruct_spot-the-diff_multi_only",
    ("dv_qa", 10_000),
    ("figure_qa", 10_000),
    ("plot_qa", 20_000),
    *(f"cosyn_{kind}_exp" for kind in _COSYN),
    "cosyn_document",
    *(f"cosyn_multidoc_{kind}_exp" for kind in _COSYN_DOCUMENTS),
)
_VIDEO_ACADEMIC = _uses(
    ("tgif", 60_000),
    ("tvqa_with_sub", 60_000),
    ("paxion", 60_000),
    "llava_video_mc_academic",
    "llava_video_oe_academic",
    "perception_test",
    "nextqa_mc",
    "news_video_qa_filtered",
    "how2qa",
    "sutd_trafficqa",
    "social_iq2",
    "sportsqa_oe",
    "cinepile_with_sub",
    "clevrer",
    "funqa",
    "star",
    "intent_qa",
    "video_localized_narratives",
    "road_text_vqa",
    "countix_oe",
    "camerabench_qa",
    "motionbench_train",
    ("moments_in_time_qa", 60_000),
    ("kinetics_qa", 60_000),
    "charades_sta_all_qa",
    "coin_all_qa",
    "youcook2_all_qa",
    "activitynet_all_qa",
    "ego4d_all",
    "epic_kitchens_qa",
    "video_localized_narratives_caption",
    "qv_highlights",
    # The configuration of the reference names two that it has not; these are meant.
    "molmo2_syn_captions_qa",
    "molmo2_syn_captions_subtitle_qa",
)
_SUM_OF_TRACKING = 1.11
_VICAS_CAP = 30_000


def _tracking(weight: float, task: str, *prefixes: str) -> tuple[Use, ...]:
    """As trained: the weight multiplies the root of each set's size, it is no share of a group."""
    names: list[Named] = []
    for prefix in prefixes:
        name = f"{prefix}_{task}"
        names.append((name, _VICAS_CAP) if prefix == "vicas" else name)
    return _uses(*names, loss=POINTING, weight=weight / _SUM_OF_TRACKING)


_TRACKING = (
    *_tracking(0.4, "track", "mevis", "ref_yt_vos", "lv_vis", "vicas", "revos", "molmo2_video"),
    *_tracking(0.05, "track", "burst", "ref_davis17", "yt_vis", "moca"),
    *_tracking(0.2, "ground", "mevis", "lv_vis", "vicas", "revos", "molmo2_video_track"),
    *_tracking(0.01, "ground", "burst", "moca"),
    *_tracking(0.15, "single_point_track", "mevis", "lv_vis", "vicas", "revos", "molmo2_video"),
    *_tracking(0.2, "single_point_track", "webuav", "got10k", "vasttrack", "trackingnet"),
    *_tracking(
        0.1,
        "single_point_track",
        *("burst", "lvosv1", "lvosv2", "lasot", "uwcot", "webuot", "latot", "tnl2k", "tnllt"),
    ),
)
_VIDEO_POINTING = (
    *_uses("vixmo_points_minmax_0_5", rate=0.4, loss=POINTING),
    *_uses("vixmo_points_minmax_6_25", rate=0.3, loss=POINTING),
    *_uses("vixmo_points_minmax_26_60", rate=0.1, loss=POINTING),
    *_uses("academic_points_clip_63s_2fps", rate=0.2, loss=POINTING),
)
_IMAGE_POINTING = _uses(
    ("pixmo_multi_points", 200_000),
    "pixmo_points_train",
    "pixmo_count_train",
    "pixmo_points_high_freq_train",
    "cosyn_point",
    loss=POINTING,
    p_high_res=P_HIGH_RES_POINTING,
)

SFT_MIXTURE = Mixture(
    name="molmo2",
    groups=(
        ("demo", 0.15, _DEMO),
        ("video_academic", 0.2, _VIDEO_ACADEMIC),
        ("image_academic", 0.25, _IMAGE_ACADEMIC),
        ("tracking", 0.15, _TRACKING),
        ("video_pointing", 0.15, _VIDEO_POINTING),
        ("image_pointing", 0.10, _IMAGE_POINTING),
        ("nlp", 0.0995, _uses("tulu4")),
        ("hardcodes", 0.0005, _uses("molmo2_hardcodes")),
    ),
)
LONG_CONTEXT_MIXTURE = replace(SFT_MIXTURE, name="molmo2_long_context")

DEBUG_SFT_MIXTURE = Mixture(
    name="debug",
    groups=(
        ("demo", 0.1, _uses("pixmo_ask_model_anything")),
        ("video_academic", 0.2, _uses("llava_video_mc_academic")),
        ("image_academic", 0.25, _uses("chart_qa_weighted")),
        ("tracking", 0.1, _uses("mevis_track", loss=POINTING)),
        ("nlp", 0.099, _uses("tulu4")),
        ("hardcodes", 0.001, _uses("molmo2_hardcodes")),
    ),
)

DRAWN_PRETRAIN_MIXTURE = Mixture(
    name="drawn_pretrain",
    groups=(
        ("captions", 0.3, _uses("drawn_captions")),
        ("pointing", 0.6, _uses("drawn_points", "drawn_points_few", "drawn_count")),
        ("nlp", 0.1, _uses("drawn_text")),
    ),
)
"""Nothing to download; more pointing than in the stage it stands for, captions say little."""
DRAWN_SFT_MIXTURE = Mixture(
    name="drawn",
    groups=(
        (
            "demo",
            0.15,
            (
                *_uses("drawn_chat", "drawn_captions"),
                *_uses("drawn_video_captions", loss=VIDEO_CAPTIONS),
            ),
        ),
        ("video_academic", 0.1, _uses("drawn_video_questions", "drawn_speech")),
        ("image_academic", 0.15, _uses("drawn_questions", "drawn_image_questions")),
        (
            "tracking",
            0.15,
            _uses("drawn_tracks", "drawn_ground", "drawn_single_point_tracks", loss=POINTING),
        ),
        ("video_pointing", 0.1, _uses("drawn_video_points", loss=POINTING)),
        (
            "image_pointing",
            0.3,
            _uses("drawn_points", "drawn_count", "drawn_multi_points", loss=POINTING),
        ),
        ("nlp", 0.05, _uses("drawn_text")),
    ),
)

MIXTURES = {
    mixture.name: mixture
    for mixture in (
        PRETRAIN_MIXTURE,
        SFT_MIXTURE,
        LONG_CONTEXT_MIXTURE,
        DEBUG_SFT_MIXTURE,
        DRAWN_PRETRAIN_MIXTURE,
        DRAWN_SFT_MIXTURE,
    )
}


def mixture_of(name: str) -> Mixture:
    """Raises DataError for an unknown name."""
    if name not in MIXTURES:
        raise DataError(f"there is no mixture {name}; there are {', '.join(MIXTURES)}")
    return MIXTURES[name]


def names_of(mixtures: Sequence[Mixture]) -> set[str]:
    """The datasets that mixtures draw of."""
    return {use.part.dataset for mixture in mixtures for use in mixture.uses()}
