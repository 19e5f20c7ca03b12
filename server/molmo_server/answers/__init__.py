"""What the model writes: the form it is held to, and what is read out of it.

grammar        the form of an answer, and the grammar that it is decoded under
reading        from text to grounding
confidence     how sure the model was of each place
events         the engine's stream, event by event
responses      the same as OpenAI's responses
relay          the same passed on byte for byte, with its places
splitting      streams event by event; completions_relay: of texts that go on
whole          an answer in one piece
usage          tokens, as callers are told
verbs          the table of verbs: requests, answers
merging        several answers about the same media as one
interpolation  places of a track between those that the model saw
"""
