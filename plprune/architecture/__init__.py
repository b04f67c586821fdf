"""The structure of models: families, decoder blocks and their prunable units, and the classes of pruned models."""
