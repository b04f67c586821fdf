r"""Distillation: a pruned model learns what the dense one says of a text, beside what the text says next.

The dense model, the teacher, says the same of the same window every time, and would take as much memory as it has
weights. So it is asked once for each window before training, what it says is kept on disk, and the model is freed.

**Logits.** Of the vocabulary, the teacher's k likeliest tokens :math:`t_1, \dots, t_k` at a position are events of
their own, and all other tokens together are one more: what is left to them goes in one bucket, so that the
probabilities of these k + 1 events sum to 1, in both models.

.. math:: p_i = \frac{e^{z_{t_i} / T}}{\sum_v e^{z_v / T}}, \qquad
    p_{k + 1} = \frac{\sum_{v \notin \{t_1, \dots, t_k\}} e^{z_v / T}}{\sum_v e^{z_v / T}}, \qquad
    L = \frac{T^2}{N} \sum_t \sum_{i = 1}^{k + 1} q_{t,i} \log \frac{q_{t,i}}{p_{t,i}}

where q is for the teacher what p is for the model. With k the size of the vocabulary there is no bucket, and L is the
divergence of the whole distributions (https://arxiv.org/abs/1503.02531; the factor keeps gradients as large at any T).

**Hidden states.** Pruning leaves the width of the residual stream as it is, so what leaves a block can be compared as
it is. Over :data:`BLOCKS` blocks S, evenly spaced, the last of the model included:

.. math:: L = \frac{1}{|S|} \sum_{l \in S}
    \frac{\sum_t \lVert h_{l,t} - h'_{l,t} \rVert^2}{\sum_t \lVert h'_{l,t} \rVert^2}

Positions t are those whose next token counts in the loss; N is their number. All sums over t are over the batches of
one step of the optimizer, however many of them are accumulated, and in however many processes.

Symbols: z logits, v the vocabulary, T temperature, h and h' what leaves a block of the model and of the teacher,
b windows of a batch, s tokens of a window, d model width, k tokens, n blocks that are compared.
"""

import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_skeleton
from plprune.checkpoint.stored import Dtype
from plprune.io.atomic import staged
from plprune.io.cache import digest
from plprune.io.checks import check_sizes
from plprune.io.progress import Progress
from plprune.io.text import IGNORED
from plprune.io.units import format_value
from plprune.pruning.losses import Criterion, divergence, model_inputs, top_k_log_probs
from plprune.pruning.plan import PruningPlan, fingerprint

log = logging.getLogger(__name__)
Answers = dict[str, Tensor]  # what a teacher says: log-probabilities, tokens, hidden
BLOCKS = 4  # whose outputs are compared, at most
LEAST = -6e4  # a log-probability that float16 can hold


@dataclass(frozen=True)
class Distillation:
    """Learning from the dense model, which is asked once for each training window before training, and then freed.

    What it says is kept under `teacher/` in the trainer's `default_root_dir`, by the content of model and window, where
    a resumed or a second run finds it: about 6 bytes a token for each of `top_k`, and 2 for each value of a hidden
    state. With another data module than `RecoveryData`, a window is asked for when it is first trained on, and the
    teacher stays in memory to the end of that epoch. Not under ZeRO-3 and FSDP2.

    Args:
        of: What is learnt: the distribution of the next token (logits), the outputs of four blocks (hidden), or both in
            equal parts.
        temperature: By which logits are divided: above 1, what is unlikely counts more.
        weight: The share of distillation in the loss, in [0, 1]; the rest is the loss of the next token.
        top_k: The teacher's likeliest tokens that count one by one; all others count together.
        teacher: Name or path of the dense model; if not given, the model before it was pruned, wherever its plan says
            that it was loaded from.
    """

    of: Literal["logits", "hidden", "both"] = "logits"
    temperature: float = 1.0
    weight: float = 0.5
    top_k: int = 64
    teacher: str | None = None

    def __post_init__(self) -> None:
        check_sizes(top_k=self.top_k)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"the weight of distillation is {self.weight}, but it is a share in [0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature of distillation is {self.temperature}, but must be a number above 0")

    @property
    def events(self) -> bool:
        """Whether the distribution of the next token is learnt."""
        return self.of != "hidden"

    def blocks(self, count: int) -> list[int]:
        """Which of a model's blocks are compared.

        Example:
            >>> Distillation("hidden").blocks(30), Distillation("hidden").blocks(3), Distillation("logits").blocks(30)
            ([6, 14, 21, 29], [0, 1, 2], [])
        """
        n = 0 if self.of == "logits" else min(BLOCKS, count)
        return [(i + 1) * count // n - 1 for i in range(n)]

    def criterion(self, answers: Answers, positions: Tensor) -> Criterion:  # [n]
        """How far a model's distributions are from the teacher's, at positions of the windows that it answered for."""
        values, tokens = (answers[name] for name in ("values", "tokens"))
        of = positions - positions // (values.shape[1] + 1)  # there is no answer to a window's last token
        values, tokens = values.flatten(0, 1)[of], tokens.flatten(0, 1)[of]
        return lambda logits, where: divergence(logits, values[where], tokens[where], self.temperature)


def loss_denominators(labels: Tensor, answers: Answers) -> Tensor:  # [1 + n]
    """What the losses of some windows are divided by: how many tokens count, and what a teacher's states measure there.

    Example:
        >>> loss_denominators(torch.tensor([[5, 6, -100, 7]]), {"hidden": torch.ones(1, 1, 3, 8)})
        tensor([ 2., 16.])
    """
    counts, hidden = labels[:, 1:] != IGNORED, answers.get("hidden")
    norms = [] if hidden is None else [_squares(theirs.float(), counts) for theirs in hidden.unbind(1)]
    return torch.stack([counts.sum().float(), *norms])


def hidden_distances(
    states: Sequence[Tensor], labels: Tensor, hidden: Tensor
) -> Tensor:  # [b, s, d] each, [b, n, s - 1, d] -> [n]
    """The squared distances of what leaves blocks from a teacher's, summed."""
    counts = labels[:, 1:] != IGNORED
    both = zip(states, hidden.unbind(1), strict=True)
    return torch.stack([_squares(own[:, :-1].float() - theirs.float(), counts) for own, theirs in both])


def _squares(values: Tensor, counts: Tensor) -> Tensor:  # [b, t, d], [b, t]
    """Summed where they count, without having a GPU waited for."""
    return (values.square().sum(-1) * counts).sum()


@contextlib.contextmanager
def recorded_outputs(model: PreTrainedModel, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """What leaves some blocks, in depth order, for the time of the context."""
    found: list[Tensor] = []

    def record(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    own = blocks_of(model)
    handles = [own[i].module.register_forward_hook(record) for i in blocks]
    try:
        yield found
    finally:
        for handle in handles:  # before a backward pass, which may run the blocks again
            handle.remove()


@dataclass(frozen=True)
class TeacherModel:
    """Which model a teacher is.

    Args:
        name: Name or path.
        weights: The fingerprint of its weights; whatever is there if not given.
        dtype: In which it has that.
    """

    name: str
    weights: str | None
    dtype: Dtype

    def load(self, dtype: Dtype) -> PreTrainedModel:
        """The model, in a dtype.

        Raises:
            ValueError: It is not there, or is another.
        """
        remedy = "name the dense model by model.distill.teacher"
        try:
            model = load_model(self.name, self.dtype)
        except ValueError as error:
            raise ValueError(f"there is no teacher: {error}; {remedy}") from error
        if self.weights not in (None, fingerprint(model.named_parameters())):
            raise ValueError(f"{self.name} is not the model that was pruned, so it cannot be the teacher: {remedy}")
        for parameter in model.parameters():  # but not what is computed, like rotary frequencies
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model


def choose_teacher(
    settings: Distillation, plan: PruningPlan | None, name: str, weights: str | None, dtype: Dtype
) -> TeacherModel:
    """Which model is the teacher of one that was loaded by a name, and pruned by a plan if there is one.

    Args:
        settings: What is asked for.
        plan: The model's.
        name: What it was loaded by.
        weights: Its fingerprint, if it was not pruned.
        dtype: Of its weights.
    """
    if settings.teacher is not None:
        return TeacherModel(settings.teacher, None, dtype)
    if plan is None:
        return TeacherModel(name, weights, dtype)
    first = plan.chain()[0]
    made_in = str(first.config.get("dtype")).removeprefix("torch.")
    known = cast(Dtype, made_in) if made_in in get_args(Dtype) else dtype
    return TeacherModel(first.origin.get("model", name), first.origin.get("weights"), known)


def check_teacher(settings: Distillation, model: PreTrainedModel) -> None:
    """Makes sure, before anything is computed, that a teacher that was named is there and can teach a model.

    Raises:
        ValueError: It cannot.
    """
    if settings.teacher is None:
        return
    theirs, ours = load_skeleton(settings.teacher).config, model.config
    names = ["vocab_size", *(["hidden_size", "num_hidden_layers"] if settings.of != "logits" else [])]
    for name in names:
        if getattr(theirs, name) != getattr(ours, name):
            raise ValueError(
                f"{settings.teacher} cannot be the teacher, as its {name} is {getattr(theirs, name)} and the model's "
                f"{getattr(ours, name)}: name the dense model by model.distill.teacher"
            )


class Teacher:
    """What a dense model says of windows, each of which it is asked for once; the answers are kept on disk.

    It is asked window by window, so that an answer does not depend on what else is in a batch.

    Args:
        settings: What is learnt.
        source: Which model it is.
        dtype: Of its weights when it is asked.
        device: Where it is asked.
        folder: Under which answers are kept.
    """

    def __init__(
        self, settings: Distillation, source: TeacherModel, dtype: Dtype, device: torch.device, folder: Path
    ) -> None:
        self.settings, self.source, self.dtype, self.device, self.root = settings, source, dtype, device, folder
        self._model: PreTrainedModel | None = None

    def prepare(self, windows: Iterable[dict[str, Tensor]], quiet: bool = False) -> None:  # [1, s] each
        """Asks for all windows that have no answer yet, and frees the model."""
        files = {self.file(given): given for given in map(model_inputs, windows)}
        lacking = {file: given for file, given in files.items() if not file.exists()}
        with Progress(len(lacking), "asking the teacher", "window", quiet=quiet) as progress:
            for i, (file, given) in enumerate(lacking.items()):
                self._ask(file, given)
                progress.update()
                if not i and not quiet:
                    size = format_value(file.stat().st_size * len(lacking), "bytes")
                    log.info("what %s says of %d windows: %s in %s", self.source.name, len(lacking), size, self.folder)
        self.free()

    @torch.autocast("cpu", enabled=False)  # in which float16 cannot be stacked
    def answers(self, given: dict[str, Tensor]) -> Answers:  # [b, s] each
        """What the teacher says of each window of a batch."""
        found, device = [], given["input_ids"].device
        for rows in zip(*(each.cpu().split(1) for each in given.values()), strict=True):
            row = dict(zip(given, rows, strict=True))
            if not (file := self.file(row)).exists():
                self._ask(file, row)
            found.append(load_file(file))
        return {name: torch.stack([each[name] for each in found]).to(device) for name in found[0]}

    def free(self) -> None:
        """Removes the model from memory, if it is there."""
        if self._model is not None:
            self._model = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @cached_property
    def folder(self) -> Path:
        """Where the answers to these settings are."""
        of: dict[str, object] = {"of": self.settings.of, "dtype": self.dtype, "blocks": BLOCKS}
        of["weights"] = self.source.weights or fingerprint(self._loaded().named_parameters())
        if self.settings.events:
            of |= {"top_k": self.settings.top_k, "temperature": self.settings.temperature}
        return self.root / digest(of)

    def file(self, given: dict[str, Tensor]) -> Path:  # [1, s] each
        """Where the answer to a window is, or would be."""
        name = fingerprint(((name, each[0]) for name, each in given.items()), values=1 << 30)
        return self.folder / name[:2] / f"{name}.safetensors"  # few files a folder, as `staged` looks through it

    @torch.no_grad()
    def _ask(self, file: Path, given: dict[str, Tensor]) -> None:
        model, settings, answer = self._loaded(), self.settings, {}
        blocks = settings.blocks(len(blocks_of(model)))
        fewer = {} if settings.events else {"logits_to_keep": 1}  # the head costs time for each
        with recorded_outputs(model, blocks) as states:
            on_device = {name: each.to(self.device) for name, each in given.items()}
            logits = model(**on_device, use_cache=False, **fewer).logits[0, :-1]
        if settings.events:
            values, tokens = top_k_log_probs(logits, settings.top_k, settings.temperature)
            answer |= {"values": values.clamp(min=LEAST).half().cpu(), "tokens": tokens.int().cpu()}
        if blocks:
            answer["hidden"] = torch.cat(states)[:, :-1].bfloat16().cpu().contiguous()
        with staged(file, overwrite=True) as temporary:  # another process may have been as fast
            save_file(answer, temporary)

    def _loaded(self) -> PreTrainedModel:
        if self._model is None:
            random = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(random):  # a run that finds all answers draws the same numbers
                self._model = self.source.load(self.dtype).to(self.device)  # type: ignore[arg-type]
        return self._model
