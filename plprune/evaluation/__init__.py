"""Quality and speed of a model."""
