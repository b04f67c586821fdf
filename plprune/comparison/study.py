"""The settings of a comparison, and the list of prunings that they require."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from plprune.checkpoint.stored import Dtype
from plprune.evaluation.lm_eval import check_tasks
from plprune.evaluation.perplexity import Protocol
from plprune.io.checks import check_max_dropped, check_non_negative, check_seed, check_sizes
from plprune.io.readers import READERS, check_text
from plprune.io.text import MAX_DROPPED
from plprune.methods import PruningMethod, Request
from plprune.planning.serving import Runtime
from plprune.recovery.distillation import Distillation
from plprune.recovery.lora import LoRA
from plprune.recovery.whole_weights import Train


@dataclasses.dataclass(frozen=True)
class Training:
    """A way to recover pruned models.

    Args:
        text: Training text, as for `RecoveryData`.
        steps: Optimizer steps.
        seq_len: Tokens of a window.
        batch_size: Windows of a step.
        learning_rate: Peak of the learning rate.
        lora: The adapters.
        train: The weights to train: adapters (lora), the projections whose inputs were pruned (consumers), the routers
            of mixtures of experts (routers), or all of the text decoder (all).
        distill: Distillation from the dense model; none if not given.
        name: Names the stage of the recovered models, beside `dense` and `pruned`.
        rounds: Number of rounds of pruning and recovery that reach the sparsity; they share the steps. With more than
            one, the recovered model is not the one of the stage `pruned`, but one pruned anew to the same sparsity.
    """

    text: str
    steps: int = 50
    seq_len: int = 256
    batch_size: int = 4
    learning_rate: float = 5e-4
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    train: Train = "lora"
    distill: Distillation | None = None
    name: str = "recovered"
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """A calibration set.

    Args:
        text: As for `RecoveryData`.
        num_samples: Number of windows.
        seq_len: Tokens of a window.
        name: Its name in results; made of the other settings if not given.
    """

    text: str
    num_samples: int = 32
    seq_len: int = 256
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{short_name(self.text)} {self.num_samples} x {self.seq_len}")


class Pruning(NamedTuple):
    """One pruning of a study."""

    text: CalibrationText
    seed: int
    request: Request


@dataclasses.dataclass(frozen=True)
class Study:
    """The settings of a comparison: those of `plprune compare`, whose help describes each, with the protocol as one."""

    models: Sequence[str]
    methods: Sequence[PruningMethod]
    sparsities: Sequence[float]
    text: str | Sequence[str]
    calibration: str | Sequence[CalibrationText]
    seeds: Sequence[int] = (0,)
    serve_on: Sequence[Runtime] = ()
    tensor_parallel: int = 1
    join: str | None = None
    num_samples: int = 32
    calibration_seq_len: int = 256
    protocol: Protocol = dataclasses.field(default_factory=Protocol)
    max_dropped: float = MAX_DROPPED
    recover: Training | Sequence[Training] | None = None
    tasks: Sequence[str] = ()
    task_data: str | None = None
    limit: int | None = None
    max_batch: int | None = None
    dtype: Dtype | None = None
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    def check(self) -> None:
        """Makes sure, before anything is loaded, that all settings are valid and all texts and tasks exist.

        Raises:
            ValueError: They do not.
        """
        for name in ("models", "methods", "sparsities", "text", "calibration", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"nothing to compare: `{name}` is empty")
        self.prunings()
        for each in self.calibrations:
            check_sizes(num_samples=each.num_samples, calibration_seq_len=each.seq_len)
        for each in self.recoveries:
            check_sizes(steps=each.steps, rounds=each.rounds, seq_len=each.seq_len, batch_size=each.batch_size)
            check_non_negative(learning_rate=each.learning_rate)
            if each.rounds > each.steps:
                raise ValueError(f"{each.rounds} rounds share steps, of which there are {each.steps}: give more")
        check_sizes(limit=self.limit, max_batch=self.max_batch)
        check_max_dropped(self.max_dropped)
        for seed in self.seeds:
            check_seed(seed)
        for source in (*self.sources, *(each.text for each in (*self.calibrations, *self.recoveries))):
            check_text(source)
        check_distinct("models", self.models)
        check_distinct("text", self.sources)
        check_distinct("calibration", [each.name for each in self.calibrations])
        check_distinct("recover", ["dense", *self.stages])
        if self.tasks:
            check_tasks(self.tasks, self.task_data)

    @property
    def sources(self) -> list[str]:
        """The texts for perplexity."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def texts(self) -> dict[str, str]:
        """The texts for perplexity by short names, or by full names where short ones would be equal."""
        short = [short_name(source) for source in self.sources]
        return {n if short.count(n) == 1 else source: source for n, source in zip(short, self.sources, strict=True)}

    @property
    def labels(self) -> dict[str, str]:
        """Short names of the models: the last parts of their paths, as many as make them distinct."""
        parts = {name: Path(name.removesuffix(".gguf")).parts for name in self.models}
        for depth in range(1, max(map(len, parts.values())) + 1):
            labels = {name: "/".join(own[-depth:]) for name, own in parts.items()}
            if len(set(labels.values())) == len(parts):
                return labels
        return {name: name for name in self.models}

    @property
    def calibrations(self) -> list[CalibrationText]:
        """The calibration sets."""
        if isinstance(self.calibration, str):
            return [CalibrationText(self.calibration, self.num_samples, self.calibration_seq_len)]
        return list(self.calibration)

    @property
    def recoveries(self) -> list[Training]:
        """The recoveries; possibly none."""
        return [self.recover] if isinstance(self.recover, Training) else list(self.recover or [])

    @property
    def stages(self) -> list[str]:
        """The stages at which each pruned model is measured."""
        return ["pruned", *(training.name for training in self.recoveries)]

    @property
    def size(self) -> int:
        """The number of cells."""
        return len(self.models) * (1 + len(self.stages) * len(self.prunings()))

    def prunings(self) -> list[Pruning]:
        """Every method at every sparsity, with every seed and calibration set."""
        return [
            Pruning(text, seed, Request(method, serve_on=self.serve_on, tensor_parallel=self.tensor_parallel))
            for text in self.calibrations
            for seed in self.seeds
            for method in (dataclasses.replace(each, sparsity=s) for each in self.methods for s in self.sparsities)
        ]


def short_name(source: str) -> str:
    """The last part of a text's name.

    Example:
        >>> short_name("Salesforce/wikitext:wikitext-2-raw-v1:test"), short_name("data/c4.jsonl")
        ('wikitext', 'c4')
    """
    path = Path(source.partition(":")[0])
    return path.stem if path.suffix in READERS else path.name


def check_distinct(what: str, names: Sequence[str]) -> None:
    """Raises ValueError if two names are equal."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`{what}` has {twice!r} twice: give each another name")
