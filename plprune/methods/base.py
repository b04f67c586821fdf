"""The base classes of all pruning methods."""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import AttentionUnit, Block, blocks_of
from plprune.architecture.modules import lacks_weights
from plprune.architecture.wrappers import text_config
from plprune.io.checks import check_required, check_shares
from plprune.planning.needs import Work
from plprune.planning.serving import adds_biases
from plprune.planning.sizes import block_flops
from plprune.pruning.allocation import check_sparsity
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import DAMPINGS, RESTORING, Damping, Repair, Repairer


@dataclasses.dataclass(frozen=True)
class PruningMethod(ABC):
    """A one-shot structured pruning method.

    Subclasses are frozen dataclasses whose fields are the paper's settings, and implement `prune`. If `serve_on` or
    `tensor_parallel` is set, `prune`, `predict_sizes` and `work` get a :class:`Constraint` as an additional last
    argument. A method that supports constraints takes this argument and overrides `conflicts`. Without a constraint the
    argument is not passed, so other methods need not declare it.

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
            model: A causal language model.
            batches: Calibration token ids, [b, s] each, without padding.

        Raises:
            ValueError: The sparsity is out of reach, the family unknown, or activations hold NaN or infinity.
        """

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        """The reasons why the method with its settings cannot meet a constraint; each says which setting to change.

        Args:
            constraint: The constraint.
            blocks: The model's blocks; if not given, a model without biases is assumed.
        """
        remedy = "leave out `serve_on` and `tensor_parallel`"
        return [] if constraint == FREE else [f"{type(self).__name__} does not know how: {remedy}"]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as a dictionary for the plan, by which a finished pruning is recognised."""
        return dataclasses.asdict(self)

    @property
    def inner(self) -> "Sequence[PruningMethod]":
        """Other methods that it calls."""
        return ()

    @property
    def biased(self) -> bool:
        """Whether pruning adds a bias to each consumer that loses units."""
        return False

    @property
    def ranks_experts(self) -> bool:
        """Whether the text decides how many experts of a mixture stay."""
        return False

    @property
    def unstreamable(self) -> str:
        """Why a model that streams from disk cannot be pruned with these settings, and what to do; empty if it can."""
        return ""

    def check_weights(self, model: PreTrainedModel) -> None:
        """Raises ValueError if a model lacks the weights that pruning with these settings needs at once."""
        if self.unstreamable and lacks_weights(model):
            raise ValueError(self.unstreamable)

    def predict_sizes(self, model: PreTrainedModel) -> list[dict[str, int]]:
        """Predicts the number of units that each group keeps, without weights or text; a guess unless overridden.

        Each entry maps group names to numbers of units; groups that it omits stay whole. If the sizes do not depend
        on the data, there is one entry. Else the first is a typical case, and the others bound the result.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: Pruning with these settings would fail.
        """
        groups = [group for block in blocks_of(model) for group in block.groups()]
        return [{group.name: max(1, round(len(group) * (1 - self.sparsity))) for group in groups}]

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """The cost of calibrating on `count` windows of `length` tokens, beyond one pass through the blocks."""
        return Work()


@dataclasses.dataclass(frozen=True)
class Repairing(PruningMethod):
    """A method that supports the repair of consumers.

    Args:
        repair: Repair of consumers that lose inputs. none; compensate: adds the mean contribution of the removed inputs
            to the bias; restore: adjusts the kept weights by least squares to replace the removed inputs; reconstruct:
            restores, then trains all weights of each block by gradient toward the dense model's hidden states.
        damping: Regularisation of a restoration, relative to the mean diagonal of the inputs' second moments. auto:
            chooses among 0.0001, 0.001, ..., 1 by the error on every fourth calibration window, which is held out.
        bias: Whether a repair may add a bias to consumers. Without it, a restoration does not centre the inputs.
        repair_share: The fraction of the calibration windows that a repair in a pass of its own sees, the first ones.
        repair_passes: Passes over these windows of a reconstruction; a step takes four windows.
        repair_rate: Learning rate of a reconstruction, relative to the root mean square of each weight. Tiny models
            take ten times as much.
    """

    repair: Repair = dataclasses.field(default="none", kw_only=True)
    damping: Damping = dataclasses.field(default=0.01, kw_only=True)
    bias: bool = dataclasses.field(default=True, kw_only=True)
    repair_share: float = dataclasses.field(default=1.0, kw_only=True)
    repair_passes: int = dataclasses.field(default=2, kw_only=True)
    repair_rate: float = dataclasses.field(default=0.003, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.repair == "compensate" and not self.bias:
            raise ValueError("compensation is a bias: set `bias` to true, or `repair` to none or restore")
        if self.damping != "auto" and not self.damping >= 0:
            raise ValueError(f"`damping` is {self.damping}, but it is auto, or a number that is not negative like 0.01")
        check_shares(repair_share=self.repair_share)
        if self.repair_passes < 1 or not 0 < self.repair_rate < math.inf:
            raise ValueError("a reconstruction takes at least one of `repair_passes`, and a positive `repair_rate`")

    @property
    def biased(self) -> bool:
        return self.repair != "none" and self.bias

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        if constraint.dense_biases and self.biased and adds_biases(blocks):
            return ["no bias may be added: set `repair` to none, or to restore with `bias` false"]
        return []

    def repairer(self, calibration: Calibration) -> Repairer:
        """Repairs consumers as the settings say."""
        seen = calibration.part(0, math.ceil(self.repair_share * len(calibration.windows())))
        return Repairer(self.repair, self.damping, self.bias, seen, self.repair_passes, self.repair_rate)

    def repair_work(self, model: PreTrainedModel, tokens: int, length: int, attention: AttentionUnit) -> Work:
        """The cost of the repair pass: each block runs once per group and once pruned. `restore` adds the second
        moments of the consumers' inputs (half a matrix) and one factorisation per damping, of each expert its own.
        `reconstruct` adds a forward and a backward pass for each of its passes, two passes that measure errors, and the
        dense model's; it keeps two more streams of hidden states, and five numbers per weight of a block in float32.
        """
        blocks, d = blocks_of(model), text_config(model.config).hidden_size
        tokens = math.ceil(self.repair_share * tokens)
        rows = [(block, group) for block in blocks for group in block.groups(attention)]
        runs = sum(block_flops(block, length) for block in (*blocks, *(block for block, _ in rows)))
        if self.repair not in RESTORING:
            return Work(tokens * runs if self.repair == "compensate" else 0)
        factors, matrices = (1 + len(DAMPINGS), 6) if self.damping == "auto" else (1, 3)
        single, most = 0.0, 0
        for block, group in rows:
            n, experts = group.consumer.index.numel(), max(1, group.experts)
            seen = block.experts.active if group.experts else 1  # how many times each token is
            single += seen * tokens * n**2 + experts * factors * (n**3 / 3 + 2 * d * n**2)
            most = max(most, 8 * (matrices + experts - 1) * n**2)
        if self.repair != "reconstruct":
            return Work(tokens * runs, single, most)
        states = 2 * tokens * d * next(model.parameters()).element_size()
        most = max(most, 20 * max(block.parameters() for block in blocks)) + states
        return Work(tokens * runs + self.training_flops(model, tokens, length), single, most)

    def training_flops(self, model: PreTrainedModel, tokens: int, length: int) -> float:
        """The operations that train all blocks in a reconstruction, measure their errors, and give their targets."""
        if self.repair != "reconstruct":
            return 0.0
        return (3 * self.repair_passes + 3) * tokens * sum(block_flops(block, length) for block in blocks_of(model))
