"""Comparisons of pruning methods under one protocol."""
