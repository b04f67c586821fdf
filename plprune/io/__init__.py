"""Files, text, processes, numbers: what knows nothing of models."""
