"""Numbers from predictions and truths: `points` (matching) and `intervals` (95 % bounds)."""
