"""Files, texts, processes and number formats. Nothing here depends on models."""
