"""Writes models in the formats of other programs, and refuses models that a format cannot hold."""
