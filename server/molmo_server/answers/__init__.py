"""What the model writes: the form it is held to, and what is read out of it.

grammar    the grammar that an answer is decoded under
reading    from text to grounding
relay      the same for a stream, passed on byte for byte
responses  the same as OpenAI's responses; completions_relay: for texts that go on
usage      tokens, as callers are told
verbs      the table of verbs: requests, answers
"""
