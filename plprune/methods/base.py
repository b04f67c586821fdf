"""What a pruning method is, and how one is run so that its plan says where everything came from."""

import bisect
import dataclasses
import functools
import logging
import math
import operator
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Attention, Block, Group, blocks_of
from plprune.architecture.modeling_plprune import Written
from plprune.checkpoint import sharing
from plprune.io import distributed
from plprune.io.cache import sources
from plprune.io.units import amount, shown
from plprune.planning import serving
from plprune.planning.needs import Work
from plprune.planning.serving import Place, adds_biases
from plprune.planning.sizes import Ledger, block_flops, windows
from plprune.planning.targets import solve
from plprune.pruning import constraints
from plprune.pruning.allocation import check_sparsity
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import Constraint
from plprune.pruning.plan import PruningPlan, fingerprint
from plprune.pruning.repair import DAMPINGS, Damping, Mending, Repair
from plprune.pruning.surgery import attach, plan_of

Rows = Sequence[tuple[Block, Group]]
log = logging.getLogger(__name__)
version = functools.cache(metadata.version)  # which reads and parses a file


@dataclasses.dataclass(frozen=True)
class PruningMethod(ABC):
    """A one-shot structured pruning method.

    Subclasses are frozen dataclasses of the paper's settings. One that is to honour `serve_on` says in `conflicts` what
    it cannot do, and makes in `prune` what `check` returns. One whose sizes are to be known beforehand says in
    `foresee` what they will be: it is by that that targets are solved.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        target_parameters: How many parameters the whole model may have in the end, like 5.0B or 100M: `sparsity` is
            then found by it, and what is given for it does not count.
        target_memory: What its weights and the keys and values of `target_batch` sequences may take, like 8GiB or
            500MB: likewise. Of two targets the stricter counts.
        target_batch: Sequences for which `target_memory` has to do.
        target_context: Tokens of each.
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
    """

    sparsity: float
    target_parameters: int | str | None = dataclasses.field(default=None, kw_only=True)
    target_memory: int | str | None = dataclasses.field(default=None, kw_only=True)
    target_batch: int = dataclasses.field(default=1, kw_only=True)
    target_context: int = dataclasses.field(default=4096, kw_only=True)
    serve_on: Sequence[Place] = dataclasses.field(default_factory=list, kw_only=True, hash=False)
    tensor_parallel: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # parsers let null through to a setting of any type
            if getattr(self, each.name) is None and "None" not in str(each.type) and "Optional" not in str(each.type):
                raise ValueError(f"{each.name} has no value: give one, or leave it out if it has a default")
        check_sparsity(self.sparsity)
        object.__setattr__(self, "serve_on", list(self.serve_on))  # as in a plan that was read
        if self.target_batch < 1 or self.target_context < 1:
            raise ValueError("target_memory is of at least one sequence of one token: target_batch and target_context")
        _ = self.targets
        serving.constraint(self.serve_on, self.tensor_parallel, self.conflicts)

    def conflicts(self, asked: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        """Why the method, with its settings, cannot honour a constraint, each reason with what to change.

        Args:
            asked: The constraint.
            blocks: The model's; if not given, of one that has no biases.
        """
        return [] if asked == constraints.FREE else [f"{type(self).__name__} does not know how: leave out `serve_on`"]

    @property
    def targets(self) -> dict[str, int]:
        """What the pruned model may be, at most: parameters, and bytes of memory; empty if only `sparsity` counts."""
        found = {}
        if self.target_parameters is not None:
            found["parameters"] = amount(self.target_parameters, "target_parameters")
        if self.target_memory is not None:
            found["memory"] = amount(self.target_memory, "target_memory", "B")
        return found

    @property
    def biased(self) -> bool:
        """Whether consumers that lose units are given a bias."""
        return False

    @property
    def is_guess(self) -> bool:
        """Whether what is foreseen is only a guess, as the method does not say what sizes it will come to."""
        return type(self).foresee is PruningMethod.foresee

    def foresee(self, model: PreTrainedModel) -> list[dict[str, int]]:
        """How many units each group would keep, by its name, without weights or text.

        Groups that are not named stay whole. There is one entry if the data do not matter to the sizes; else the first
        is a typical case, and the others are the extremes between which the result will be.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: What pruning itself would refuse.
        """
        self.check(model)
        groups = [group for block in blocks_of(model) for group in block.groups()]
        return [{group.name: max(1, round(len(group) * (1 - self.sparsity))) for group in groups}]

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """What calibration on `count` windows of `length` tokens takes beyond one pass through the blocks."""
        return Work()

    def aimed(self, model: PreTrainedModel) -> "PruningMethod":
        """The method with the sparsity that its targets come to on a model, and without them; itself if it has none.

        The worst of what is foreseen decides, so that the result does fit.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: A target is out of reach; the message names the nearest that is not.
        """
        if not self.targets:
            return self
        bare, ledger = self._bare(self.sparsity), Ledger(model, self.biased)

        def sizes(sparsity: float) -> dict[str, int]:
            foreseen = dataclasses.replace(bare, sparsity=sparsity).foresee(model)
            return {name: max(self._measure(ledger, case)[name] for case in foreseen) for name in self.targets}

        def excess(sparsity: float) -> float | None:
            try:
                return max(size / self.targets[name] for name, size in sizes(sparsity).items())
            except ValueError:
                return None

        try:
            sparsity, share = solve(excess)
        except ValueError:
            bare.foresee(model)  # says why
            raise
        found = sizes(sparsity)
        if share > 1:
            raise ValueError(self._out_of_reach(sparsity, found))
        return dataclasses.replace(bare, sparsity=sparsity)

    def check(self, model: PreTrainedModel) -> Constraint:
        """Makes sure that the method can prune a model so that it can be served where it must; needs no weights.

        Args:
            model: Its parameters may be on the meta device.

        Returns:
            What the pruned model must be like.

        Raises:
            ValueError: The method cannot, or has targets, which `aimed` turns into a sparsity.
        """
        if self.targets:
            raise ValueError("a method with targets prunes by plprune.prune, which finds the sparsity for them")
        blocks = blocks_of(model)
        asked = serving.constraint(
            self.serve_on, self.tensor_parallel, lambda asked: self.conflicts(asked, blocks), model.config
        )
        asked.check_model(blocks, model.config)
        return asked

    def reached(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a pruned model came to in terms of the method's targets, for the record; empty if there are none."""
        if not self.targets:
            return {}
        found = self._measure(Ledger(model), {})
        return {"targets": {name: {"asked": asked, "reached": found[name]} for name, asked in self.targets.items()}}

    def _asked(self, name: str) -> str:
        return f"target_{name} {getattr(self, f'target_{name}')}"

    def _out_of_reach(self, sparsity: float, found: dict[str, int]) -> str:
        missed = [name for name, size in found.items() if size > self.targets[name]]
        asked = " and ".join(self._asked(name) for name in missed)
        least = " and ".join(_amount(name, found[name]) for name in missed)
        return (
            f"{asked} is out of reach of {type(self).__name__} with these settings: the least that it leaves is "
            f"{least}, at sparsity {sparsity:.3f}; ask for that, or start from a smaller model"
        )

    def _bare(self, sparsity: float) -> "PruningMethod":
        return dataclasses.replace(self, sparsity=sparsity, target_parameters=None, target_memory=None)

    def _measure(self, ledger: Ledger, counts: dict[str, int]) -> dict[str, int]:
        memory = ledger.memory(counts, self.target_batch, self.target_context)
        return {"parameters": ledger.parameters(counts), "memory": memory}

    @abstractmethod
    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        """Prunes in place, and says what was kept.

        Args:
            model: A causal language model of a family in `plprune.architecture.families.FAMILIES`.
            batches: Calibration token ids, [b, s] each, without padding.

        Raises:
            ValueError: The sparsity is out of reach, the family unknown, or activations hold NaN or infinity.
        """


@dataclasses.dataclass(frozen=True)
class Repairing(PruningMethod):
    """A method whose consumers can be repaired, in whichever way its paper does it.

    Args:
        repair: What is done for consumers that lose inputs. none; compensate: their bias takes up what those gave on
            average; restore: what they keep does the work of those too, by least squares.
        damping: Regularisation of a restoration, relative to the mean diagonal of the inputs' second moments. auto: of
            0.0001, 0.001 and so on to 1, what does best on every fourth calibration window, held out for that.
        bias: Whether a repair may give consumers a bias. Without it, a restoration is of inputs that are not centred.
    """

    repair: Repair = dataclasses.field(default="none", kw_only=True)
    damping: Damping = dataclasses.field(default=0.01, kw_only=True)
    bias: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repair == "compensate" and not self.bias:
            raise ValueError("compensation is a bias: set `bias` to true, or `repair` to none or restore")
        if self.damping != "auto" and not self.damping >= 0:
            raise ValueError(f"`damping` is {self.damping}, but it is auto, or a number that is not negative like 0.01")

    @property
    def biased(self) -> bool:
        return self.repair != "none" and self.bias

    def conflicts(self, asked: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        if asked.dense_biases and self.biased and adds_biases(blocks):
            return ["no bias may be added: set `repair` to none, or to restore with `bias` false"]
        return []

    def mending(self, calibration: Calibration) -> Mending:
        """What repairs consumers."""
        return Mending(self.repair, self.damping, self.bias, calibration)

    def repair_work(self, model: PreTrainedModel, tokens: int, length: int, attention: Attention) -> Work:
        """A walk that repairs: each block again for each of its groups, and once pruned; to restore, second moments of
        the consumers' inputs (half a matrix) and their factors, one for each damping that is tried.
        """
        blocks, d = blocks_of(model), model.config.hidden_size
        widths = [[group.consumer.index.numel() for group in block.groups(attention)] for block in blocks]
        runs = sum((len(own) + 1) * block_flops(block, length) for block, own in zip(blocks, widths, strict=True))
        if self.repair != "restore":
            return Work(tokens * runs if self.repair == "compensate" else 0)
        factors, matrices = (1 + len(DAMPINGS), 6) if self.damping == "auto" else (1, 3)
        every = [n for own in widths for n in own]
        single = sum(tokens * n**2 + factors * (n**3 / 3 + 2 * d * n**2) for n in every)
        return Work(tokens * runs, single, 8 * matrices * max(every) ** 2)


def prune(
    model: PreTrainedModel, method: PruningMethod, batches: Calibration | Iterable[Tensor], seed: int | None = None
) -> PruningPlan:
    """Prunes a model in place by any method, and completes the plan with where it came from.

    Args:
        model: A causal language model. Of several processes (`Calibration.group`) one needs to have its weights, and
            the others a model of the same structure, with parameters on meta; all end with the pruned model.
        method: How to prune.
        batches: Calibration token ids, [b, s] each, without padding.
        seed: The seed that chose the calibration text, for the record.

    Raises:
        ValueError: The method cannot do it, or the processes came to different plans.
    """
    if isinstance(model.config, Written) and plan_of(model) is None:
        raise ValueError("the pruned model lacks its plan: load it by plprune.load_pruned from its folder")
    calibration = Calibration.of(batches)
    sharing.receive(model, calibration.group)
    of = origin(model, calibration, seed)
    aimed = method.aimed(model)
    if method.targets and not distributed.rank(calibration.group):
        log.info("sparsity %.4f, for %s", aimed.sparsity, " and ".join(map(method._asked, method.targets)))
    plan = dataclasses.replace(aimed.prune(model, calibration), origin=of | method.reached(model))
    if method.targets:  # as they were asked for, by which a finished pruning is recognised
        plan = dataclasses.replace(plan, settings=dataclasses.asdict(method))
    attach(model, plan)
    equalise(model, plan, calibration.group)
    return plan


def preflight(method: PruningMethod, load: Callable[[], PreTrainedModel]) -> None:
    """Refuses, before any weight is loaded, a pruning that would not be served, or would not meet its targets.

    Args:
        method: How to prune.
        load: Gives the model, without its weights.

    Raises:
        ValueError: The method cannot do what its settings ask for.
    """
    if method.serve_on or method.tensor_parallel > 1 or method.targets:
        model = load()
        method.aimed(model).check(model)


def thinned(
    rows: Rows, allowed: Sequence[Sequence[int]], phases: Sequence[Sequence[int]], limit: float, even: bool
) -> list[int]:
    """Units that groups keep if some give before others: an extreme of what data could decide.

    Args:
        rows: Blocks with their groups.
        allowed: The numbers of units that each group may keep, ascending; from the last one it gives.
        phases: Which groups give first, which next.
        limit: Together they cost no less than this in the end, and hardly more if that can be.
        even: Whether those of a phase give alike, or one after another all they can.
    """
    costs, counts = [block.cost(group) for block, group in rows], [numbers[-1] for numbers in allowed]
    need = sum(map(operator.mul, costs, counts)) - limit
    for own in phases:
        room = sum(costs[i] * (allowed[i][-1] - allowed[i][0]) for i in own)
        share = min(1.0, need / room) if even and room and need > 0 else 0.0
        gives = [(i, share * costs[i] * (allowed[i][-1] - allowed[i][0])) for i in own if share]
        for i, most in [*gives, *((i, math.inf) for i in own)]:
            lowest = counts[i] - max(0.0, min(most, need)) / costs[i] - 1e-9
            count = allowed[i][min(bisect.bisect_left(allowed[i], lowest), len(allowed[i]) - 1)]
            need -= (counts[i] - count) * costs[i]
            counts[i] = count
    return counts


def by_window(model: PreTrainedModel, rows: Rows) -> list[int]:
    """Which of the groups are of attention, those first that see least of the sequence."""
    size = windows(model)
    own = [i for i, (_, group) in enumerate(rows) if group.kind == "attention"]
    return sorted(own, key=lambda i: size[rows[i][0].index])


def distinct(rows: Rows, cases: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    """Cases of what is foreseen, each once."""
    return [
        dict(zip([group.name for _, group in rows], case, strict=True)) for case in dict.fromkeys(map(tuple, cases))
    ]


def _amount(name: str, size: float) -> str:
    return shown(size, "bytes") if name == "memory" else f"{shown(size, 'short')} parameters"


def equalise(model: PreTrainedModel, plan: PruningPlan, group: distributed.Group) -> None:
    """Makes sure that all processes have one plan, and gives them the first one's repaired values.

    Those are computed by each of them, and may differ in the last bit where the processors do.
    """
    distributed.agree(plan.digest, "the plan", group)
    if group is not None:
        state = model.state_dict()
        for name in plan.repaired:
            state[name].copy_(distributed.sent(state[name], 0, group))


def source_of(method: PruningMethod) -> str:
    """A hash of the source that a method's decisions depend on: its own, and that of all below it."""
    return sources(*sorted({each.__module__ for each in type(method).__mro__ if issubclass(each, PruningMethod)}))


def origin(model: PreTrainedModel, calibration: Calibration, seed: int | None = None) -> dict[str, Any]:
    """What a plan is made from, for the record."""
    weights = getattr(model, "weights_fingerprint", None)  # of a model whose weights are on disk
    return {
        "model": model.config.name_or_path,
        "weights": weights or fingerprint(model.named_parameters()),
        "calibration": calibration.fingerprint,
        "tokens": sum(ids.numel() for ids in calibration),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("plprune", "torch", "transformers")},
    }
