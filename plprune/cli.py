"""The command line: LightningCLI for fit, validate and test, jsonargparse for the other commands. Wiring only."""

import contextlib
import difflib
import functools
import glob
import inspect
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import docstring_parser
import lightning.pytorch as pl
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import plprune
from plprune import callbacks, checkpointing, methods, processes, streaming
from plprune.atomic import check_free, clear
from plprune.calibration import Calibration
from plprune.checkpoint import Dtype, load_as_stored, load_model, load_skeleton, load_tokenizer, save_pruned
from plprune.data import RecoveryData
from plprune.evaluation import measure, table
from plprune.export import formats, parity
from plprune.methods import PruningMethod
from plprune.recovery import Recovery
from plprune.text import PYDOC, check_sizes, check_source, draw, pack, tokenised
from plprune.watch import Watch


def prune(
    model: str,
    method: PruningMethod,
    output: str,
    text: str = PYDOC,
    join: str | None = None,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 8,
    dtype: Dtype = "float32",
    device: str = "cpu",
    offload: Literal["cpu", "disk"] | None = None,
    seed: int = 0,
    stream: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Prunes a model without training, and saves a folder that loads again.

    Args:
        model: A name on the hub, a folder, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        method: How to prune: FLAP, FASP, CFSP, TwoSSP or the dotted path of another; `--method.help NAME` lists its
            settings.
        output: Folder to write.
        text: Calibration text: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        join: Put between the rows of the text, which are then one document; every row is one if not given.
        num_samples: Calibration windows.
        seq_len: Tokens of a window.
        batch_size: Windows that are run at once; the result does not depend on it.
        dtype: Of the weights.
        device: Where the current block is calibrated: cpu, cuda, cuda:1; under torchrun, `cuda` is each process's own.
        offload: Where hidden states wait, to save memory on the device: in the CPU's memory, or, with `stream`, on
            disk.
        seed: Of the choice of windows.
        stream: Whether the model stays on disk, where it must be in safetensors, and one block at a time is loaded,
            pruned and written: for models that are larger than memory.
        resume: Whether to go on where an earlier streaming run of the same command was stopped, if there is one.
        overwrite: Whether to replace what is in the output folder, and to forget an unfinished run unless `resume`.
    """
    check_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    streaming.check_output(output, stream, resume, overwrite)
    check_source(text)
    place = device_called(device)
    tokenizer = load_tokenizer(model)
    windows = draw(tokenised(text, tokenizer, join, seed=seed)[0], num_samples, seq_len, seed)
    load = streaming.open_streamed if stream else load_skeleton if processes.local_rank() else load_model
    if method.serve_on or method.tensor_parallel > 1:
        method.check(load_skeleton(model, dtype))
    network = load(model, dtype)
    with processes.launched(place) as group:
        calibration = Calibration(list(windows.split(batch_size)), place, offload, group)
        if not stream:
            processes.receive(network, group)
        begin, first = "", processes.rank(group) == 0
        if resume and (plan := streaming.finished(output, streaming.asked(network, method, calibration, seed))):
            begin = "this run is finished: "
        elif stream:
            plan = streaming.prune_streamed(network, method, calibration, output, tokenizer, seed, resume, overwrite)
        else:
            check_free(output, overwrite)
            plan = methods.prune(network, method, calibration, seed)
            if first:
                save_pruned(network, output, tokenizer, overwrite)
    if first:
        print(f"{begin}{callbacks.summary(plan)}; saved to {output}")


def evaluate(
    model: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    max_windows: int | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
) -> None:
    """Measures a model, pruned or dense: perplexity, parameters, size and speed.

    Args:
        model: A folder, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        text: What to read: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        join: Put between the rows of the text, which are then one document: "\\n\\n" is usual for WikiText.
        seq_len: Tokens of a window; the first of each is given, and no token is put before it.
        max_windows: At most this many windows from the start of the text; all if not given.
        dtype: Of the weights.
        device: Where to compute: cpu, cuda, cuda:1.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows)
    check_source(text)
    place = device_called(device)
    ids = pack(tokenised(text, load_tokenizer(model), join), seq_len, "evaluation").tensors[0][:max_windows]
    row = measure(load_model(model, dtype).to(place), list(ids.split(1)))  # type: ignore[arg-type]
    print(table({"model": row}))
    print(f"perplexity over {len(ids)} windows of {seq_len} tokens of {text}, windows do not overlap, no BOS")


def export(
    model: str,
    output: str,
    to: str = ",".join(formats.FORMATS),
    dtype: Dtype | None = None,
    gguf: formats.GgufDtype | None = None,
    widen: bool = False,
    pad_to: int = 1,
    text: str = PYDOC,
    seq_len: int = 128,
    max_windows: int = 2,
    overwrite: bool = False,
) -> None:
    """Writes a model in the formats of other programs, loads each again there, and compares.

    Args:
        model: A folder, pruned or dense, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        output: Folder to write: the formats, `parity.json`, and a model card with the same table.
        to: Formats, separated by commas: hf, for transformers; gguf, for llama.cpp; decilm, for vLLM, SGLang,
            TensorRT-LLM and mlx-lm.
        dtype: Of the weights; as on disk if not given, and float32 for a `.gguf` file.
        gguf: Of the matrices in a GGUF file; as `dtype` if not given.
        widen: Whether value channels that FASP removed are put back as zeros, where a format cannot do without them:
            the same function in a larger model.
        pad_to: FFN widths are padded with zeros up to a multiple of this: the same function in a larger model.
        text: What to compare by: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        seq_len: Tokens of a window to compare by.
        max_windows: How many windows to compare by.
        overwrite: Whether to replace what is in the output folder.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows)
    wanted, how = [each.strip() for each in to.split(",")], formats.Options(gguf, widen, pad_to)
    formats.check_formats(wanted)
    check_free(output, overwrite)
    check_source(text)
    tokenizer = load_tokenizer(model)
    windows = pack(tokenised(text, tokenizer), seq_len, "comparison").tensors[0][:max_windows].clone()
    if list(tokenizer("").input_ids) == [tokenizer.bos_token_id]:  # it begins every text so, and the model needs it
        windows[:, 0] = cast(int, tokenizer.bos_token_id)
    load = functools.partial(load_as_stored, model, dtype)
    rows = formats.export(model, load, tokenizer, output, wanted, windows, how, overwrite)
    print(f"{parity.table(rows)}\n\nsaved to {output}; the text: {windows.numel()} tokens of {text}")


COMMANDS: dict[str, Callable[..., None]] = {"prune": prune, "evaluate": evaluate, "export": export}
STAGES = {
    "fit": "Prunes a model, recovers it by LoRA, measures and exports it, as a YAML file says.",
    "validate": "Measures a model, or a checkpoint of a fit, on the validation text.",
    "test": "Measures a model, or a checkpoint of a fit, on the test text.",
}
RESUME = (
    "Go on where an earlier run of the same command was stopped: from its newest complete checkpoint, or from the "
    "start if there is none. A run that gets SIGTERM, or has used up its max_hours, saves and ends with exit code "
    f"{checkpointing.AGAIN}: start it again with --resume."
)
CLASSES = [*PruningMethod.__subclasses__(), callbacks.Prune, callbacks.Evaluate, callbacks.Export]
CLASSES += [checkpointing.Checkpoint]
METHODS = "known methods: " + ", ".join(method.__name__ for method in PruningMethod.__subclasses__())
REWORDED = {  # what jsonargparse says, and what of it helps
    r"(?s)Does not validate .*?Errors:\s*- (Problem with given class_path.*?)\n\s*- .*": r"\1",
    r"(?s)Does not validate .*?Errors:(.*)Given value type:.*?Given value:": r"\1 but got",
    r'Parser key "(?:\S*\.)?method":\s+Expected a dot import path string: (\S+)': rf"no method '\1'; {METHODS}",
    r"Expected a dot import path string: (\S+)": r"no class '\1'",
    r"Option '(\S+)' is not accepted|Subcommand '\w+' does not accept option '(\S+)'": r"no option '\1\2'",
    r"Problem with given class_path '(\S+)':|Parser key \"(\S+)\":": r"\1\2:",
    r"Expected a (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>)": r"expected \1\2",
}
FAULTS = {  # what Lightning and jsonargparse say of a machine, and what helps
    "No supported gpu backend found!": "there is no GPU here: give --trainer.accelerator cpu, or use another machine",
    r"(?s)Does not validate .*(the strategy DeepSpeed needs .*?)\s+Given value type.*": r"\1",
}


class CLI(LightningCLI):
    """LightningCLI over Recovery and RecoveryData."""

    def __init__(self, args: list[str] | None) -> None:
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", action="store_true", help=RESUME)
        return parser

    def fit(self, **kwargs: Any) -> None:
        """Trains, after a look at what an earlier run has left."""
        resume, trainer = self.config["fit"]["resume"], self.trainer
        if rank_zero_only.rank == 0:
            self._tidy()
        with checkpointing.preemptible(trainer.strategy.launcher):
            if resume and self._nothing_left():
                return
            if resume and (path := checkpointing.resume_from(trainer)):
                kwargs["ckpt_path"] = str(path)
                if not checkpointing.is_finished(trainer):
                    for export in self._exports():  # what is there is this run's own, as it was free at the start
                        export.overwrite = True
            elif not kwargs["ckpt_path"]:
                checkpointing.begin_anew(trainer)
            trainer.fit(**kwargs)

    def before_instantiate_classes(self) -> None:
        """Refuses a pruning whose result could not be served, before the model is loaded."""
        config = self.config[cast(str, self.subcommand)]
        for each in config.trainer.callbacks or []:
            if each.class_path.endswith("Prune"):
                parser = LightningArgumentParser(exit_on_error=False)
                parser.add_argument("--method", type=PruningMethod)
                given = parser.parse_object({"method": each.init_args.method.as_dict()})
                method: PruningMethod = cast(Any, parser.instantiate_classes(given)).method
                if method.serve_on or method.tensor_parallel > 1:
                    method.check(load_skeleton(config.model.name_or_path))

    def _tidy(self) -> None:
        """Removes what killed runs have left half-written."""
        for each in cast(Any, self.trainer).callbacks:
            if isinstance(each, checkpointing.Checkpoint):
                clear(each.folder(self.trainer))
            elif isinstance(each, callbacks.Export):
                clear(Path(each.output).absolute().parent, glob.escape(Path(each.output).name))
            elif isinstance(each, callbacks.Prune):
                clear(Path(each.folder or self.trainer.default_root_dir) / "plans")

    def _nothing_left(self) -> bool:
        outputs = [export.output for export in self._exports()]
        done = checkpointing.is_finished(self.trainer) and all(map(os.path.exists, outputs))
        if done and rank_zero_only.rank == 0:
            print(f"this run is finished{''.join(f'; its model is in {output}' for output in outputs)}")
        return done

    def _exports(self) -> list[callbacks.Export]:
        return [each for each in cast(Any, self.trainer).callbacks if isinstance(each, callbacks.Export)]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        cast(Any, trainer).callbacks.insert(0, Watch())
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.config = parser.parse_args(cast(Any, args))  # LightningCLI's own warns of args beside sys.argv


def command_parser(name: str) -> LightningArgumentParser:
    """The parser of a function: its first parameter by position, the others as options, booleans as switches."""
    command = COMMANDS[name]
    helps = {p.arg_name: p.description for p in docstring_parser.parse(command.__doc__ or "").params}
    first, *others = inspect.signature(command).parameters.values()
    switches = [p.name for p in others if p.annotation is bool]
    parser = LightningArgumentParser(prog=f"plprune {name}", description=_short(command), exit_on_error=False)
    parser.add_argument(first.name, type=first.annotation, help=helps[first.name])
    parser.add_function_arguments(command, skip={first.name, *switches}, as_group=False, as_positional=False)
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=helps[switch])
    return parser


def device_called(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: It is not there.
    """
    own = f"cuda:{processes.local_rank()}" if name == "cuda" and processes.launched_count() > 1 else name
    try:
        return torch.empty(0, device=own).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here ({error}): give cpu, cuda or cuda:1") from error


def main(args: list[str] | None = None) -> None:
    """Runs a command, and turns what goes wrong into one line."""
    _quieten()
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
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        sys.exit(_complain(_helpful(str(error)) or type(error).__name__, 1, error))


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
        owners = [("", COMMANDS[command]), *(("method.", each) for each in PruningMethod.__subclasses__())]
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
        COMMANDS[name](**vars(parser.instantiate_classes(parser.parse_args(rest))))
    elif name in STAGES or name.startswith("-"):
        with checkpointing.preemptible() if name == "fit" else contextlib.nullcontext():
            CLI(args)
    else:
        raise ArgumentError(None, f"no command '{name}'; known commands: {', '.join([*STAGES, *COMMANDS])}")


def _overview() -> str:
    commands = STAGES | {name: _short(command) for name, command in COMMANDS.items()}
    listed = "\n".join(f"  {name:<10}{text}" for name, text in commands.items())
    return (
        f"usage: plprune COMMAND [options]\n\n{_short(plprune)}\n\ncommands:\n{listed}\n\n"
        "`plprune COMMAND --help` lists the options of a command, `plprune --version` prints the version."
    )


def _quieten() -> None:
    """Leaves our own lines, and of others' those that a user can act on."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("plprune").setLevel(logging.WARNING if rank_zero_only.rank else logging.INFO)
    for handler in logging.getLogger("lightning.pytorch").handlers:
        handler.addFilter(lambda record: not re.search("Tip:|Detected KeyboardInterrupt", record.getMessage()))
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed guesses, and says so
    warnings.filterwarnings("ignore", ".*(LeafSpec|does not have many workers|dataloader is not resumable).*")
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()


def _short(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _complain(message: str, code: int, error: Exception | None = None) -> int:
    if error is not None and os.environ.get("PLPRUNE_DEBUG"):
        raise error
    print(f"plprune: error: {' '.join(message.split())}", file=sys.stderr)
    return code
