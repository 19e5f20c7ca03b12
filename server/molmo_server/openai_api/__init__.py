"""OpenAI's requests, as far as Molmo2 serves them.

chat_request   chat completions
"""
