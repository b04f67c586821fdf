"""The command line: LightningCLI for fit, validate and test, jsonargparse for the other commands. Wiring only."""

import difflib
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import docstring_parser
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import plprune
from plprune import callbacks, methods
from plprune.atomic import check_free
from plprune.calibration import Calibration
from plprune.checkpoint import Dtype, load_model, load_tokenizer, save_pruned
from plprune.data import PYDOC, RecoveryData, check_source, draw, pack, tokenised
from plprune.evaluation import measure, table
from plprune.methods import PruningMethod
from plprune.recovery import Recovery


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
    offload: bool = False,
    seed: int = 0,
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
        device: Where the current block is calibrated: cpu, cuda, cuda:1.
        offload: Whether hidden states wait on the CPU, to save memory on the device.
        seed: Of the choice of windows.
        overwrite: Whether to replace what is in the output folder.
    """
    check_free(output, overwrite)
    check_source(text)
    tokenizer = load_tokenizer(model)
    windows = draw(tokenised(text, tokenizer, join, seed=seed)[0], num_samples, seq_len, seed)
    network = load_model(model, dtype)
    calibration = Calibration(list(windows.split(batch_size)), torch.device(device), offload)
    plan = methods.prune(network, method, calibration, seed)
    save_pruned(network, output, tokenizer, overwrite)
    print(f"{callbacks.summary(plan)}; saved to {output}")


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
    check_source(text)
    ids = pack(tokenised(text, load_tokenizer(model), join), seq_len, "evaluation").tensors[0][:max_windows]
    row = measure(load_model(model, dtype).to(device), list(ids.split(1)))  # type: ignore[arg-type]
    print(table({"model": row}))
    print(f"perplexity over {len(ids)} windows of {seq_len} tokens of {text}, windows do not overlap, no BOS")


COMMANDS: dict[str, Callable[..., None]] = {"prune": prune, "evaluate": evaluate}


class Parser(LightningArgumentParser):
    """A parser whose errors name the near match."""

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        if os.environ.get("PLPRUNE_DEBUG") and ex is not None:
            raise ex
        message = with_near_match(_one_line(message), list(self._option_string_actions))
        sys.exit(_complain(f"{message}; see {self.prog.replace(' [options]', '')} --help", 2))


class CLI(LightningCLI):
    """LightningCLI over Recovery and RecoveryData."""

    def __init__(self, args: list[str] | None) -> None:
        super().__init__(
            Recovery,
            RecoveryData,
            auto_configure_optimizers=False,  # it would build the optimizer before Prune's setup
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        others = "".join(f"\n  plprune {name:<10}{_short(command)}" for name, command in COMMANDS.items())
        kwargs["description"] = f"{_short(plprune)}\n\nmore commands, each with its own --help:{others}"
        return super().init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {c: a for c, a in LightningCLI.subcommands().items() if c in ("fit", "validate", "test")}


def command_parser(name: str, command: Callable[..., None]) -> Parser:
    """The parser of a function: its first parameter by position, the others as options, booleans as switches."""
    text = docstring_parser.parse(command.__doc__ or "")
    helps = {p.arg_name: p.description for p in text.params}
    first, *others = inspect.signature(command).parameters.values()
    switches = [p.name for p in others if p.annotation is bool]
    parser = Parser(prog=f"plprune {name}", description=_short(command))
    parser.add_argument(first.name, type=first.annotation, help=helps[first.name])
    parser.add_function_arguments(command, skip={first.name, *switches}, as_group=False, as_positional=False)
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=helps[switch])
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs a command, and turns what goes wrong into one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(args)
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; nothing half-written is left behind", 130))
    except (ValueError, OSError, ImportError, MisconfigurationException) as error:
        if os.environ.get("PLPRUNE_DEBUG"):
            raise
        sys.exit(_complain(_one_line(error), 1))


def with_near_match(message: str, options: list[str]) -> str:
    """An error message, with the option that was probably meant.

    Example:
        >>> with_near_match("Unrecognized arguments: --sparsty", ["--sparsity", "--seed"])
        'Unrecognized arguments: --sparsty; did you mean --sparsity?'
    """
    for word in re.findall(r"--[\w.+-]+", message):
        near = difflib.get_close_matches(word, options, 1)
        if near and word not in options:
            return f"{message}; did you mean {near[0]}?"
    return message


def _run(args: list[str] | None) -> None:
    name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if name not in COMMANDS:
        CLI([name] if name == "--help" else args)
        return
    parser = command_parser(name, COMMANDS[name])
    COMMANDS[name](**vars(parser.instantiate_classes(parser.parse_args(rest))))


def _short(thing: object) -> str:
    return (thing.__doc__ or "").strip().partition("\n")[0]


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _complain(message: str, code: int) -> int:
    print(f"plprune: error: {message}", file=sys.stderr)
    return code
