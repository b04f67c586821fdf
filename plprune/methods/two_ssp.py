r"""2SSP: two-stage structured pruning (Sandri, Cunegatti, Iacca, TMLR 2025, https://arxiv.org/abs/2501.17771).

The first stage removes the FFN channels with the lowest scores, the same number in every block. The second drops whole
attention sub-blocks one at a time, each time the one whose absence raises perplexity least. A formula balances the two.
`drop_ffns` drops whole FFNs likewise, and `drop_blocks` whole blocks, by perplexity or by their influence on the hidden
states (ShortGPT, https://arxiv.org/abs/2403.03853).

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
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.methods.base import Repairing
from plprune.planning.needs import Work
from plprune.planning.sizes import attention_spans, block_flops
from plprune.pruning.allocation import Budget, Rows, check_sparsity, importance, top_k
from plprune.pruning.attention_search import AttentionSearch
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import evaluating
from plprune.pruning.model_state import model_state
from plprune.pruning.plan import PruningPlan, block_name
from plprune.pruning.repair import Repair
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream, values
from plprune.pruning.surgery import Surgery, check_depth, first_to_leave

Choice = Literal["perplexity", "influence"]


@dataclasses.dataclass(frozen=True)
class TwoSSP(Repairing):
    """Removes FFN channels by activation norm, then whole attention sub-blocks by perplexity.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        alpha: Balance between the stages: a larger value drops more attention sub-blocks.
        drop_attentions: Number of attention sub-blocks that the second stage drops; by default the paper's formula
            decides, or none are dropped if `drop_ffns` or `drop_blocks` is set; 0 drops none.
        drop_ffns: Number of whole FFNs, or mixtures of experts, that the second stage drops after the attentions; the
            first stage then removes the less.
        drop_blocks: Number of whole blocks that leave the model at the end; the first stage then removes the less.
        blocks_by: Choice of the blocks. perplexity: one at a time, each time the one whose absence raises perplexity
            least; influence: those with the lowest mean of one minus the cosine between a block's input and output.
        stage2_samples: Calibration windows that judge each candidate of the second stage.
    """

    sparsity: float = 0.25
    alpha: float = 1.5
    drop_attentions: int | None = None
    drop_ffns: int = 0
    drop_blocks: int = 0
    blocks_by: Choice = "perplexity"
    stage2_samples: int = 1
    repair: Repair = dataclasses.field(default="none", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0 or self.stage2_samples < 1:
            raise ValueError("2SSP needs a positive `alpha`, and at least one window to judge by (`stage2_samples`)")
        if self.drop_blocks < 0 or self.blocks_by not in get_args(Choice):
            raise ValueError("`drop_blocks` is a number of blocks, and `blocks_by` is perplexity or influence")
        if self.drop_ffns < 0:
            raise ValueError(f"`drop_ffns` is {self.drop_ffns}, but it is a number of FFNs")

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration, blocks = Calibration.of(batches), blocks_of(model)
        drop, widths = self._sizes(blocks, constraint)
        first = int(constraint.first_attention)
        self._check_depth(model, first)
        repairer, scores, influences = self.repairer(calibration), [], []
        for block, inputs in stream(model, calibration, "2SSP stage 1"):
            for group, norms in observe(block, inputs, Norms, attention="none"):
                scores.append((block, group, values(norms, lambda n: n.mean)))
            influences.append(inputs.influence)
        surgery, gone = Surgery(model), list[int]()
        if self.drop_blocks and self.blocks_by == "influence":
            order = sorted(blocks[first:], key=lambda block: influences[block.index].distance("cosine"))
            gone = [block.index for block in first_to_leave(blocks, order, self.drop_blocks)]
            drop, widths = self._sizes(blocks, constraint, gone)
        chosen = [(block, group, top_k(score, widths[group.name])) for block, group, score in scores]
        repairer.carry_out(surgery, chosen, "2SSP repair")
        if drop or self.drop_ffns or (self.drop_blocks and not gone):
            windows = calibration.windows(self.stage2_samples)
            with evaluating(model):
                search = AttentionSearch(surgery, windows, calibration.device or model.device, calibration.group)
                if drop:
                    search.drop(drop, first, gone)
                if self.drop_ffns:
                    search.drop_ffns(self.drop_ffns, gone)
                if self.drop_blocks and not gone:
                    search.drop_blocks(self.drop_blocks, first)
        if gone:
            surgery.drop_blocks(gone)
        distances = importance([each.distance("angular") for each in influences])
        return surgery.plan("TwoSSP", dataclasses.asdict(self), distances)

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        drop = self.drop_attentions if blocks is None else self._shares(list(blocks))[0]
        reasons = ["no attention may leave: set `drop_attentions` to 0"] if constraint.every_attention and drop else []
        if constraint.every_ffn and self.drop_ffns:
            reasons.append("no FFN may leave: set `drop_ffns` to 0")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        drop, _ = self._sizes(blocks, constraint)
        first = int(constraint.first_attention)
        self._check_depth(model, first)
        candidates = [b for b in blocks[first:] if b.can_drop_attention]
        spread = [candidates[i * len(candidates) // drop] for i in range(drop)]
        heads = [[b.groups()[0].name for b in gone] for gone in [spread, *_ends(model, candidates, drop)]]
        cases = []
        for left in self._leaving(blocks, first):
            known = [block.index for block in left] if self.blocks_by == "influence" else []
            _, widths = self._sizes(blocks, constraint, known)
            whole = [block_name(block.index) for block in left]
            lost = [[*whole, *own, *ffns] for own, ffns in itertools.product(heads, self._without_ffn(blocks))]
            cases += [widths | dict.fromkeys(names, 0) for names in lost]
        return [case for i, case in enumerate(cases) if case not in cases[:i]]

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the repair pass and of stage 2, whose trials run from the candidate's block to the head."""
        blocks = blocks_of(model)
        drop, _ = self._shares(blocks)
        each = sum(block_flops(block, length) for block in blocks) / 2
        head = model.get_output_embeddings()
        each += 2 * cast(torch.nn.Linear, head).weight.numel() if head is not None else 0
        trials = sum(max(0, sum(b.can_drop_attention for b in blocks) - step) for step in range(drop))
        trials += sum(max(0, sum(bool(b.whole_ffn) for b in blocks) - step) for step in range(self.drop_ffns))
        if self.blocks_by == "perplexity":
            trials += sum(len(blocks) - step for step in range(self.drop_blocks))
        repairs = self.repair_work(model, count * length, length, "none")
        judging = trials * min(count, self.stage2_samples) * length * each
        return dataclasses.replace(repairs, flops=repairs.flops + judging)

    def _sizes(
        self, blocks: list[Block], constraint: Constraint, gone: Collection[int] = ()
    ) -> tuple[int, dict[str, int]]:
        """The number of attentions to drop, and of FFN channels that each block keeps; `gone` are blocks that leave,
        as far as they are known.
        """
        drop, fraction = self._shares(blocks, constraint.first_attention, gone)
        budget = Budget(blocks, fraction, constraint, each_block=True)
        budget.check(self.sparsity)
        widths = budget.fit(budget.alike) if budget.restricted else map(round, budget.alike)
        return drop, {group.name: n for (_, group), n in zip(budget.rows, widths, strict=True)}

    def _shares(self, blocks: list[Block], spared: bool = False, gone: Collection[int] = ()) -> tuple[int, float]:
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
            formula = attention and not self.drop_blocks and not self.drop_ffns
            each = ffn * len(groups) / len({block.index for block, _ in groups})  # shared experts and others together
            drop = attentions_to_drop(self.sparsity, len(blocks), attention, each, self.alpha) if formula else 0
        if self.drop_blocks >= len(blocks):
            raise ValueError(f"2SSP would drop {self.drop_blocks} blocks, but the model has {len(blocks)}")
        there = len(with_attention) - (spared and blocks[0].can_drop_attention)
        if not 0 <= drop <= there:
            but = ", of which the first block's must stay: change `drop_attentions` or `serve_on`" if spared else ""
            raise ValueError(f"2SSP would drop {drop} attentions, but the model has {len(with_attention)}{but}")
        if self.drop_blocks or self.drop_ffns:
            return drop, self._share_of_the_rest(groups, blocks, drop * attention, gone)
        total = sum(b.parameters() for b in blocks)
        added = sum(b.absent_bias(g) for b, g in groups) if self.biased and self.sparsity else 0
        return drop, channels_to_keep(self.sparsity, len(groups), total, attention, ffn, width, drop, added) / width

    def _share_of_the_rest(self, groups: Rows, blocks: list[Block], attentions: float, gone: Collection[int]) -> float:
        """The fraction of channels that FFNs keep if others leave as a whole, alone or with their blocks.

        Args:
            groups: The groups of channels of all blocks.
            blocks: All blocks.
            attentions: Parameters of the attentions that leave.
            gone: Indices of the blocks that leave; if these are not known, they count as blocks of the mean size.
        """
        stay = 1.0 if gone else 1 - self.drop_blocks / len(blocks)
        rest = [block for block in blocks if block.index not in gone]
        wholes = [block.parameters(group.consumer.path) for block in rest if (group := block.whole_ffn)]
        if self.drop_ffns and not wholes:
            raise ValueError("no FFN of this model is a module of its own that can leave: set `drop_ffns` to 0")
        if self.drop_ffns and self.drop_ffns >= round(len(wholes) * stay):
            raise ValueError(
                f"2SSP would drop {self.drop_ffns} FFNs, but of the {len(wholes)} that can leave one must stay: lower "
                "`drop_ffns`"
            )
        share = stay * (1 - self.drop_ffns / max(1, len(wholes) * stay))  # of the FFNs of the rest that stay
        whole = self.drop_ffns * sum(wholes) / max(1, len(wholes))
        own = [(block, group) for block, group in groups if block.index not in gone]
        added = sum(block.absent_bias(group) for block, group in own) if self.biased and self.sparsity else 0
        kept = stay * sum(block.parameters() for block in rest)
        left = kept - (1 - self.sparsity) * sum(block.parameters() for block in blocks) + share * added
        keep = 1 - (left - attentions - whole) / (share * sum(len(group) * block.cost(group) for block, group in own))
        if not 0 < keep <= 1:
            raise ValueError(
                f"sparsity {self.sparsity} is out of reach for 2SSP: with {self.drop_blocks} blocks and "
                f"{self.drop_ffns} whole FFNs dropped, the other FFNs would keep {keep:.1%} of their channels; change "
                "`sparsity`, `drop_blocks` or `drop_ffns`"
            )
        return keep

    def _without_ffn(self, blocks: Sequence[Block]) -> list[list[str]]:
        """Choices of whole FFNs that leave, by name: evenly spread, the smallest, and the largest."""
        if not self.drop_ffns:
            return [[]]
        found = [(b.parameters(group.consumer.path), group.name) for b in blocks if (group := b.whole_ffn)]
        ranked, count = sorted(found, key=lambda pair: pair[0]), self.drop_ffns
        spread = [found[i * len(found) // count] for i in range(count)]
        return [[name for _, name in some] for some in (spread, ranked[:count], ranked[-count:])]

    def _leaving(self, blocks: Sequence[Block], first: int) -> list[list[Block]]:
        """Choices of whole blocks that leave, from the first on: evenly spread, the smallest, and the largest."""
        if not self.drop_blocks:
            return [[]]
        n, count = len(blocks) - first, self.drop_blocks
        even = [first + i * n // count for i in range(count)]
        spread = [blocks[i] for i in [*even, *(i for i in range(first, len(blocks)) if i not in even)]]
        ranked = sorted(blocks[first:], key=Block.parameters)
        return [first_to_leave(blocks, order, count) for order in (spread, ranked, ranked[::-1])]

    def _check_depth(self, model: PreTrainedModel, first: int) -> None:
        """Raises ValueError if blocks cannot leave the model."""
        if not self.drop_blocks:
            return
        if model_state(model).journal is not None:
            raise ValueError("`drop_blocks` needs the whole model in memory: leave out --stream, or set it to 0")
        for gone in self._leaving(blocks_of(model), first):
            check_depth(model, sorted(block.index for block in gone))


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
    sparsity: float,
    blocks: int,
    total: int,
    attention: float,
    ffn: float,
    width: float,
    drop: int,
    added: int = 0,
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
