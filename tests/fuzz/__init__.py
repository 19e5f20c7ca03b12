"""Coverage-guided fuzzing of what reads bytes of strangers.

targets   what is fuzzed: each takes bytes, and raises when something is not as it should be
seeds     small valid inputs, made by code
__main__  `python -m tests.fuzz TARGET --seconds N`, under atheris

What was found lies in `tests/golden/fuzz/TARGET` and is asked again by the tests.
"""
