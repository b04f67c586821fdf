"""The commands that do not train. The signature of each function defines its options, and its docstring their help."""

from collections.abc import Callable

from plprune.commands.compare import compare
from plprune.commands.evaluate import evaluate
from plprune.commands.export import export
from plprune.commands.plan import plan
from plprune.commands.prune import prune
from plprune.commands.report import report
from plprune.commands.sensitivity import sensitivity

FUNCTIONS = (plan, prune, evaluate, compare, sensitivity, report, export)
COMMANDS: dict[str, Callable[..., None]] = {function.__name__: function for function in FUNCTIONS}
