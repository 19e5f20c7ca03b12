"""What is asked of an engine.

chat    a question in a chat, with media
texts   texts that the model goes on from as they are
"""
