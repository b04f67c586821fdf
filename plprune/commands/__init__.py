"""The commands that do not train: each is a function whose signature and docstring are its options and their help."""

from collections.abc import Callable

from plprune.commands.compare import compare
from plprune.commands.evaluate import evaluate
from plprune.commands.export import export
from plprune.commands.plan import plan
from plprune.commands.prune import prune
from plprune.commands.report import report
from plprune.commands.sensitivity import sensitivity

COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "prune": prune,
    "evaluate": evaluate,
    "compare": compare,
    "sensitivity": sensitivity,
    "report": report,
    "export": export,
}
