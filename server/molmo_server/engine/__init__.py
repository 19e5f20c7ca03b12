"""The faithful engine: real vLLM, corrected to compute what Molmo2 was trained to compute."""
