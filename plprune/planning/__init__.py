"""Predicts the sizes, memory and time of a pruning, and finds the sparsity that meets a target."""
