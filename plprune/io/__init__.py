"""Files, texts, processes and number formats: everything that needs no knowledge of models."""
