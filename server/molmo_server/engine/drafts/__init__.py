"""Drafts of what a pointing answer goes on with, which the engine verifies many tokens a step.

`asked`, `motion`, `coords` and `answer` foretell text; `proposer` is what vLLM asks, in tokens.
"""
