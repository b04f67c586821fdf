"""The callbacks of a fit: when things happen; how is said elsewhere."""
