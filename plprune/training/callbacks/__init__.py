"""The callbacks of a fit."""
