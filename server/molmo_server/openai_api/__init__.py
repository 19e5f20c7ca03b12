"""OpenAI's requests, as far as Molmo2 serves them.

chat_request         chat completions
completions_request  texts that go on
responses_request    responses
messages             what a conversation is made of
response_format      JSON, and which schemas
fields               what the requests share, and what is refused
"""
