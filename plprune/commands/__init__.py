"""The commands that do not train: each is a function whose signature and docstring are its options and their help."""

from collections.abc import Callable

from plprune.commands.evaluate import evaluate
from plprune.commands.export import export
from plprune.commands.prune import prune

COMMANDS: dict[str, Callable[..., None]] = {"prune": prune, "evaluate": evaluate, "export": export}
