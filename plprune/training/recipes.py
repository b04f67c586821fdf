"""Recipes: configs of whole fits, chosen by name and by the time there is, with what they take and what to expect.

A recipe is a config like any other, in `configs/recipes` of a clone or in the installed package. `plprune fit --recipe
fast --sparsity 0.25 MODEL` is short for `plprune fit --config configs/recipes/fast.yaml --model.name_or_path MODEL
--trainer.callbacks.method.sparsity 0.25`, and says beforehand what it will take. `curve.json` beside the recipes holds
measured perplexities, by `python -m tests.benchmarks.curve`.
"""

import json
import math
import statistics
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plprune
from plprune.checkpoint.load import load_skeleton
from plprune.io.distributed import default_device
from plprune.io.units import format_duration, format_value
from plprune.methods import Request
from plprune.planning import needs, sizes
from plprune.planning.hardware import Machine, machine
from plprune.planning.needs import Need

OPTIONS = {  # of a fit by a recipe, with the options that they are short for
    "recipe": "config",
    "sparsity": "trainer.callbacks.method.sparsity",
    "target_parameters": "trainer.callbacks.target.parameters",
}
HELP = {
    "recipe": "The name of a recipe (fast, balanced, best: for minutes, an hour, a night on two CPU cores and 135M "
    "parameters), or the path of a config. Takes the model as a word of its own: --recipe fast --sparsity 0.25 MODEL. "
    "All other options override the recipe.",
    "sparsity": "With --recipe: the fraction of the blocks' parameters to remove.",
    "target_parameters": "With --recipe, instead of --sparsity: the most parameters of the result, like 100M.",
}
SWITCHES = ("--resume", "--help", "-h", "--print_config")  # options without a value
NEAR = 0.05  # the largest distance of a sparsity from a measured one


@dataclass(frozen=True)
class Point:
    """A measured perplexity of a pruned and recovered model.

    Args:
        model: The model.
        text: The text that the perplexity was measured on.
        method: The name of the method.
        repair: The repair of consumers.
        sparsity: The fraction of the blocks' parameters that was removed.
        windows: The calibration windows, like 64 x 512.
        recovery: What was trained: :func:`recovery_kind`.
        tokens: The tokens that it was trained on; 0 before recovery.
        run: The tokens of the whole run; at fewer, the learning rate had not fallen yet.
        ratio: The perplexity over that of the dense model.
        seed: The seed.
    """

    model: str
    text: str
    method: str
    repair: str
    sparsity: float
    windows: str
    recovery: str
    tokens: int
    run: int
    ratio: float
    seed: int = 0

    @property
    def way(self) -> tuple[str, str, str]:
        """What was done, without how much of it."""
        return self.method, self.repair, self.recovery if self.tokens else ""


def recovery_kind(train: str, distilled: bool) -> str:
    """Names a kind of recovery: what is trained, and whether from the dense model too."""
    return f"{train}, distilled" if distilled else train


def folder() -> Path:
    """The folder of the recipes that come with plprune."""
    package = Path(plprune.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "configs" / "recipes"


def find(name: str) -> Path:
    """The file of a recipe, given by its name or path.

    Raises:
        ValueError: There is none.
    """
    known = {path.stem: path for path in sorted(folder().glob("*.yaml"))}
    path = known.get(name, Path(name).expanduser())
    if not path.is_file():
        raise ValueError(f"there is no recipe {name!r}: give {', '.join(known)}, or the path of a config")
    return path


def expanded(args: Sequence[str]) -> list[str]:
    """Replaces the options of a recipe by those that they are short for; other arguments stay as they are.

    Args:
        args: The arguments of a fit.

    Raises:
        ArgumentError: The model is missing or given twice, or an option has no value.

    Example:
        >>> expanded(["fit", "--trainer.max_steps", "9", "model", "--resume"])
        ['fit', '--trainer.max_steps', '9', 'model', '--resume']
    """
    if not any(each.partition("=")[0] == "--recipe" for each in args):
        return list(args)
    given: dict[str, str] = {}
    rest, words = list[str](), list[str]()
    left = iter(args[1:])
    for each in left:
        name, equals, value = each.partition("=")
        if not each.startswith("-"):
            words.append(each)
        elif name in SWITCHES:
            rest.append(each)
        else:
            value = value if equals else next(left, "")
            if not value and not equals:
                raise ArgumentError(None, f"{name} has no value")
            if name[2:] in OPTIONS:
                given[name[2:]] = value
            elif name == "--data" and not value.endswith((".yaml", ".yml")):
                rest.append(f"--data.train={value}")
            else:
                rest.append(f"{name}={value}")
    if len(words) > 1:
        raise ArgumentError(None, f"the model is given more than once: {', '.join(words)}")
    if len(given) == len(OPTIONS):
        raise ArgumentError(None, "--sparsity and --target_parameters exclude each other: give one")
    path = find(given.pop("recipe"))
    last = [f"--model.name_or_path={word}" for word in words]
    last += [f"--{OPTIONS[name]}={value}" for name, value in given.items()]
    return [args[0], f"--config={path}", *rest, *last]


def points(path: Path | None = None) -> list[Point]:
    """The measured points of a file; of `curve.json` beside the recipes, if not given."""
    path = path or folder() / "curve.json"
    return [Point(**each) for each in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def expectation(known: Sequence[Point], wanted: Point) -> str:
    """Says what a recipe can be expected to reach, by the nearest measured points.

    Args:
        known: The measured points.
        wanted: What will be done; its result is not looked at.
    """
    alike = [p for p in known if p.way == wanted.way and abs(p.sparsity - wanted.sparsity) <= NEAR]

    def distance(point: Point) -> tuple[float, float, float]:
        calibrated = math.log(_tokens(point.windows) / _tokens(wanted.windows))
        tokens = math.log((1000 + point.tokens) / (1000 + wanted.tokens))
        return abs(tokens), abs(calibrated), abs(point.sparsity - wanted.sparsity)

    if not alike:
        return "what to expect has not been measured for this method, repair, recovery and sparsity"
    best = min(map(distance, alike))
    nearest = [point for point in alike if distance(point) == best]
    first, ratio = nearest[0], statistics.mean(point.ratio for point in nearest)
    trained = f"{first.recovery} on {format_value(first.tokens, 'short')} tokens" if first.tokens else "no recovery"
    return (
        f"nearest measured: {ratio:.2f} times the dense perplexity, for {first.model} on {first.text}, by "
        f"{first.method} with repair {first.repair} at {first.sparsity:.1%}, calibrated on {first.windows} tokens, "
        f"{trained} "
        f"({_seeds(len(nearest))}); other models and texts differ"
    )


def forecast(request: Request, model: Any, data: Any, trainer: Any) -> str:
    """Says what a fit will take on this machine, and what to expect of it.

    Args:
        request: The pruning.
        model: The options of `Recovery`.
        data: The options of `RecoveryData`.
        trainer: The options of the trainer.
    """
    network = load_skeleton(model.name_or_path, model.dtype)
    where = machine("cpu" if trainer.accelerator == "cpu" else default_device())
    resolved, length = request.resolve_target(network), data.calibration_seq_len or data.seq_len
    method, count = resolved.method, data.num_samples
    windows = (count, length, data.calibration_batch_size)
    pruned = sizes.pruned_skeleton(network, resolved.predict_sizes(network)[0], method.biased)
    parts = {"pruning": needs.calibration_need(network, resolved.work(network, count, length), where, windows)}
    batches = max(0, trainer.max_steps) * trainer.accumulate_grad_batches
    tokens = batches * data.batch_size * data.seq_len
    if batches:
        training, rank = (batches, data.batch_size, data.seq_len), None if model.train == "all" else model.lora.rank
        parts["recovery"] = needs.recovery_need(pruned, where, training, rank, model.gradient_checkpointing)
    if model.distill and tokens:
        parts["teacher"] = _reading(network, tokens, data.seq_len, where)
    if data.max_windows:  # dense, pruned and recovered
        parts["evaluation"] = _reading(network, 3 * data.max_windows * data.seq_len, data.seq_len, where)
    wanted = Point(
        "", "", type(method).__name__, getattr(method, "repair", "none"), method.sparsity, f"{count} x {length}",
        recovery_kind(model.train, bool(model.distill)), tokens, tokens, 0.0,
    )  # fmt: skip
    return "\n".join([_what(wanted), _costs(parts, where), expectation(points(), wanted)])


def _reading(network: Any, tokens: int, length: int, where: Machine) -> Need:
    """What it takes to run a model on some tokens."""
    weights = sum(p.numel() for p in network.parameters()) * network.dtype.itemsize
    seconds = tokens * sizes.structure(network, length).reading_flops / where.rate(network.dtype)
    return Need(seconds, weights, weights)


def _what(wanted: Point) -> str:
    trained = f"then {wanted.recovery} on {format_value(wanted.tokens, 'short')} tokens"
    return (
        f"{wanted.method} with repair {wanted.repair} at sparsity {wanted.sparsity:.3g}, on {wanted.windows} tokens; "
        f"{trained if wanted.tokens else 'no recovery, or one whose length is not known before'}"
    )


def _costs(parts: dict[str, Need], where: Machine) -> str:
    listed = ", ".join(f"{name} {format_duration(need.seconds)}" for name, need in parts.items())
    total, most = sum(need.seconds for need in parts.values()), max(need.device_bytes for need in parts.values())
    fits = "" if most <= where.memory else f", but there are {format_value(where.memory, 'bytes')}"
    return (
        f"on {where.name}: about {format_duration(total)} within a factor of two ({listed}), and "
        f"{format_value(most, 'bytes')} of memory{fits}"
    )


def _tokens(windows: str) -> int:
    """The number of tokens in windows like 64 x 512."""
    count, length = windows.split(" x ")
    return int(count) * int(length)


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean of {count}"
