"""The command line: runs a command, and turns every error into one line."""

import contextlib
import difflib
import inspect
import os
import re
import sys
from argparse import ArgumentError
from typing import Any

import docstring_parser
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

import plprune
from plprune.checkpoint.remote_code import allow_remote_code
from plprune.commands import COMMANDS
from plprune.commands.options import HELP
from plprune.io.distributed import local_rank
from plprune.methods import CFSP, FASP, FLAP, REAP, BestOf, LearnedGates, TwoSSP
from plprune.planning.targets import Target
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.export import Export
from plprune.training.callbacks.prune import Prune
from plprune.training.callbacks.report import Report
from plprune.training.checkpointing import Checkpoint
from plprune.training.console import configure_logging
from plprune.training.data import RecoveryData
from plprune.training.lightning_cli import STAGES, RecoveryCLI, check_values_given
from plprune.training.module import Recovery
from plprune.training.preemption import preemptible

BUILT_IN = [BestOf, CFSP, FASP, FLAP, LearnedGates, REAP, TwoSSP]
CLASSES = [*BUILT_IN, Prune, Evaluate, Report, Export, Checkpoint]
METHODS = "known methods: " + ", ".join(method.__name__ for method in BUILT_IN)
TRUST, MODELS = "trust_remote_code", ("model", "models")  # an option, and parameters that name models
PARSER_ERRORS = {  # patterns in jsonargparse's messages, and better messages
    r"(?s)Does not validate .*?Errors:\s*- (Problem with given class_path.*?)\n\s*- .*": r"\1",
    r"(?s)Does not validate .*?Errors:(.*)Given value type:.*?Given value:": r"\1 but got",
    r'Parser key "(?:\S*\.)?method":\s+Expected a dot import path string: (\S+)': rf"no method '\1'; {METHODS}",
    r"Expected a dot import path string: (\S+)": r"no class '\1'",
    r"(?s)Not a valid subclass of (\w+)\. Got value: (.*?)\s+Subclass types expect.*": r"expected the name of a \1, or "
    r"class_path and init_args. Got value: \2",
    r":\s+'\w+' object has no attribute 'keys'": ": init_args must map names to values",
    r"(?s)Unexpected config: (.{0,40}).*": r"a configuration must map options to values, but this one is '\1'",
    r"Option '(\S+)' is not accepted|Subcommand '\w+' does not accept option '(\S+)'": r"no option '\1\2'",
    r"Problem with given class_path '(\S+)':|Parser key \"(\S+)\":": r"\1\2:",
    r"Expected a (?:typing\.Literal\[(.*?)\]|<class '(?:[\w.]+\.)?(\w+)'>)": r"expected \1\2",
    r"\s*- (expected .*)\s+- expected NoneType\s+but got\s+": r" \1. Got value: ",
    r"\S+\s+no option '(serve_on|tensor_parallel)'": r"\1 is not a setting of a method: give `\1` beside `method`",
    r"\S+\s+no option 'target_(\w+)'": r"target_\1 is not a setting of a method: give `target.\1` beside `method`",
    r"(?s)target:\s+Unable to load config '(.*?)'\s+- .*": r"target is \1, but must be given by its settings: "
    "target.memory",
}
OTHER_ERRORS = {  # the same for messages of Lightning and jsonargparse about the machine
    r"(?s)Does not validate .*class_path '[\w.]*?(\w+)':\s+Requirement '([\w-]+)[^']*' not met.*": r"\1 needs \2, "
    r"which is not installed: pip install \2",
    ".*`enable_checkpointing=False` but found `ModelCheckpoint` in callbacks list.": "there is a Checkpoint in "
    "trainer.callbacks, but trainer.enable_checkpointing or trainer.barebones turns it off: remove one of them",
    "No supported gpu backend found!": "there is no GPU here: give --trainer.accelerator cpu, or use another machine",
    r"(?s)Does not validate .*(the strategy DeepSpeed needs .*?)\s+Given value type.*": r"\1",
}
SAVE_MEMORY = {  # what helps when an accelerator is out of memory, by command
    "prune": "lower --batch_size or --seq_len, give --offload cpu or --dtype bfloat16, or choose a method that needs "
    "memory for one block only: any but LearnedGates",
    **dict.fromkeys(
        STAGES,
        "lower data.batch_size (trainer.accumulate_grad_batches makes up for it), data.seq_len or "
        "data.calibration_batch_size, or set model.gradient_checkpointing true or model.dtype bfloat16",
    ),
}


def main(args: list[str] | None = None) -> None:
    """Runs a command and exits; prints one line for an error.

    Args:
        args: The command and its options; if not given, those of the process.
    """
    configure_logging()
    if os.getcwd() not in sys.path:  # so that a method in the current folder is found, as by `python -m plprune`
        sys.path.append(os.getcwd())
    given = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        _run(given, args)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes one
            raise
        sys.exit(_report("interrupted; nothing half-written is left behind", 130))
    except ArgumentError as error:
        command = f" {given[0]}" if given[0] in STAGES | COMMANDS else ""
        sys.exit(_report(f"{explained(str(error), given[0])} (see plprune{command} --help)", 2, error))
    except torch.OutOfMemoryError as error:
        message = str(error).partition(" If reserved")[0]  # the rest is about settings of the allocator
        remedy = SAVE_MEMORY.get(given[0], "lower --seq_len, or give --dtype bfloat16 or --device cpu")
        sys.exit(_report(f"{message} To need less, {remedy}", 1, error))
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        sys.exit(_report(_substituted(str(error), OTHER_ERRORS) or type(error).__name__, 1, error))
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        message = f"{type(error).__name__}{': ' * bool(line)}{line}"
        sys.exit(_report(f"unexpected error: {message} (PLPRUNE_DEBUG=1 shows where)", 1, error))


def command_parser(name: str) -> LightningArgumentParser:
    """Creates the parser of a command from its function.

    The model is a positional argument, the other parameters are options that a file may give as well, and booleans are
    switches.
    """
    command = COMMANDS[name]
    helps = {p.arg_name: p.description for p in docstring_parser.parse(command.__doc__ or "").params}
    parameters = list(inspect.signature(command).parameters.values())
    positional = [p.name for p in parameters[:1] if p.annotation is str]
    switches = [p.name for p in parameters if p.annotation is bool]
    parser = LightningArgumentParser(prog=f"plprune {name}", description=_short(command), exit_on_error=False)
    for each in positional:
        parser.add_argument(each, type=str, help=helps[each])
    parser.add_argument("--config", action="config", help="A YAML file with options.")
    parser.add_function_arguments(command, skip={*positional, *switches}, as_group=False, as_positional=False)
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=helps[switch])
    if {each.name for each in parameters} & {*MODELS}:
        parser.add_argument(f"--{TRUST}", action="store_true", help=HELP[TRUST])
    return parser


def explained(message: str, command: str) -> str:
    """Shortens a parser's message, and suggests the name that was probably meant.

    Example:
        >>> explained("unrecognized arguments: --sparsity 0.2", "prune")
        'unrecognized arguments: --sparsity 0.2; did you mean --method.sparsity?'
    """
    message = _substituted(message, PARSER_ERRORS)
    if unknown := re.search(r"(arguments: --|no \w+ ')([\w.+-]+)", message):
        start, word = unknown.groups()
        names = {name.lower(): name for name in _known_names(start.strip(" '"), command)}
        near = difflib.get_close_matches(word.lower(), names, 1)
        message += f"; did you mean {'--' * start.endswith('--')}{names[near[0]]}?" if near else ""
    return message


def _substituted(message: str, substitutions: dict[str, str]) -> str:
    for pattern, replacement in substitutions.items():
        message = re.sub(pattern, replacement, message)
    return message


def _known_names(kind: str, command: str) -> list[str]:
    """The names that could be meant by an unknown one, for example by one after "no method"."""
    if kind == "no command":
        return [*STAGES, *COMMANDS]
    if kind in ("no method", "no class", "no attribute"):
        return [each.__name__ for each in CLASSES]
    owners: list[tuple[str, Any]] = [("trainer.", pl.Trainer), ("model.", Recovery), ("data.", RecoveryData)]
    if command in COMMANDS:
        owners = [("", COMMANDS[command]), ("target.", Target), *(("method.", each) for each in BUILT_IN)]
    owners += [("", each) for each in CLASSES if kind == "no option"]
    return [prefix + name for prefix, owner in owners for name in inspect.signature(owner).parameters]


def _run(given: list[str], args: list[str] | None) -> None:
    name, *rest = given
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"plprune {plprune.__version__}")
    elif name in COMMANDS:
        parser = command_parser(name)
        parsed = parser.parse_args(rest)
        check_values_given(COMMANDS[name], vars(parsed))
        options = vars(parser.instantiate_classes(parsed))
        if options.pop(TRUST, False):
            given = [options[name] for name in MODELS if name in options]
            allow_remote_code(*(name for each in given for name in (each if isinstance(each, list) else [each])))
        COMMANDS[name](**{option: value for option, value in options.items() if option != "config"})
    elif name in STAGES or name.startswith("-"):
        with preemptible() if name == "fit" else contextlib.nullcontext():
            RecoveryCLI(args)
    else:
        raise ArgumentError(None, f"no command '{name}'; known commands: {', '.join([*STAGES, *COMMANDS])}")


def _overview() -> str:
    commands = STAGES | {name: _short(command) for name, command in COMMANDS.items()}
    listed = "\n".join(f"  {name:<13}{text}" for name, text in commands.items())
    return (
        f"usage: plprune COMMAND [options]\n\n{_short(plprune)}\n\ncommands:\n{listed}\n\n"
        "`plprune COMMAND --help` lists the options of a command, `plprune --version` prints the version."
    )


def _short(thing: object) -> str:
    """The first line of a docstring."""
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _report(message: str, code: int, error: Exception | None = None) -> int:
    """Prints an error and returns the exit code; bad input is printed by one process of each machine only."""
    if error is not None and os.environ.get("PLPRUNE_DEBUG"):
        raise error
    if not (local_rank() and isinstance(error, ArgumentError | ValueError)):
        print(f"plprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code
