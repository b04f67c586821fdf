"""The base classes of all pruning methods."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import AttentionUnit, Block, blocks_of
from plprune.io.checks import check_required
from plprune.planning.needs import Work
from plprune.planning.serving import adds_biases
from plprune.planning.sizes import block_flops
from plprune.pruning.allocation import check_sparsity
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import DAMPINGS, Damping, Repair, Repairer


@dataclasses.dataclass(frozen=True)
class PruningMethod(ABC):
    """A one-shot structured pruning method.

    Subclasses are frozen dataclasses of the paper's settings, and implement `prune`. A method whose result must load
    somewhere (`serve_on`, `tensor_parallel`) is given a :class:`Constraint` as a last argument of `prune`,
    `predict_sizes` and `work`: one that can honour it takes that argument, and says in `conflicts` what it cannot do.
    Without a constraint the argument is not given, so that other methods need not know of it.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_required(self)
        check_sparsity(self.sparsity)

    @abstractmethod
    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        """Prunes a model in place and returns the plan.

        Args:
            model: A causal language model of a family in `plprune.architecture.families.FAMILIES`.
            batches: Calibration token ids, [b, s] each, without padding.

        Raises:
            ValueError: The sparsity is out of reach, the family unknown, or activations hold NaN or infinity.
        """

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError if the model is of no known family."""
        blocks_of(model)

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        """Why the method, with its settings, cannot honour a constraint, each reason with what to change.

        Args:
            constraint: The constraint.
            blocks: The model's; if not given, those of a model without biases.
        """
        return [] if constraint == FREE else [f"{type(self).__name__} does not know how: leave out `serve_on`"]

    @property
    def biased(self) -> bool:
        """Whether consumers that lose units are given a bias."""
        return False

    def predict_sizes(self, model: PreTrainedModel) -> list[dict[str, int]]:
        """How many units each group would keep, by its name, without weights or text; a guess if not overridden.

        Groups that are not named stay whole. There is one entry if the data do not matter to the sizes; else the first
        is a typical case, and the others are the extremes between which the result will be.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: What pruning itself would refuse.
        """
        groups = [group for block in blocks_of(model) for group in block.groups()]
        return [{group.name: max(1, round(len(group) * (1 - self.sparsity))) for group in groups}]

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """What calibration on `count` windows of `length` tokens takes beyond one pass through the blocks."""
        return Work()


@dataclasses.dataclass(frozen=True)
class Repairing(PruningMethod):
    """A method whose consumers can be repaired, in whichever way its paper does it.

    Args:
        repair: Repair of consumers that lose inputs. none; compensate: their bias takes up what the inputs contributed
            on average; restore: least squares changes their kept weights to make up for the inputs.
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

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        if constraint.dense_biases and self.biased and adds_biases(blocks):
            return ["no bias may be added: set `repair` to none, or to restore with `bias` false"]
        return []

    def repairer(self, calibration: Calibration) -> Repairer:
        """The repair that the settings describe."""
        return Repairer(self.repair, self.damping, self.bias, calibration)

    def repair_work(self, model: PreTrainedModel, tokens: int, length: int, attention: AttentionUnit) -> Work:
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
