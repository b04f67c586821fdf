"""Loads and saves models, dense and pruned."""

from plprune.checkpoint.load import load_model, load_pruned, load_skeleton, load_tokenizer
from plprune.checkpoint.save import save_pruned

__all__ = ["load_model", "load_pruned", "load_skeleton", "load_tokenizer", "save_pruned"]
