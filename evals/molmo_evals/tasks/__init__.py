"""The tasks, one module each; a new one is also listed in `molmo_evals.task`."""
