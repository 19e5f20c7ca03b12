"""The vocabulary of Molmo2: everything that server, client, training and evals must agree on.

errors   the one error tree
tokens   special tokens: spelling, order, meaning
prompts  styles, verbs, chat layout, subtitles
points   points and tracks as text, both directions
images   tiling, resizing, patches, pooling index, token counts
videos   frame times, frame tokens, probing a file
scenes, clips   drawn pictures and moving scenes, for training and evaluation
api      wire types
"""

__version__ = "0.1.0"
