r"""Distillation: a pruned model learns from the dense model, its teacher, in addition to the next tokens of a text.

The teacher's outputs for a window never change, and the teacher takes as much memory as its weights. Therefore it
answers each window once before training, the answers are stored on disk, and the teacher is freed. Processes share the
windows. Where they hold shards of the model, they hold shards of the teacher as well, and answer in step.

**Logits.** The teacher's k likeliest tokens :math:`t_1, \dots, t_k` at a position are k events, and all other tokens
together are one more. The loss is the divergence of the model's distribution p over these events from the teacher's q:

.. math:: p_i = \frac{e^{z_{t_i} / T}}{\sum_v e^{z_v / T}}, \qquad
    p_{k + 1} = 1 - \sum_{i = 1}^k p_i, \qquad
    L = \frac{T^2}{N} \sum_t \sum_{i = 1}^{k + 1} q_{t,i} \log \frac{q_{t,i}}{p_{t,i}}

If k is the vocabulary size, L is the divergence of the full distributions (https://arxiv.org/abs/1503.02531). The
factor :math:`T^2` makes the size of gradients independent of T.

**Hidden states.** Pruning keeps the width of the residual stream, so block outputs can be compared directly. The set S
has at most :data:`BLOCKS` evenly spaced blocks and includes the last one:

.. math:: L = \frac{1}{|S|} \sum_{l \in S}
    \frac{\sum_t \lVert h_{l,t} - h'_{l,t} \rVert^2}{\sum_t \lVert h'_{l,t} \rVert^2}

The sums over t cover the N positions whose next token counts, in all batches and processes of one optimizer step.

Symbols: z logits, v tokens of the vocabulary, T temperature, h and h' block outputs of the model and the teacher,
b windows per batch, s tokens per window, d model width, n blocks in S.
"""

import contextlib
import gc
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import lacks_weights
from plprune.architecture.wrappers import text_config
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.stored import Dtype
from plprune.io import distributed
from plprune.io.atomic import staged
from plprune.io.cache import digest
from plprune.io.checks import check_sizes
from plprune.io.distributed import ProcessGroup
from plprune.io.progress import Progress
from plprune.io.text import IGNORED
from plprune.io.units import format_value
from plprune.pruning.losses import Criterion, divergence, model_inputs, top_k_log_probs
from plprune.pruning.plan import PruningPlan, fingerprint

log = logging.getLogger(__name__)
Answers = dict[str, Tensor]  # a teacher's outputs: `values` (log-probabilities), `tokens`, `hidden`
BLOCKS = 4  # at most as many blocks are compared
LEAST = -6e4  # log-probabilities are clamped to the range of float16


@dataclass(frozen=True)
class Distillation:
    """Distillation from the dense model, which runs once on each training window before training, and is then freed.

    Its answers are stored under `teacher/` in the trainer's `default_root_dir`, keyed by the contents of model and
    window, so that resumed and later runs reuse them. They take about 6 bytes per token for each of `top_k`, and 2 for
    each value of a hidden state. With another data module than `RecoveryData`, the teacher runs on a window when it is
    first trained on, and stays in memory to the end of that epoch. Under ZeRO-3 and FSDP2 the teacher is sharded like
    the model; the first process reads it into CPU memory.

    Args:
        of: The target: the distribution of the next token (logits), the outputs of four blocks (hidden), or both with
            equal weights.
        temperature: Divisor of the logits; above 1, unlikely tokens count more.
        weight: The weight of distillation in the loss, in [0, 1]; the next-token loss has the rest.
        top_k: The number of the teacher's likeliest tokens that count individually; all others count as one event.
        teacher: Name or path of the dense model, which has the tokenizer of the model; by default the model that the
            plan names as its origin.
    """

    of: Literal["logits", "hidden", "both"] = "logits"
    temperature: float = 1.0
    weight: float = 0.5
    top_k: int = 64
    teacher: str | None = None

    def __post_init__(self) -> None:
        check_sizes(top_k=self.top_k)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"the weight of distillation is {self.weight}, but must be in [0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"the temperature of distillation is {self.temperature}, but must be above 0")

    @property
    def uses_logits(self) -> bool:
        """Whether the distribution of the next token is a target."""
        return self.of != "hidden"

    def blocks(self, count: int) -> list[int]:
        """Indices of the blocks whose outputs are compared, for a model of `count` blocks.

        Example:
            >>> Distillation("hidden").blocks(30), Distillation("hidden").blocks(3), Distillation("logits").blocks(30)
            ([6, 14, 21, 29], [0, 1, 2], [])
        """
        n = 0 if self.of == "logits" else min(BLOCKS, count)
        return [(i + 1) * count // n - 1 for i in range(n)]

    def criterion(self, answers: Answers, positions: Tensor) -> Criterion:  # [n]
        """The divergence from the teacher's distributions at the counted positions, for `weighted_loss`."""
        values, tokens = answers["values"], answers["tokens"]
        rows = positions - positions // (values.shape[1] + 1)  # answers leave out the last position of each window
        values, tokens = values.flatten(0, 1)[rows], tokens.flatten(0, 1)[rows]
        return lambda logits, where: divergence(logits, values[where], tokens[where], self.temperature)


def loss_denominators(labels: Tensor, answers: Answers) -> Tensor:  # [1 + n]
    """The divisors of the losses: the number of counted tokens, and the squared norm of the teacher's hidden states.

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
    """Squared distances between the block outputs of model and teacher, summed over the counted tokens."""
    counts = labels[:, 1:] != IGNORED
    pairs = zip(states, hidden.unbind(1), strict=True)
    return torch.stack([_squares(ours[:, :-1].float() - theirs.float(), counts) for ours, theirs in pairs])


def _squares(values: Tensor, counts: Tensor) -> Tensor:  # [b, t, d], [b, t]
    """Sums squares over the counted tokens, without synchronising a GPU."""
    return (values.square().sum(-1) * counts).sum()


@contextlib.contextmanager
def recorded_outputs(model: PreTrainedModel, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Records the outputs of some blocks, [b, s, d] each, in depth order, for the duration of the context.

    The context must end before a backward pass, which can run the blocks again.
    """
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    every = blocks_of(model)
    handles = [every[i].module.register_forward_hook(record) for i in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class TeacherModel:
    """Identifies the dense model that serves as teacher."""

    name: str  # or path
    weights: str | None  # the expected fingerprint; None accepts any weights
    dtype: Dtype  # of the weights in the fingerprint

    def load(self, dtype: Dtype) -> PreTrainedModel:
        """Loads the model in a dtype.

        Raises:
            ValueError: The model does not exist, or has another fingerprint.
        """
        remedy = "name the dense model by model.distill.teacher"
        try:
            model = load_model(self.name, self.dtype)
        except ValueError as error:
            raise ValueError(f"there is no teacher: {error}; {remedy}") from error
        if self.weights not in (None, fingerprint(model.named_parameters())):
            raise ValueError(f"{self.name} is not the model that was pruned, so it cannot be the teacher: {remedy}")
        for parameter in model.parameters():  # buffers like rotary frequencies keep their dtype
            parameter.data = parameter.data.to(getattr(torch, dtype))
        return model


def choose_teacher(
    settings: Distillation, plan: PruningPlan | None, name: str, weights: str | None, dtype: Dtype
) -> TeacherModel:
    """Chooses the teacher: the one in the settings, the origin of the model's plan, or the unpruned model.

    Args:
        settings: The settings of distillation.
        plan: The plan that pruned the model, if any.
        name: The name or path that the model was loaded from.
        weights: The fingerprint of the model, if it was not pruned.
        dtype: The dtype of its weights.
    """
    if settings.teacher is not None:
        return TeacherModel(settings.teacher, None, dtype)
    if plan is None:
        return TeacherModel(name, weights, dtype)
    first = plan.chain()[0]
    original = str(first.config.get("dtype")).removeprefix("torch.")
    dtype = cast(Dtype, original) if original in get_args(Dtype) else dtype
    return TeacherModel(first.origin.get("model", name), first.origin.get("weights"), dtype)


def check_teacher(settings: Distillation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a teacher in the settings has the sizes and the tokens of the model.

    Raises:
        ValueError: It has not, or does not exist.
    """
    if settings.teacher is None:
        return
    remedy = "name the dense model by model.distill.teacher"
    theirs, ours = text_config(load_skeleton(settings.teacher).config), text_config(model.config)
    names = ["vocab_size", *(["hidden_size", "num_hidden_layers"] if settings.of != "logits" else [])]
    for name in names:
        if getattr(theirs, name) != getattr(ours, name):
            raise ValueError(
                f"{settings.teacher} cannot be the teacher, as its {name} is {getattr(theirs, name)} and the model's "
                f"{getattr(ours, name)}: {remedy}"
            )
    unlike = load_tokenizer(settings.teacher).get_vocab().items() ^ tokenizer.get_vocab().items()
    if unlike:
        token, i = min(unlike, key=lambda pair: pair[1])
        raise ValueError(
            f"{settings.teacher} cannot be the teacher, as its tokenizer is not the model's ({token!r} is token {i} in "
            f"only one of them): {remedy}"
        )


class Teacher:
    """Runs the dense model once on each window, and stores its answers on disk.

    It runs window by window, so that an answer does not depend on the rest of a batch. All methods but :meth:`file` are
    called by all processes together.

    Args:
        settings: The settings of distillation.
        source: The dense model.
        dtype: The dtype in which it runs.
        device: The device that it runs on.
        root: The folder for the answers of all teachers.
        shard: Distributes a model, whose weights only the first process has, in shards over all processes, and returns
            what runs it and what frees it; by default every process holds the whole model.
    """

    def __init__(
        self,
        settings: Distillation,
        source: TeacherModel,
        dtype: Dtype,
        device: torch.device,
        root: Path,
        shard: Callable[[PreTrainedModel], tuple[nn.Module, Callable[[], None]]] | None = None,
    ) -> None:
        self.settings, self.source, self.device, self.root = settings, source, device, root
        self.dtype: Dtype = dtype
        self._shard = shard
        self._model: PreTrainedModel | None = None
        self._forward: nn.Module | None = None  # runs the model once it is on its devices
        self._release: Callable[[], None] = lambda: None  # what a sharded model needs to be freed

    def prepare(self, windows: Iterable[dict[str, Tensor]], quiet: bool = False) -> None:  # [1, s] each
        """Runs the teacher on all windows without a stored answer, each in one process, and frees it."""
        files = {self.file(given): given for given in map(model_inputs, windows)}
        group = distributed.world()
        mine = share([file.name for file in files if not file.exists()], group)
        self._ask_all({file: given for file, given in files.items() if file.name in mine}, quiet)
        distributed.gather_objects(None, group)  # waits for the others, whose answers may be on another machine
        self._ask_all({file: given for file, given in files.items() if not file.exists()}, quiet)
        self.free()

    @torch.autocast("cpu", enabled=False)  # autocast cannot stack float16 tensors
    def answers(self, given: dict[str, Tensor]) -> Answers:  # [b, s] each
        """Returns the answers to the windows of a batch, stacked; the teacher runs only on new windows."""
        device, rows = given["input_ids"].device, zip(*(each.cpu().split(1) for each in given.values()), strict=True)
        windows = [dict(zip(given, row, strict=True)) for row in rows]
        files = [self.file(window) for window in windows]
        missing = {file: window for file, window in zip(files, windows, strict=True) if not file.exists()}
        self._ask_all(missing, quiet=True)
        found = [load_file(file) for file in files]
        return {name: torch.stack([each[name] for each in found]).to(device) for name in found[0]}

    def free(self) -> None:
        """Removes the model from memory."""
        if self._model is not None:
            self._release()
            self._model, self._forward, self._release = None, None, lambda: None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @cached_property
    def folder(self) -> Path:
        """The folder of the answers by this model with these settings."""
        key: dict[str, object] = {"of": self.settings.of, "dtype": self.dtype, "blocks": BLOCKS}
        key["weights"] = self.source.weights or self._fingerprint()
        if self.settings.uses_logits:
            key |= {"top_k": self.settings.top_k, "temperature": self.settings.temperature}
        return self.root / digest(key)

    def file(self, given: dict[str, Tensor]) -> Path:  # [1, s] each
        """The file for the answer to a window, whether or not it exists."""
        name = fingerprint(((name, each[0]) for name, each in given.items()), values=1 << 30)
        return self.folder / name[:2] / f"{name}.safetensors"  # few files per folder, as `staged` lists it

    def _ask_all(self, missing: dict[Path, dict[str, Tensor]], quiet: bool) -> None:  # [1, s] each
        """Asks for answers; of a sharded teacher all processes ask equally often."""
        count = max(distributed.gather_objects(len(missing), distributed.world())) if self._shard else len(missing)
        with Progress(count, "asking the teacher", "window", quiet=quiet or not count) as progress:
            for i, (file, given) in enumerate(missing.items()):
                self._ask(file, given)
                progress.update()
                if not i and not quiet:
                    size = format_value(file.stat().st_size * len(missing), "bytes")
                    log.info("answers of %s to %d windows: %s in %s", self.source.name, len(missing), size, self.folder)
            for _ in range(count - len(missing)):  # what the others gather shards for
                self._run({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})

    def _ask(self, file: Path, given: dict[str, Tensor]) -> None:
        answer = self._run(given)
        with staged(file, overwrite=True) as temporary:  # another process may write the same answer
            save_file(answer, temporary)

    @torch.no_grad()
    def _run(self, given: dict[str, Tensor]) -> Answers:
        model, settings, answer = self._loaded(), self.settings, {}
        if self._forward is None:
            self._forward, self._release = self._placed(model)
        blocks = settings.blocks(len(blocks_of(model)))
        fewer = {} if settings.uses_logits else {"logits_to_keep": 1}  # saves most of the head's time
        with recorded_outputs(model, blocks) as states:
            on_device = {name: each.to(self.device) for name, each in given.items()}
            logits = self._forward(**on_device, use_cache=False, **fewer).logits[0, :-1]
        if settings.uses_logits:
            values, tokens = top_k_log_probs(logits, settings.top_k, settings.temperature)
            answer |= {"values": values.clamp(min=LEAST).half().cpu(), "tokens": tokens.int().cpu()}
        if blocks:
            answer["hidden"] = torch.cat(states)[:, :-1].bfloat16().cpu().contiguous()
        return answer

    def _placed(self, model: PreTrainedModel) -> tuple[nn.Module, Callable[[], None]]:
        if self._shard:
            return self._shard(model)
        return model.to(self.device), lambda: None  # type: ignore[arg-type]

    def _loaded(self) -> PreTrainedModel:
        """The teacher; of one that is sharded, only the first process has the weights."""
        if self._model is None:
            random = [self.device] if self.device.type == "cuda" else []
            with torch.random.fork_rng(random):  # loading must not change the random numbers of training
                self._model = self._load_first() if self._shard else self.source.load(self.dtype)
        return self._model

    def _load_first(self) -> PreTrainedModel:
        """Loads the weights in the first process; an error there is raised in all."""
        group, model, fault = distributed.world(), None, None
        if not distributed.rank(group):
            try:
                model = self.source.load(self.dtype)
            except ValueError as error:
                fault = str(error)
        if fault := distributed.broadcast_object(fault, group):
            raise ValueError(fault)
        return model or load_skeleton(self.source.name, self.dtype)

    def _fingerprint(self) -> str:
        """Identifies the teacher's weights."""
        model = self._loaded()
        own = None if lacks_weights(model) else fingerprint(model.named_parameters())
        return cast(str, distributed.broadcast_object(own, distributed.world() if self._shard else None))


def share(own: Iterable[str], group: ProcessGroup) -> set[str]:
    """Divides work among processes: the names that this process does, of those that it asks for.

    Args:
        own: The names of what this process asks for; others may ask for the same.
        group: The processes, each of which calls this.
    """
    asked = [set(names) for names in distributed.gather_objects(list(own), group)]
    parts: list[set[str]] = [set() for _ in asked]
    askers = Counter(name for names in asked for name in names)
    for name in sorted(askers, key=lambda name: (askers[name], name)):  # first what only one process asks for
        min((part for part, names in zip(parts, asked, strict=True) if name in names), key=len).add(name)
    return parts[distributed.rank(group)]
