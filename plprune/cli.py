"""The command line: LightningCLI for fit, validate and test, jsonargparse for the other commands. Wiring only."""

import contextlib
import difflib
import glob
import inspect
import logging
import os
import re
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

import docstring_parser
import lightning.pytorch as pl
import torch
import transformers
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.enums import StrEnum

import plprune
from plprune import report
from plprune.checkpoint.load import load_skeleton
from plprune.commands import COMMANDS
from plprune.io.atomic import check_output, remove_leftovers, resolve_path
from plprune.io.checks import check_sizes
from plprune.io.progress import Progress
from plprune.methods import CFSP, FASP, FLAP, LearnedGates, Request, TwoSSP, preflight
from plprune.planning.targets import Target
from plprune.training import checkpoint_files, checkpointing, console, preemption, resuming, rounds
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.export import Export
from plprune.training.callbacks.prune import Prune
from plprune.training.callbacks.report import Report
from plprune.training.data import RecoveryData
from plprune.training.lightning_internals import OpenCLI
from plprune.training.module import ENDLESS, Recovery
from plprune.training.resume import begin_anew, is_finished, named, resume_from
from plprune.training.watchdog import Watch

STAGES = {
    "fit": "Prunes a model, recovers it by LoRA, measures and exports it, as a YAML file says.",
    "validate": "Measures a model, or a checkpoint of a fit, on the validation text.",
    "test": "Measures a model, or a checkpoint of a fit, on the test text.",
}
RESUME = (
    "Go on where an earlier run of the same command was stopped: from its newest complete checkpoint, or from the "
    "start if there is none. A run that gets SIGTERM, or has used up its max_hours, saves and ends with exit code "
    f"{preemption.AGAIN}: start it again with --resume."
)
BUILT_IN = [CFSP, FASP, FLAP, LearnedGates, TwoSSP]
ROUNDS = (
    "Prune and recover this many times, in fits one after another: each prunes what the one before it has recovered, "
    "and all together end at the method's sparsity after trainer.max_steps. The model of the last is the one that is "
    "asked for; those before it are in round-1, round-2 and so on, in trainer.default_root_dir."
)
CLASSES = [*BUILT_IN, Prune, Evaluate, Report, Export, checkpointing.Checkpoint]
LIGHTNING = ("lightning", "lightning.pytorch", "lightning.fabric")  # loggers, each with a handler of its own
METHODS = "known methods: " + ", ".join(method.__name__ for method in BUILT_IN)
REWORDED = {  # what jsonargparse says, and what of it helps
    r"(?s)Does not validate .*?Errors:\s*- (Problem with given class_path.*?)\n\s*- .*": r"\1",
    r"(?s)Does not validate .*?Errors:(.*)Given value type:.*?Given value:": r"\1 but got",
    r'Parser key "(?:\S*\.)?method":\s+Expected a dot import path string: (\S+)': rf"no method '\1'; {METHODS}",
    r"Expected a dot import path string: (\S+)": r"no class '\1'",
    r"(?s)Not a valid subclass of (\w+)\. Got value: (.*?)\s+Subclass types expect.*": r"expected the name of a \1, or "
    r"class_path and init_args. Got value: \2",
    r":\s+'\w+' object has no attribute 'keys'": ": init_args are no settings by name",
    r"(?s)Unexpected config: (.{0,40}).*": r"a configuration holds options by name, but this one: '\1'",
    r"Option '(\S+)' is not accepted|Subcommand '\w+' does not accept option '(\S+)'": r"no option '\1\2'",
    r"Problem with given class_path '(\S+)':|Parser key \"(\S+)\":": r"\1\2:",
    r"Expected a (?:typing\.Literal\[(.*?)\]|<class '(?:[\w.]+\.)?(\w+)'>)": r"expected \1\2",
    r"\s*- (expected .*)\s+- expected NoneType\s+but got\s+": r" \1. Got value: ",
    r"\S+\s+no option '(serve_on|tensor_parallel)'": r"\1 is no setting of a method: give `\1` beside `method`",
    r"\S+\s+no option 'target_(\w+)'": r"target_\1 is no setting of a method: give `target.\1` beside `method`",
    r"(?s)target:\s+Unable to load config '(.*?)'\s+- .*": r"target is \1, but it has settings by name: target.memory",
}
FAULTS = {  # what Lightning and jsonargparse say of a machine, and what helps
    r"(?s)Does not validate .*class_path '[\w.]*?(\w+)':\s+Requirement '([\w-]+)[^']*' not met.*": r"\1 needs \2, "
    r"which is not installed: pip install \2",
    ".*`enable_checkpointing=False` but found `ModelCheckpoint` in callbacks list.": "there is a Checkpoint in "
    "trainer.callbacks, and trainer.enable_checkpointing or barebones is against it: leave out one of them",
    "No supported gpu backend found!": "there is no GPU here: give --trainer.accelerator cpu, or use another machine",
    r"(?s)Does not validate .*(the strategy DeepSpeed needs .*?)\s+Given value type.*": r"\1",
}
# What is a word to Lightning, like the interval of its Timer, is one in a file too.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, word: dumper.represent_str(word.value))
LESS = {  # memory on an accelerator, by command
    "prune": "lower --batch_size or --seq_len, give --offload cpu or --dtype bfloat16, or take a method that needs "
    "room for one block: all but LearnedGates",
    **dict.fromkeys(
        STAGES,
        "lower data.batch_size (trainer.accumulate_grad_batches makes up for it), data.seq_len or "
        "data.calibration_batch_size, or set model.gradient_checkpointing true or model.dtype bfloat16",
    ),
}


class CLI(OpenCLI):
    """LightningCLI over Recovery and RecoveryData."""

    def __init__(self, args: list[str] | None) -> None:
        self._since = time.monotonic()
        super().__init__(
            Recovery,
            RecoveryData,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # it would build the optimizer before Prune's setup
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "plprune", "exit_on_error": False}
            | {stage: {"description": text, "exit_on_error": False} for stage, text in STAGES.items()},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {stage: LightningCLI.subcommands()[stage] for stage in STAGES}

    def parser_of(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super().parser_of(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", action="store_true", help=RESUME)
            parser.add_argument("--rounds", type=int, default=1, help=ROUNDS)
        return parser

    def fit(self, **kwargs: Any) -> None:
        """Trains, after a look at what an earlier run has left."""
        trainer, dry = self.trainer, checkpointing.is_dry(self.trainer)
        resume = self.config["fit"]["resume"] and not dry
        run = resuming.asked(trainer, self.model, self.datamodule)
        if rank_zero_only.rank == 0 and not dry:
            self._tidy()
        with preemption.preemptible(trainer.strategy.launcher):
            if resume and self._nothing_left():
                return
            if resume and (path := resume_from(trainer, run)):
                kwargs["ckpt_path"] = str(path)
                self._log(trainer, checkpoint_files.step_of(path))
                if not is_finished(trainer):
                    for export in self._exports():  # what is there is this run's own, as it was free at the start
                        export.overwrite = True
            elif not kwargs["ckpt_path"] and not dry:
                for export in self._exports():
                    check_output(export.output, export.overwrite)
                begin_anew(trainer)
            trainer.fit(**kwargs)
        if trainer.is_global_zero:
            print(console.summary(trainer, {} if dry else self._outputs(), time.monotonic() - self._since))

    def instantiate_classes(self) -> None:
        """Nothing is loaded here for rounds, as each is a process of its own."""
        if not self._rounds:
            super().instantiate_classes()

    def run_subcommand(self, subcommand: str) -> None:
        if not self._rounds:
            return super().run_subcommand(subcommand)
        if code := rounds.run(yaml.safe_load(self.dumped()), self._rounds):
            sys.exit(code)

    def arguments_of(self, subcommand: str) -> dict[str, Any]:
        kwargs = super().arguments_of(subcommand)
        if kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = named(str(kwargs["ckpt_path"]), self.trainer, subcommand == "fit")
            if kwargs.get("weights_only") is None:
                kwargs["weights_only"] = True  # or Lightning would unpickle what it gets from elsewhere
        return kwargs

    @property
    def _rounds(self) -> int:
        """How many rounds of fitting are asked for; 0 if this process is to do the work itself."""
        asked = self.config[cast(str, self.subcommand)].get("rounds", 1)
        check_sizes(rounds=asked)
        return asked if asked > 1 else 0

    def before_instantiate_classes(self) -> None:
        """Refuses a pruning whose result could not be served, or would miss its target, before the model is loaded.

        Options without a value, outputs that are links to nothing, and training without an end are refused as well.
        """
        config = self.config[cast(str, self.subcommand)]
        given = config.trainer
        for section in ("trainer", "model", "data"):
            if not isinstance(config[section], Namespace):
                raise ValueError(
                    f"{section} is {config[section]}, but holds options by name: give some, or leave it out"
                )
        check_given(Recovery, vars(config.model), "model.")
        check_given(RecoveryData, vars(config.data), "data.")
        if self.subcommand == "fit" and given.max_steps == -1 and given.max_epochs is None and not given.fast_dev_run:
            raise ValueError(ENDLESS)
        listed = [each.class_path.rpartition(".")[2] for each in config.trainer.callbacks or []]
        for name in ("Prune", "Evaluate", "Report", "Checkpoint"):
            if listed.count(name) > 1:
                raise ValueError(f"trainer.callbacks has {name} {listed.count(name)} times: list it once")
        resolve_path(config.trainer.default_root_dir or ".")
        for each in config.trainer.callbacks or []:
            for output in ("output", "folder", "dirpath"):
                if (place := each.get("init_args", {}).get(output)) is not None:
                    resolve_path(place)
            if each.class_path.endswith("Prune"):
                parser = LightningArgumentParser(exit_on_error=False)
                parser.add_class_arguments(Request)
                asked = each.init_args.as_dict()
                given = parser.parse_object({name: asked[name] for name in inspect.signature(Request).parameters})
                request = Request(**vars(parser.instantiate_classes(given)))
                preflight(request, lambda: load_skeleton(config.model.name_or_path, config.model.dtype))

    def _tidy(self) -> None:
        """Removes what killed runs have left half-written."""
        for each in cast(Any, self.trainer).callbacks:
            if isinstance(each, checkpointing.Checkpoint):
                remove_leftovers(each.folder(self.trainer))
            elif isinstance(each, Export):
                remove_leftovers(resolve_path(each.output).parent, glob.escape(resolve_path(each.output).name))
            elif isinstance(each, Prune):
                remove_leftovers(resolve_path(each.folder or self.trainer.default_root_dir) / "plans")

    def _nothing_left(self) -> bool:
        outputs = [export.output for export in self._exports()]
        if not is_finished(self.trainer) or not all(resolve_path(output).exists() for output in outputs):
            return False
        model, data = cast(Recovery, self.model), cast(RecoveryData, self.datamodule)
        data.tokenizer = data.tokenizer or model.tokenizer  # it asks its trainer, which knows no model yet
        is_finished(self.trainer, resuming.asked(self.trainer, model, data, model.contents(data)))
        if rank_zero_only.rank == 0:
            print(f"this run is finished{''.join(f'; its model is in {output}' for output in outputs)}")
        return True

    def _outputs(self) -> dict[str, list[str]]:
        """What a fit leaves behind, and where."""
        root, own = self.trainer.default_root_dir, cast(Any, self.trainer).callbacks
        pages = [report.page_of(each.output or root) for each in own if isinstance(each, Report)]
        places = {"model": [each.output for each in self._exports()], "report": [str(page) for page in pages]}
        return {what: [path for path in paths if os.path.exists(path)] for what, paths in places.items()}

    def _exports(self) -> list[Export]:
        return [each for each in cast(Any, self.trainer).callbacks if isinstance(each, Export)]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self.config_init[str(self.subcommand)]["trainer"]
        if self.subcommand != "fit":  # in a folder without loggers, that of the fit stays
            self.save_config_kwargs |= {"config_filename": f"{self.subcommand}.yaml"}
        if not given["barebones"]:
            kwargs |= console.display_arguments(given, str(self.subcommand))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # which Lightning raises for settings
            raise ValueError(f"the trainer does not take this: {error}") from error
        cast(Any, trainer).callbacks[:0] = [Watch(), console.BarsFirst()]
        self._log(trainer)
        return trainer

    def _log(self, trainer: pl.Trainer, step: int | None = None) -> None:
        """Gives a trainer our loggers, unless its user has chosen; after `step` steps those of the run that goes on."""
        given = self.config_init[str(self.subcommand)]["trainer"]
        if given["logger"] is None and not given["fast_dev_run"] and not given["barebones"]:
            trainer.loggers = console.loggers(trainer.default_root_dir, str(self.subcommand), step)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(Any, args))  # LightningCLI's own warns of args beside sys.argv


def command_parser(name: str) -> LightningArgumentParser:
    """The parser of a function: the model by position, the others as options or from a file, booleans as switches."""
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
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs a command, and turns what goes wrong into one line."""
    _quieten()
    if os.getcwd() not in sys.path:  # for a method of one's own, as `python -m plprune` has it
        sys.path.append(os.getcwd())
    given = (sys.argv[1:] if args is None else args) or ["--help"]
    try:
        _run(given, args)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes one
            raise
        sys.exit(_complain("interrupted; nothing half-written is left behind", 130))
    except ArgumentError as error:
        command = f" {given[0]}" if given[0] in STAGES | COMMANDS else ""
        sys.exit(_complain(f"{explained(str(error), given[0])} (see plprune{command} --help)", 2, error))
    except torch.OutOfMemoryError as error:
        there = str(error).partition(" If reserved")[0]  # what follows is about the allocator's settings
        less = LESS.get(given[0], "lower --seq_len, or give --dtype bfloat16 or --device cpu")
        sys.exit(_complain(f"{there} To need less, {less}", 1, error))
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        sys.exit(_complain(_helpful(str(error)) or type(error).__name__, 1, error))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        what = f"{type(error).__name__}{': ' * bool(first)}{first}"
        sys.exit(_complain(f"not foreseen: {what} (PLPRUNE_DEBUG=1 shows where)", 1, error))


def check_given(owner: Callable[..., Any], values: Mapping[str, Any], within: str = "") -> None:
    """Makes sure that what needs a value has one: a parser takes null for any option that is in a file.

    Args:
        owner: A function, or a class, whose parameters are the options.
        values: What was given, as it was parsed.
        within: What the names in a message begin with.

    Raises:
        ValueError: An option has none, or one where it has settings of its own.
    """
    of = owner.__init__ if isinstance(owner, type) else owner
    for name, kind in get_type_hints(of).items():
        value, kinds = values.get(name, MISSING), [*_kinds(kind)]
        if value is None and type(None) not in kinds:
            raise ValueError(f"{within}{name} has no value: give one, or leave it out if it has a default")
        for part in [each for each in kinds if is_dataclass(each)]:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Namespace):
                    check_given(part, vars(each.get("init_args") or each), f"{within}{name}.")
                elif kind is part and each is not MISSING and not isinstance(each, part):
                    settings = ", ".join(field.name for field in fields(part))
                    raise ValueError(f"{within}{name} is {each}, but it has settings by name: {settings}")


def _kinds(kind: Any) -> Iterator[type]:
    """A type, and those that it is made of."""
    yield kind
    for part in get_args(kind):
        yield from _kinds(part)


def explained(message: str, command: str) -> str:
    """A parser's message cut to what helps, with the name that was probably meant.

    Example:
        >>> explained("unrecognized arguments: --sparsity 0.2", "prune")
        'unrecognized arguments: --sparsity 0.2; did you mean --method.sparsity?'
    """
    for wording, better in REWORDED.items():
        message = re.sub(wording, better, message)
    if unknown := re.search(r"(arguments: --|no \w+ ')([\w.+-]+)", message):
        start, word = unknown.groups()
        names = {name.lower(): name for name in _names(start.strip(" '"), command)}
        near = difflib.get_close_matches(word.lower(), names, 1)
        message += f"; did you mean {'--' * start.endswith('--')}{names[near[0]]}?" if near else ""
    return message


def _helpful(message: str) -> str:
    for wording, better in FAULTS.items():
        message = re.sub(wording, better, message)
    return message


def _names(kind: str, command: str) -> list[str]:
    """What could have been meant by an unknown word of a kind."""
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
        check_given(COMMANDS[name], vars(parsed))
        given_options = vars(parser.instantiate_classes(parsed))
        COMMANDS[name](**{option: value for option, value in given_options.items() if option != "config"})
    elif name in STAGES or name.startswith("-"):
        with preemption.preemptible() if name == "fit" else contextlib.nullcontext():
            CLI(args)
    else:
        raise ArgumentError(None, f"no command '{name}'; known commands: {', '.join([*STAGES, *COMMANDS])}")


def _overview() -> str:
    commands = STAGES | {name: _short(command) for name, command in COMMANDS.items()}
    listed = "\n".join(f"  {name:<13}{text}" for name, text in commands.items())
    return (
        f"usage: plprune COMMAND [options]\n\n{_short(plprune)}\n\ncommands:\n{listed}\n\n"
        "`plprune COMMAND --help` lists the options of a command, `plprune --version` prints the version."
    )


def _quieten() -> None:
    """Leaves our own lines, and of others' those that a user can act on."""
    logging.basicConfig(format="%(message)s", stream=console.Stderr())
    logging.getLogger("plprune").setLevel(logging.WARNING if rank_zero_only.rank else logging.INFO)
    Progress.silent = bool(rank_zero_only.rank)
    for handler in [each for name in LIGHTNING for each in logging.getLogger(name).handlers]:
        handler.addFilter(lambda record: not re.search("Tip:|Detected KeyboardInterrupt", record.getMessage()))
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(console.Stderr())
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and says so
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|dataloader is not resumable).*")
    if rank_zero_only.rank or not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _short(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _complain(message: str, code: int, error: Exception | None = None) -> int:
    if error is not None and os.environ.get("PLPRUNE_DEBUG"):
        raise error
    print(f"plprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code
