"""Which checkpoint is served.

folder   what the gateway knows of a checkpoint folder: id, geometry, tokenizer, tensor shapes
rollout  how another checkpoint comes to be served, and what happened to those that did not
"""
