"""What the model writes: the form it is held to, and what is read out of it.

grammar    the grammar that an answer is decoded under
reading    from text to grounding
relay      the same for a stream, passed on byte for byte
verbs      the table of verbs: requests, answers
"""
