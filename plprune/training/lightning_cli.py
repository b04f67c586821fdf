"""The commands fit, validate and test: a LightningCLI for `Recovery` and `RecoveryData`."""

import glob
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_type_hints

import lightning.pytorch as pl
import yaml
from jsonargparse import SUPPRESS, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.enums import StrEnum

from plprune import report
from plprune.checkpoint.load import load_skeleton
from plprune.checkpoint.remote_code import allow_remote_code
from plprune.io.atomic import check_output, remove_leftovers, resolve_path
from plprune.io.checks import check_sizes
from plprune.methods import Request, preflight
from plprune.training import console, preemption, recipes, rounds
from plprune.training.callbacks.export import Export
from plprune.training.callbacks.prune import Prune
from plprune.training.callbacks.report import Report
from plprune.training.checkpoint_files import step_of
from plprune.training.checkpointing import Checkpoint, is_dry
from plprune.training.data import RecoveryData
from plprune.training.lightning_internals import OpenCLI
from plprune.training.module import ENDLESS, Recovery
from plprune.training.resume import checkpoint_to_resume, is_finished, resolve_checkpoint, unmark_finished
from plprune.training.run_identity import identify
from plprune.training.watchdog import Watch

STAGES = {
    "fit": "Prunes a model, recovers it by LoRA, evaluates and exports it, as a YAML file says.",
    "validate": "Evaluates a model, or a checkpoint of a fit, on the validation text.",
    "test": "Evaluates a model, or a checkpoint of a fit, on the test text.",
}
RESUME = (
    "Continue an interrupted run of the same command from its newest complete checkpoint, or begin if there is none. "
    "A run that receives SIGTERM, or exceeds its max_hours, saves a checkpoint and ends with exit code "
    f"{preemption.AGAIN}: start it again with --resume."
)
ROUNDS = (
    "Prune and recover in this many rounds, which end together at the method's sparsity after trainer.max_steps. Each "
    "round is a fit that prunes the model recovered by the round before it. The last one writes the requested model, "
    "the others write to round-1, round-2 and so on in trainer.default_root_dir."
)
T = TypeVar("T")
# Values of Lightning's enums, like the interval of its Timer, are plain words in a file.
yaml.SafeDumper.add_multi_representer(StrEnum, lambda dumper, word: dumper.represent_str(word.value))


class RecoveryCLI(OpenCLI):
    """LightningCLI with --resume and --rounds, and with checks of the options before the model is loaded."""

    def __init__(self, args: list[str] | None) -> None:
        self._since = time.monotonic()
        every = sys.argv[1:] if args is None else args
        given, self._by_recipe = every[:1], False
        if given == ["fit"]:
            args = recipes.expanded(every)
            self._by_recipe = args != every
        self._stages = [stage for stage in STAGES if stage in given] or list(STAGES)
        super().__init__(
            Recovery,
            RecoveryData,
            seed_everything_default=0,
            auto_configure_optimizers=False,  # Lightning would build the optimizer before Prune's setup
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "plprune", "exit_on_error": False}
            | {stage: {"description": STAGES[stage], "exit_on_error": False} for stage in self._stages},
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The given command only, because it takes a while to make the parser of each."""
        return {stage: LightningCLI.subcommands()[stage] for stage in self._stages}

    def make_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super().make_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", action="store_true", help=RESUME)
            parser.add_argument("--rounds", type=int, default=1, help=ROUNDS)
            for name, text in recipes.HELP.items():  # replaced before anything is parsed
                parser.add_argument(f"--{name}", type=str, default=SUPPRESS, help=text)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(Any, args))  # LightningCLI warns if both args and sys.argv are given

    def before_instantiate_classes(self) -> None:
        """Refuses options with which the run would fail, before the model is loaded."""
        config = self.config[cast(str, self.subcommand)]
        if alone := [name for name in recipes.OPTIONS if name in config]:
            raise ValueError(
                f"{alone[0]} is for the command line, after --recipe: give the options that it is short for"
            )
        if self._by_recipe and config.data.train is None:
            raise ValueError("this recipe needs more text than comes with plprune: give one by --data")
        for section in ("trainer", "model", "data"):
            if not isinstance(config[section], Namespace):
                raise ValueError(f"{section} is {config[section]}, but must hold options: give some, or leave it out")
        check_values_given(Recovery, vars(config.model), "model.")
        check_values_given(RecoveryData, vars(config.data), "data.")
        trainer = config.trainer
        unlimited = trainer.max_steps == -1 and trainer.max_epochs is None and not trainer.fast_dev_run
        if self.subcommand == "fit" and unlimited:
            raise ValueError(ENDLESS)
        _check_callbacks(trainer)
        if config.model.trust_remote_code:
            allow_remote_code(config.model.name_or_path)
        for each in trainer.callbacks or []:
            if each.class_path.endswith("Prune"):
                request = _request(each)
                preflight(request, lambda: load_skeleton(config.model.name_or_path, config.model.dtype))
                if self._by_recipe and not rank_zero_only.rank:
                    print(recipes.forecast(request, config.model, config.data, trainer))

    def instantiate_classes(self) -> None:
        """Loads nothing for rounds, which run in separate processes."""
        if not self._rounds:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        given = self.config_init[str(self.subcommand)]["trainer"]
        if self.subcommand != "fit":  # without loggers, the config of the fit in the same folder must stay
            self.save_config_kwargs |= {"config_filename": f"{self.subcommand}.yaml"}
        if not given["barebones"]:
            kwargs |= console.display_arguments(given, str(self.subcommand))
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # raised by Lightning for invalid settings
            raise ValueError(f"the trainer does not take this: {error}") from error
        cast(Any, trainer).callbacks[:0] = [Watch(), console.CloseBar()]
        self._set_loggers(trainer)
        return trainer

    def trainer_arguments(self, subcommand: str) -> dict[str, Any]:
        kwargs = super().trainer_arguments(subcommand)
        if kwargs.get("ckpt_path"):
            kwargs["ckpt_path"] = resolve_checkpoint(str(kwargs["ckpt_path"]), self.trainer, subcommand == "fit")
            if kwargs.get("weights_only") is None:
                kwargs["weights_only"] = True  # or Lightning would unpickle checkpoints from elsewhere
        return kwargs

    def run_subcommand(self, subcommand: str) -> None:
        if not self._rounds:
            return super().run_subcommand(subcommand)
        if code := rounds.run(yaml.safe_load(self.dump()), self._rounds):
            sys.exit(code)

    def fit(self, **kwargs: Any) -> None:
        """Trains from the start or, with --resume, from the newest checkpoint."""
        trainer, dry = self.trainer, is_dry(self.trainer)
        resume = self.config["fit"]["resume"] and not dry
        run = identify(trainer, self.model, self.datamodule)
        if rank_zero_only.rank == 0 and not dry:
            self._remove_partial_files()
        with preemption.preemptible(trainer.strategy.launcher):
            if resume and self._is_done():
                return
            if resume and (path := checkpoint_to_resume(trainer, run)):
                kwargs["ckpt_path"] = str(path)
                self._set_loggers(trainer, step_of(path))
                if not is_finished(trainer):
                    for export in self._callbacks(Export):  # this run has written it: it was free at the start
                        export.overwrite = True
            elif not kwargs["ckpt_path"] and not dry:
                for export in self._callbacks(Export):
                    check_output(export.output, export.overwrite)
                unmark_finished(trainer)
            trainer.fit(**kwargs)
        if trainer.is_global_zero:
            print(console.fit_summary(trainer, {} if dry else self._outputs(), time.monotonic() - self._since))

    @property
    def _rounds(self) -> int:
        """The number of rounds that this process starts; 0 if it fits by itself."""
        count = self.config[cast(str, self.subcommand)].get("rounds", 1)
        check_sizes(rounds=count)
        return count if count > 1 else 0

    def _callbacks(self, kind: type[T]) -> list[T]:
        return [each for each in cast(Any, self.trainer).callbacks if isinstance(each, kind)]

    def _set_loggers(self, trainer: pl.Trainer, step: int | None = None) -> None:
        """Sets the default loggers unless the user has chosen others; a run resumed at `step` continues its logs."""
        given = self.config_init[str(self.subcommand)]["trainer"]
        if given["logger"] is None and not given["fast_dev_run"] and not given["barebones"]:
            trainer.loggers = console.loggers(trainer.default_root_dir, str(self.subcommand), step)

    def _remove_partial_files(self) -> None:
        """Removes partial files of killed runs."""
        for checkpoint in self._callbacks(Checkpoint):
            remove_leftovers(checkpoint.folder(self.trainer))
        for export in self._callbacks(Export):
            remove_leftovers(resolve_path(export.output).parent, glob.escape(resolve_path(export.output).name))
        for prune in self._callbacks(Prune):
            remove_leftovers(resolve_path(prune.folder or self.trainer.default_root_dir) / "plans")

    def _is_done(self) -> bool:
        """Whether the run has finished and its model exists; then prints so."""
        outputs = [export.output for export in self._callbacks(Export)]
        if not is_finished(self.trainer) or not all(resolve_path(output).exists() for output in outputs):
            return False
        model, data = cast(Recovery, self.model), cast(RecoveryData, self.datamodule)
        data.tokenizer = data.tokenizer or model.tokenizer  # the trainer, from which it would take one, has no model
        is_finished(self.trainer, identify(self.trainer, model, data, model.contents(data)))
        if rank_zero_only.rank == 0:
            print(f"this run is finished{''.join(f'; its model is in {output}' for output in outputs)}")
        return True

    def _outputs(self) -> dict[str, list[str]]:
        """The existing outputs of a fit, by kind."""
        root = self.trainer.default_root_dir
        pages = [str(report.page_path(each.output or root)) for each in self._callbacks(Report)]
        paths = {"model": [each.output for each in self._callbacks(Export)], "report": pages}
        return {kind: [path for path in each if os.path.exists(path)] for kind, each in paths.items()}


def check_values_given(owner: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Checks that every option that needs a value has one, because parsers accept null for any option in a file.

    Args:
        owner: The function or class whose parameters are the options.
        values: The parsed values.
        prefix: The beginning of the names in error messages.

    Raises:
        ValueError: An option has no value, or a dataclass was given as a single value.
    """
    for name, kind in get_type_hints(owner.__init__ if isinstance(owner, type) else owner).items():
        value, kinds = values.get(name, MISSING), [*_flattened(kind)]
        if value is None and type(None) not in kinds:
            raise ValueError(f"{prefix}{name} has no value: give one, or leave it out if it has a default")
        for part in [each for each in kinds if is_dataclass(each)]:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, Namespace):
                    check_values_given(part, vars(each.get("init_args") or each), f"{prefix}{name}.")
                elif kind is part and each is not MISSING and not isinstance(each, part):
                    settings = ", ".join(field.name for field in fields(part))
                    raise ValueError(f"{prefix}{name} is {each}, but must be given by its settings: {settings}")


def _flattened(kind: Any) -> Iterator[type]:
    """A type and the types that it contains."""
    yield kind
    for part in get_args(kind):
        yield from _flattened(part)


def _check_callbacks(trainer: Namespace) -> None:
    """Refuses callbacks that are listed twice, and outputs that are links to nothing."""
    names = [each.class_path.rpartition(".")[2] for each in trainer.callbacks or []]
    for name in ("Prune", "Evaluate", "Report", "Checkpoint"):
        if names.count(name) > 1:
            raise ValueError(f"trainer.callbacks has {name} {names.count(name)} times: list it once")
    resolve_path(trainer.default_root_dir or ".")
    for each in trainer.callbacks or []:
        for option in ("output", "folder", "dirpath"):
            if (path := each.get("init_args", {}).get(option)) is not None:
                resolve_path(path)


def _request(callback: Namespace) -> Request:
    """The request of a `Prune` callback in a config."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Request)
    settings = callback.init_args.as_dict()
    parsed = parser.parse_object({name: settings[name] for name in inspect.signature(Request).parameters})
    return Request(**vars(parser.instantiate_classes(parsed)))
