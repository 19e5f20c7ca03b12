"""vLLM's way in: the entry point `vllm.general_plugins: molmo`.

vLLM calls `register` in each of its processes (API server, engine core, workers, the one that
inspects models). It must be quick and may be called twice. A vLLM that was not tested is refused
by an error, which stops the process: a silently unfaithful engine would be worse than none.
"""

from __future__ import annotations

import os

STOCK_SWITCH = "MOLMO_ENGINE_STOCK"
"""For tests only: set to 1, vLLM's own model, mask, scheduler and renderer run. The parity tests
must fail with it."""


def register() -> None:
    """Register Molmo2's Hugging Face classes and install the faithful engine parts."""
    import molmo_hf
    from molmo_server.engine import patches

    patches.check_engine()
    molmo_hf.register()
    patches.repair_sampling()
    if os.environ.get(STOCK_SWITCH) == "1":
        patches.feed_stock_model()
    else:
        patches.apply_patches()
