"""HTTP, route by route: what is read from a request and what is written to its caller.

chat   `POST /v1/chat/completions`, OpenAI's; completions, responses: its other two
verbs  `POST /v1/point`, `/count`, `/track`, `/caption`, `/query`
admin  checkpoints, and what keys used
engines  which engines there are, and changes of them
media  uploads: `/v1/media`
files, batches  OpenAI's, for requests answered in the background
ops    models, health, readiness, metrics
sending  answers on their way, whole or as streams
body   the body of a request: its type, its time, its fields
"""
