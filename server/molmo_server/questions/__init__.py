"""What is asked of an engine.

chat    a question in a chat, with media
"""
