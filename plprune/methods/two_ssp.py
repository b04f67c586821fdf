r"""2SSP: two-stage structured pruning (Sandri, Cunegatti, Iacca, TMLR 2025, https://arxiv.org/abs/2501.17771).

The first stage removes the FFN channels with the lowest scores, the same number in every block. The second drops whole
attention sub-blocks one at a time, each time the one whose absence raises perplexity least. A formula balances the two.

Symbols: s sparsity, B blocks, P their parameters, :math:`P_a` and :math:`P_f` those of one attention and one FFN,
N attentions to drop, K channels to keep, h the FFN's inner activations.

Deviations from the authors' code:

- Losses are summed in float64; in the authors' code they stay in the model's dtype, which produces ties.
- Every sequence of a batch counts, not only the first. `stage2_samples` windows judge; the authors use one.
- Each trial of the second stage starts at the first changed block, from stored hidden states: the same losses for about
  half the work.
- `repair` compensates or restores the FFNs in a pass between the stages; the paper does neither.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.methods.base import Repairing
from plprune.planning.needs import Work
from plprune.planning.sizes import attention_spans, block_flops
from plprune.pruning.allocation import Budget, check_sparsity, importance, top_k
from plprune.pruning.attention_search import AttentionSearch
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import evaluating
from plprune.pruning.plan import PruningPlan
from plprune.pruning.repair import Repair
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery


@dataclasses.dataclass(frozen=True)
class TwoSSP(Repairing):
    """Removes FFN channels by activation norm, then whole attention sub-blocks by perplexity.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        alpha: Balance between the stages: a larger value drops more attention sub-blocks.
        drop_attentions: Number of attention sub-blocks that the second stage drops; by default the paper's formula
            decides; 0 skips the second stage.
        stage2_samples: Calibration windows that judge each candidate of the second stage.
    """

    sparsity: float = 0.25
    alpha: float = 1.5
    drop_attentions: int | None = None
    stage2_samples: int = 1
    repair: Repair = dataclasses.field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0 or self.stage2_samples < 1:
            raise ValueError("2SSP needs a positive `alpha`, and at least one window to judge by (`stage2_samples`)")

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        drop, widths = self._sizes(blocks, constraint)
        repairer, scores, distances = self.repairer(calibration), [], []
        for block, inputs in stream(model, calibration, "2SSP stage 1"):
            for group, norms in observe(block, inputs, Norms, attention="none"):
                scores.append((block, group, norms.mean))
            distances.append(inputs.influence.distance("angular"))
        surgery = Surgery(model)
        chosen = [(block, group, top_k(score, widths[group.name])) for block, group, score in scores]
        repairer.carry_out(surgery, chosen, "2SSP repair")
        if drop:
            windows = calibration.windows(self.stage2_samples)
            with evaluating(model):
                search = AttentionSearch(surgery, windows, calibration.device or model.device, calibration.group)
                search.drop(drop, first=int(constraint.first_attention))
        return surgery.plan("TwoSSP", dataclasses.asdict(self), importance(distances))

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        drop = self.drop_attentions if blocks is None else self._shares(list(blocks))[0]
        reasons = ["no attention may leave: set `drop_attentions` to 0"] if constraint.every_attention and drop else []
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        drop, widths = self._sizes(blocks, constraint)
        candidates = [b for b in blocks[int(constraint.first_attention) :] if b.can_drop_attention]
        spread = [candidates[i * len(candidates) // drop] for i in range(drop)]
        cases = [
            widths | {block.groups()[0].name: 0 for block in gone} for gone in (spread, *_ends(model, candidates, drop))
        ]
        return [case for i, case in enumerate(cases) if case not in cases[:i]]

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the repair pass and of stage 2, whose trials run from the candidate's block to the head."""
        blocks = blocks_of(model)
        drop, _ = self._shares(blocks)
        each = sum(block_flops(block, length) for block in blocks) / 2
        head = model.get_output_embeddings()
        each += 2 * cast(torch.nn.Linear, head).weight.numel() if head is not None else 0
        trials = sum(max(0, sum(b.can_drop_attention for b in blocks) - step) for step in range(drop))
        repairs = self.repair_work(model, count * length, length, "none")
        judging = trials * min(count, self.stage2_samples) * length * each
        return dataclasses.replace(repairs, flops=repairs.flops + judging)

    def _sizes(self, blocks: list[Block], constraint: Constraint) -> tuple[int, dict[str, int]]:
        """The number of attentions to drop, and of FFN channels that each block keeps."""
        drop, fraction = self._shares(blocks, spared=constraint.first_attention)
        budget = Budget(blocks, fraction, constraint, each_block=True)
        budget.check(self.sparsity)
        widths = map(round, budget.alike) if constraint == FREE else budget.fit(budget.alike)
        return drop, {group.name: n for (_, group), n in zip(budget.rows, widths, strict=True)}

    def _shares(self, blocks: list[Block], spared: bool = False) -> tuple[int, float]:
        """The number of attentions to drop (`spared` keeps the first), and the fraction of channels to keep."""
        check_sparsity(self.sparsity)
        with_attention = [b for b in blocks if b.can_drop_attention]
        attention = sum(b.parameters(b.anatomy.mixer) for b in with_attention) / max(1, len(with_attention))
        groups = [(b, g) for b in blocks for g in b.groups("none")]
        if not groups:
            raise ValueError("2SSP prunes FFN channels, and the model has none: take FLAP")
        ffn = sum(len(g) * b.cost(g) for b, g in groups) / len(groups)  # without the consumer's bias, which stays
        width = sum(len(g) for _, g in groups) / len(groups)
        drop = self.drop_attentions
        if drop is None:
            drop = attentions_to_drop(self.sparsity, len(blocks), attention, ffn, self.alpha) if attention else 0
        there = len(with_attention) - (spared and blocks[0].can_drop_attention)
        if not 0 <= drop <= there:
            but = ", of which the first block's must stay: change `drop_attentions` or `serve_on`" if spared else ""
            raise ValueError(f"2SSP would drop {drop} attentions, but the model has {len(with_attention)}{but}")
        total = sum(b.parameters() for b in blocks)
        added = sum(b.absent_bias(g) for b, g in groups) if self.biased and self.sparsity else 0
        return drop, channels_to_keep(self.sparsity, len(groups), total, attention, ffn, width, drop, added) / width


def attentions_to_drop(sparsity: float, blocks: int, attention: float, ffn: float, alpha: float = 1.5) -> int:
    r"""The number of attention sub-blocks that the second stage drops (2SSP, balance of the stages).

    .. math:: N = \mathrm{round}\bigl(B \, s^{(P_f / P_a) / \alpha}\bigr)

    Args:
        sparsity: s.
        blocks: B.
        attention: Parameters of one attention sub-block.
        ffn: Parameters of one FFN.
        alpha: The divisor of the exponent.

    Example:
        >>> attentions_to_drop(0.25, 32, 4 * 4096**2, 3 * 4096 * 11008)  # Llama-2-7B
        5
    """
    return round(blocks * sparsity ** (ffn / attention / alpha))


def channels_to_keep(
    sparsity: float, blocks: int, total: int, attention: float, ffn: float, width: float, drop: int, added: int = 0
) -> int:
    r"""The number of FFN channels that each block keeps, so that both stages together remove `sparsity`.

    .. math:: K = \mathrm{round}\Bigl(n \bigl(1 - \mathrm{round}\bigl((\mathrm{round}(s P) + P_+ - N P_a) / B\bigr)
              / P_f\bigr)\Bigr)

    Args:
        sparsity: s.
        blocks: B.
        total: Parameters of all blocks, norms included (P).
        attention: Parameters of one attention sub-block.
        ffn: Parameters of one FFN.
        width: FFN width (n).
        drop: Attention sub-blocks to drop (N).
        added: Parameters that a repair will add (:math:`P_+`).

    Raises:
        ValueError: The dropped attentions alone exceed `sparsity`, or removing all FFNs would not reach it.

    Example:
        >>> channels_to_keep(0.25, 32, 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096),
        ...                  4 * 4096**2, 3 * 4096 * 11008, 11008, 5)
        7744
    """
    left = round(sparsity * total) + added - drop * attention
    keep = round(width * (1 - round(left / blocks) / ffn))
    if not 1 <= keep <= width:
        raise ValueError(
            f"sparsity {sparsity} is out of reach for 2SSP: with {drop} attentions dropped, each block would keep "
            f"{keep} of {width:g} FFN channels; change `sparsity`, `alpha` or `drop_attentions`"
        )
    return keep


def _ends(model: PreTrainedModel, candidates: list[Block], drop: int) -> list[list[Block]]:
    """The choices of attentions that save the least and the most of the KV cache, and of the parameters."""
    size = attention_spans(model)
    cached = sorted(candidates, key=lambda b: b.kv_heads * min(size[b.index], 1 << 40))
    weighing = sorted(candidates, key=lambda b: b.parameters(b.anatomy.mixer))
    return [end for ranked in (cached, weighing) for end in (ranked[:drop], ranked[len(ranked) - drop :])]
