"""Dataset rows as the questions and answers that the model is trained on.

formatter       a row → an Example: branches, conversations, prefixes, weights
questions       one question and its answer, by style
points, tracks  the styles that point, count and track
choices         multiple choice
style_prefix    the style and length in front of a question
counting_guard  questions that count where answers have no points
templates       the sentences, in `templates/*.toml`
row, media      reading a row's fields; its decoded media
settings        what differs between the stages of training
"""

from molmo_training.data.formatting.formatter import Formatter, LossWeight
from molmo_training.data.formatting.media import RowMedia
from molmo_training.data.formatting.settings import PRETRAIN, SFT, FormatSettings

__all__ = ["PRETRAIN", "SFT", "FormatSettings", "Formatter", "LossWeight", "RowMedia"]
