"""Points and tracks as text, both directions.

grounding  the values: Point, Track, Grounding, GroundingWarning
parser     GroundingParser (incremental) and parse_grounding: text to values
scanner    the state machine below the parser: where tags, attributes and labels stand
coords     the inside of a `coords` attribute: which numbers make an observation
legacy     the formats of older Molmo models, read only when asked for
render     values to the text that the model is trained to write

Knows: the grammar of `<points>` and `<tracks>`, the sentences around them. Does not know:
pixels of an image, frames of a video, HTTP.
"""

from molmo_core.points.grounding import (
    Grounding,
    GroundingWarning,
    Media,
    Point,
    Track,
    WarningCode,
)
from molmo_core.points.parser import GroundingParser, parse_grounding
from molmo_core.points.render import (
    NO_TRACKS_TEXT,
    NONE_TEXT,
    PointGroup,
    TrackFrame,
    render_answer,
    render_points,
    render_tracks,
)

__all__ = [
    "NONE_TEXT",
    "NO_TRACKS_TEXT",
    "Grounding",
    "GroundingParser",
    "GroundingWarning",
    "Media",
    "Point",
    "PointGroup",
    "Track",
    "TrackFrame",
    "WarningCode",
    "parse_grounding",
    "render_answer",
    "render_points",
    "render_tracks",
]
