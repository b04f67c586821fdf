"""What is compared, and the protocol."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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


@dataclasses.dataclass(frozen=True)
class Training:
    """A way in which every pruned model is recovered.

    Args:
        text: What it is trained on, as for `RecoveryData`.
        steps: Optimizer steps.
        seq_len: Tokens of a window.
        batch_size: Windows of a step.
        learning_rate: Peak of the learning rate.
        lora: The adapters.
        train: What is trained: adapters (lora), or the projections whose inputs were pruned (consumers).
        distill: How the dense model is learnt from; not at all if not given.
        name: What the models that it recovers are called, beside `dense` and `pruned`.
        rounds: In how many rounds of pruning and recovery the sparsity is reached; they share the steps. If more than
            one, the model is not the one that is `pruned`, but pruned by the same method to the same sparsity.
    """

    text: str
    steps: int = 50
    seq_len: int = 256
    batch_size: int = 4
    learning_rate: float = 5e-4
    lora: LoRA = dataclasses.field(default_factory=LoRA)
    train: Literal["lora", "consumers"] = "lora"
    distill: Distillation | None = None
    name: str = "recovered"
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """What prunings are calibrated on.

    Args:
        text: As for `RecoveryData`.
        num_samples: Calibration windows.
        seq_len: Tokens of one.
        name: What it is called; made of the others if not given.
    """

    text: str
    num_samples: int = 32
    seq_len: int = 256
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{short_name(self.text)} {self.num_samples} x {self.seq_len}")


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and the protocol.

    Args:
        models: Names or paths.
        methods: Methods; each is taken at every sparsity.
        sparsities: Fractions of the blocks' parameters to remove.
        serve_on: Where every result must load.
        tensor_parallel: Devices that will share it.
        seeds: Of calibration windows and recovery.
        text: What perplexity is measured on, of several texts on each; the first is the one that is plotted.
        calibration: What is calibrated on; of several, every pruning is taken with each.
        join: Put between the rows of each of these texts.
        num_samples: Calibration windows, where only the text of them is given.
        calibration_seq_len: Tokens of one, likewise.
        protocol: How perplexity is measured; its `bos` is of calibration and recovery too.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used.
        recover: How pruned models are recovered, each in every one of these ways; they are not if not given. The first
            is the one that is plotted.
        tasks: lm-eval tasks, groups and tags.
        task_data: Folder with the tasks' data.
        limit: Examples of each task.
        max_batch: The largest batch that speed is measured at; it is not measured if not given.
        dtype: Of the weights; as each model is stored if not given, and float32 for a `.gguf` file.
        device: Where to compute.
    """

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
        """Makes sure, before anything is loaded, that all of it can be done.

        Raises:
            ValueError: It cannot.
        """
        needed = ("models", "methods", "sparsities", "text", "calibration", "seeds")
        empty = [name for name in needed if not getattr(self, name)]
        if empty:
            raise ValueError(f"nothing to compare: `{empty[0]}` is empty")
        for method in self.methods:
            self.request(method)
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
        """What perplexity is measured on."""
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @property
    def texts(self) -> dict[str, str]:
        """These by short names, or by their own where two texts would have the same."""
        short = [short_name(source) for source in self.sources]
        return {n if short.count(n) == 1 else source: source for n, source in zip(short, self.sources, strict=True)}

    @property
    def labels(self) -> dict[str, str]:
        """What models are called: the last parts of their names, as many as tell them apart."""
        parts = {name: Path(name.removesuffix(".gguf")).parts for name in self.models}
        for depth in range(1, max(map(len, parts.values())) + 1):
            found = {name: "/".join(own[-depth:]) for name, own in parts.items()}
            if len(set(found.values())) == len(parts):
                return found
        return {name: name for name in self.models}

    @property
    def calibrations(self) -> list[CalibrationText]:
        """What is calibrated on."""
        if isinstance(self.calibration, str):
            return [CalibrationText(self.calibration, self.num_samples, self.calibration_seq_len)]
        return list(self.calibration)

    @property
    def recoveries(self) -> list[Training]:
        """How pruned models are recovered."""
        return [self.recover] if isinstance(self.recover, Training) else list(self.recover or [])

    @property
    def stages(self) -> list[str]:
        """In which states each pruned model is judged."""
        return ["pruned", *(training.name for training in self.recoveries)]

    @property
    def size(self) -> int:
        """How many cells there are."""
        return len(self.models) * (1 + len(self.stages) * len(self.prunings()))

    def prunings(self) -> list[tuple[CalibrationText, int, PruningMethod]]:
        """Every calibration and seed with every method at every sparsity."""
        return [
            (text, seed, dataclasses.replace(method, sparsity=sparsity))
            for text in self.calibrations
            for seed in self.seeds
            for method in self.methods
            for sparsity in self.sparsities
        ]

    def request(self, method: PruningMethod) -> Request:
        """A pruning by a method, with what all of them must be like."""
        return Request(method, serve_on=self.serve_on, tensor_parallel=self.tensor_parallel)


def short_name(source: str) -> str:
    """A text by the last part of its name.

    Example:
        >>> short_name("Salesforce/wikitext:wikitext-2-raw-v1:test"), short_name("data/c4.jsonl")
        ('wikitext', 'c4')
    """
    path = Path(source.partition(":")[0])
    return path.stem if path.suffix in READERS else path.name


def check_distinct(what: str, names: Sequence[str]) -> None:
    """Raises ValueError if two of a kind have one name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`{what}` has {twice!r} twice: give each its own name")
