r"""REAP: router-weighted expert activation pruning (Lasby et al., 2025, https://arxiv.org/abs/2510.13999).

The experts of a mixture that contribute least leave, with their rows of the router. What an expert contributes is the
mean over its tokens of their routing weight times the norm of its output.

Symbols: s sparsity, E experts of a block, k experts per token.

Deviations from the authors' code:

- Every block keeps the same number of experts, so that the config can hold it; groups of experts that a router chooses
  among first keep as many each.
- `score="frequency"`, the number of an expert's tokens, is the paper's baseline.
- `sparsity` is a fraction of the blocks' parameters as in all methods; the paper's, of the experts, is
  `sparsity_of="experts"`.
"""

import dataclasses
import logging
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.methods.base import PruningMethod
from plprune.planning import whole_experts
from plprune.pruning.allocation import best_experts, importance, rescale
from plprune.pruning.calibration import Calibration
from plprune.pruning.expert_inputs import FEW, Saliency
from plprune.pruning.plan import PruningPlan
from plprune.pruning.stream import observe_experts, stream
from plprune.pruning.surgery import Surgery

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class REAP(PruningMethod):
    """Removes whole experts of a mixture, those with the least router-weighted activation.

    Args:
        sparsity: The fraction of parameters to remove, in [0, 1). The number of experts nearest to it stays.
        score: Score of an expert: the paper's saliency, or its number of tokens.
        sparsity_of: Whether `sparsity` is a fraction of the decoder blocks' parameters, or of the experts as in the
            paper.
        min_tokens: Calibration tokens below which an expert's score says little.
        few_tokens: What happens to an expert with fewer tokens. judge: it is scored as any other; keep: it stays before
            all others; refuse: pruning ends with an error.
    """

    sparsity: float = 0.25
    score: Literal["saliency", "frequency"] = "saliency"
    sparsity_of: Literal["blocks", "experts"] = "blocks"
    min_tokens: int = FEW
    few_tokens: Literal["judge", "keep", "refuse"] = "judge"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens < 0:
            raise ValueError(f"`min_tokens` is {self.min_tokens}, but it is a number of tokens, as 8")

    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        count = self._count(blocks)
        seen, distances, few = [], [], {}
        for block, inputs in stream(model, calibration, "REAP"):
            found = observe_experts(block, inputs, Saliency(block.expert_count))
            distances.append(inputs.influence.distance("angular"))
            if block.expert_count:
                seen.append((block, found))
                few[block.index] = int((found.tokens < self.min_tokens).sum())
        self._check(few, sum(block.expert_count for block, _ in seen))
        surgery = Surgery(model)
        for block, found in seen:
            surgery.keep(block, block.expert_units(), self._choose(found, count, block.experts.groups))
        return surgery.plan("REAP", dataclasses.asdict(self), importance(distances))

    def predict_sizes(self, model: PreTrainedModel) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        count = self._count(blocks)
        return [{block.expert_units().name: count for block in blocks if block.expert_count}]

    def _count(self, blocks: list[Block]) -> int:
        """The number of experts that every block keeps.

        Raises:
            ValueError: There are no experts, or too few would stay.
        """
        mixtures = whole_experts.mixtures(blocks, "REAP")
        size, group = mixtures[0].expert_count, whole_experts.step(mixtures)
        p = self.sparsity
        if self.sparsity_of == "blocks":
            prunable = sum(size * block.cost(block.expert_units()) for block in mixtures)
            p = rescale(p, sum(block.parameters() for block in blocks), prunable, "the experts")
        count = group * round(size * (1 - p) / group)
        least = whole_experts.least(mixtures)
        if count < least:
            raise ValueError(
                f"sparsity {self.sparsity} is out of reach: {count} of {size} experts would stay, and the router needs "
                f"{least}; ask for at most {self._sparsity(blocks, mixtures, size - least):.3f}"
            )
        if count == size and p:
            raise ValueError(
                f"sparsity {self.sparsity} is less than half of {group} of {size} experts in each block; ask for "
                f"{self._sparsity(blocks, mixtures, group):.3f}"
            )
        return count

    def _sparsity(self, blocks: list[Block], mixtures: list[Block], gone: int) -> float:
        """The sparsity once some experts of each block are gone."""
        if self.sparsity_of == "experts":
            return gone / mixtures[0].expert_count
        return sum(gone * b.cost(b.expert_units()) for b in mixtures) / sum(block.parameters() for block in blocks)

    def _check(self, few: dict[int, int], experts: int) -> None:
        total = sum(few.values())
        if not total:
            return
        worst = max(few, key=lambda block: few[block])
        said = (
            f"{total} of {experts} experts saw fewer than {self.min_tokens} calibration tokens, most in block {worst} "
            f"({few[worst]})"
        )
        if self.few_tokens == "refuse":
            raise ValueError(f"{said}: use more text, or set `few_tokens` to judge or keep")
        log.warning("%s: they are %s", said, "kept first" if self.few_tokens == "keep" else "scored by these alone")

    def _score(self, found: Saliency) -> Tensor:  # [experts]
        return found.mean if self.score == "saliency" else found.tokens.double()

    def _choose(self, found: Saliency, count: int, groups: int) -> Tensor:  # [count]
        score = self._score(found)
        if self.few_tokens == "keep":
            score = score.masked_fill(found.tokens < self.min_tokens, torch.inf)
        return best_experts(score, count, groups)
