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
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, UnitGroup, blocks_of
from plprune.methods.base import Repairing
from plprune.planning.extremes import distinct
from plprune.planning.needs import Work
from plprune.planning.sizes import attention_spans, block_flops
from plprune.pruning.allocation import Budget, Rows, check_sparsity, importance, top_k
from plprune.pruning.attention_search import AttentionSearch
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import evaluating
from plprune.pruning.plan import PruningPlan, block_name, block_of
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
        self.check_weights(model)
        calibration, blocks, first = Calibration.of(batches), blocks_of(model), int(constraint.first_attention)
        self._check_depth(model, first)
        cases, drop = self._cases(model, constraint), self._attentions(blocks, first > 0)
        self._check(blocks, constraint, cases[0])
        repairer, scores, influences = self.repairer(calibration), [], []
        for block, inputs in stream(model, calibration, "2SSP stage 1"):
            for group, norms in observe(block, inputs, Norms, attention="none"):
                scores.append((block, group, values(norms, lambda n: n.mean)))
            influences.append(inputs.influence)
        surgery, gone = Surgery(model), list[int]()
        if self.drop_blocks and self.blocks_by == "influence":
            order = sorted(blocks[first:], key=lambda block: influences[block.index].distance("cosine"))
            gone = [block.index for block in first_to_leave(blocks, order, self.drop_blocks)]
            cases = self._cases(model, constraint, gone)
        # Those parts that leave may be of unequal sizes. Channels that must leave too in all cases do so now.
        sizes = [self._sizes(blocks, constraint, lost) for lost in (cases if self.repair == "none" else cases[:1])]
        widths = {name: max(each[name] for each in sizes) for name in sizes[0]}
        chosen = [(block, group, top_k(score, widths[group.name])) for block, group, score in scores]
        repairer.carry_out(surgery, chosen, "2SSP repair")
        gone = self._second_stage(surgery, calibration, drop, first, gone)
        if self.repair == "none" and (self.drop_ffns or self.drop_blocks):
            self._trim(surgery, chosen, scores, constraint, gone)
        if gone:
            surgery.drop_blocks(gone)
        distances = importance([each.distance("angular") for each in influences])
        return surgery.plan("TwoSSP", dataclasses.asdict(self), distances)

    def _second_stage(
        self, surgery: Surgery, calibration: Calibration, drop: int, first: int, gone: list[int]
    ) -> list[int]:
        """Drops attentions and FFNs, and returns the indices of the blocks that leave; `gone` are those known."""
        by_loss = self.drop_blocks and not gone
        if not (drop or self.drop_ffns or by_loss):
            return gone
        windows, model = calibration.windows(self.stage2_samples), surgery.model
        with evaluating(model):
            search = AttentionSearch(surgery, windows, calibration.device or model.device, calibration.group)
            if drop:
                search.drop(drop, first, gone)
            if self.drop_ffns:
                search.drop_ffns(self.drop_ffns, gone)
            return search.blocks_to_drop(self.drop_blocks, first) if by_loss else gone

    def _trim(
        self,
        surgery: Surgery,
        chosen: Sequence[tuple[Block, UnitGroup, Tensor]],
        scores: Sequence[tuple[Block, UnitGroup, Tensor]],
        constraint: Constraint,
        gone: Collection[int],
    ) -> None:
        """Removes the channels that are missing to the sparsity, now that it is known which parts leave."""
        rest = [block for block in surgery.blocks if block.index not in gone]
        excess = sum(block.parameters() for block in rest) - (1 - self.sparsity) * surgery.parameters
        keep = 1 - excess / max(1, Budget(rest, 1.0).whole)
        if not 0 < keep < 1:  # none are missing
            return
        now, final = {group.name: group for _, group in _groups(rest)}, self._fitted(rest, keep, constraint)
        for (block, group, kept), (*_, score) in zip(chosen, scores, strict=True):
            if final.get(group.name, math.inf) < kept.shape[-1]:
                surgery.keep(block, now[group.name], torch.searchsorted(kept, top_k(score, final[group.name])))

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        drop = self.drop_attentions if blocks is None else self._attentions(blocks)
        reasons = ["no attention may leave: set `drop_attentions` to 0"] if constraint.every_attention and drop else []
        if constraint.every_ffn and self.drop_ffns:
            reasons.append("no FFN may leave: set `drop_ffns` to 0")
        return reasons + super().conflicts(constraint, blocks)

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        blocks = blocks_of(model)
        self._check_depth(model, int(constraint.first_attention))
        cases, found = self._cases(model, constraint), []
        self._check(blocks, constraint, cases[0])
        for lost in cases:
            known = [name for name in lost if name.endswith(".block")] if self.blocks_by == "influence" else []
            typical = next(case for case in cases if set(known) <= set(case))
            widths = self._sizes(blocks, constraint, lost if self.repair == "none" else typical)
            found.append(widths | dict.fromkeys(lost, 0))
        return distinct(found)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of the repair pass and of stage 2, whose trials run from the candidate's block to the head."""
        blocks = blocks_of(model)
        drop = self._attentions(blocks)
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

    def _cases(
        self, model: PreTrainedModel, constraint: Constraint, gone: Collection[int] | None = None
    ) -> list[list[str]]:
        """Choices of the parts that leave as a whole, by name: a typical one first; `gone` are the blocks, if known."""
        blocks, first, cases = blocks_of(model), int(constraint.first_attention), []
        drop = self._attentions(blocks, constraint.first_attention)
        for left in self._leaving(blocks, first) if gone is None else [[blocks[i] for i in gone]]:
            rest = [block for block in blocks if block.index not in {each.index for each in left}]
            able = [block for block in rest if block.index >= first and block.can_drop_attention]
            if drop > len(able):
                raise ValueError(
                    f"2SSP would drop {drop} attentions, but the blocks that stay have {len(able)}: lower "
                    "`drop_attentions` or `drop_blocks`"
                )
            spread = [able[i * len(able) // drop] for i in range(drop)]
            heads = [[b.groups()[0].name for b in some] for some in [spread, *_ends(model, able, drop)]]
            whole = [block_name(block.index) for block in left]
            cases += [[*whole, *own, *ffns] for own, ffns in itertools.product(heads, self._without_ffn(rest))]
        return distinct(cases)

    def _check(self, blocks: list[Block], constraint: Constraint, lost: Collection[str]) -> None:
        """Raises ValueError if the sparsity is out of reach where some parts leave, whose names are `lost`."""
        keep = self._share(blocks, lost)
        if not 0 < keep <= 1:
            raise ValueError(
                f"sparsity {self.sparsity} is out of reach for 2SSP: with {self.drop_blocks} blocks and "
                f"{self.drop_ffns} whole FFNs dropped, the other FFNs would keep {keep:.1%} of their channels; change "
                "`sparsity`, `drop_blocks` or `drop_ffns`"
            )
        Budget(blocks, keep, constraint, each_block=True).check(self.sparsity)

    def _sizes(self, blocks: list[Block], constraint: Constraint, lost: Collection[str]) -> dict[str, int]:
        """The number of channels that each FFN keeps if some parts leave as a whole, whose names are `lost`."""
        return self._fitted(blocks, min(1.0, self._share(blocks, lost)), constraint)

    def _fitted(self, blocks: list[Block], keep: float, constraint: Constraint) -> dict[str, int]:
        budget = Budget(blocks, keep, constraint, each_block=True)
        widths = budget.fit(budget.alike) if budget.restricted else [max(1, round(size)) for size in budget.alike]
        return {group.name: n for (_, group), n in zip(budget.rows, widths, strict=True)}

    def _attentions(self, blocks: Sequence[Block], spared: bool = False) -> int:
        """The number of attentions to drop; `spared` keeps the first."""
        there, drop = sum(block.can_drop_attention for block in blocks), self.drop_attentions
        if drop is None:
            groups, attention = _groups(blocks), _mean_attention(blocks)
            each = _cost(groups) / len({block.index for block, _ in groups})  # shared experts and others together
            formula = attention and not self.drop_blocks and not self.drop_ffns
            drop = attentions_to_drop(self.sparsity, len(blocks), attention, each, self.alpha) if formula else 0
        if not 0 <= drop <= there - (spared and blocks[0].can_drop_attention):
            but = ", of which the first block's must stay: change `drop_attentions` or `serve_on`" if spared else ""
            raise ValueError(f"2SSP would drop {drop} attentions, but the model has {there}{but}")
        return drop

    def _share(self, blocks: Sequence[Block], lost: Collection[str] = ()) -> float:
        """The fraction of channels to keep: by the paper's formula, or exactly if FFNs or blocks leave as a whole.

        Args:
            blocks: All blocks.
            lost: Names of the attentions, FFNs and blocks that leave.
        """
        check_sparsity(self.sparsity)
        groups, total = _groups(blocks), sum(block.parameters() for block in blocks)
        biased = self.biased and self.sparsity > 0
        if not self.drop_blocks and not self.drop_ffns:
            added = sum(block.absent_bias(group) for block, group in groups) if biased else 0
            ffn, width = _cost(groups) / len(groups), sum(len(group) for _, group in groups) / len(groups)
            attention, drop = _mean_attention(blocks), self._attentions(blocks)
            return channels_to_keep(self.sparsity, len(groups), total, attention, ffn, width, drop, added) / width
        left = -(1 - self.sparsity) * total
        for block in blocks:
            if block_name(block.index) not in lost:
                whole, attention = block.whole_ffn, f"blocks.{block.index}.attention"
                left += block.parameters() - (block.parameters(block.anatomy.mixer) if attention in lost else 0)
                left -= block.parameters(whole.consumer.path) if whole and whole.name in lost else 0
        gone = {block_of(name) for name in lost if not name.endswith(".attention")}
        own = [(block, group) for block, group in groups if block_of(group.name) not in gone]
        left += sum(block.absent_bias(group) for block, group in own) if biased else 0
        return 1 - left / max(1, _cost(own))

    def _without_ffn(self, blocks: Sequence[Block]) -> list[list[str]]:
        """Choices of whole FFNs that leave, by name: evenly spread, the smallest, and the largest."""
        if not self.drop_ffns:
            return [[]]
        found = [(b.parameters(group.consumer.path), group.name) for b in blocks if (group := b.whole_ffn)]
        ranked, count = sorted(found, key=lambda pair: pair[0]), self.drop_ffns
        if not found:
            raise ValueError("no FFN of this model is a module of its own that can leave: set `drop_ffns` to 0")
        if count >= len(found):
            raise ValueError(
                f"2SSP would drop {count} FFNs, but of the {len(found)} that can leave one must stay: lower `drop_ffns`"
            )
        spread = [found[i * len(found) // count] for i in range(count)]
        return [[name for _, name in some] for some in (spread, ranked[:count], ranked[-count:])]

    def _leaving(self, blocks: Sequence[Block], first: int) -> list[list[Block]]:
        """Choices of whole blocks that leave, from the first on: evenly spread, the smallest, and the largest."""
        if not self.drop_blocks:
            return [[]]
        if self.drop_blocks >= len(blocks):
            raise ValueError(f"2SSP would drop {self.drop_blocks} blocks, but the model has {len(blocks)}")
        n, count = len(blocks) - first, self.drop_blocks
        even = [first + i * n // count for i in range(count)]
        spread = [blocks[i] for i in [*even, *(i for i in range(first, len(blocks)) if i not in even)]]
        ranked = sorted(blocks[first:], key=Block.parameters)
        return [first_to_leave(blocks, order, count) for order in (spread, ranked, ranked[::-1])]

    @property
    def unstreamable(self) -> str:
        why = "`drop_blocks` needs the whole model in memory: leave out --stream, or set it to 0"
        return why if self.drop_blocks else ""

    def _check_depth(self, model: PreTrainedModel, first: int) -> None:
        """Raises ValueError if blocks cannot leave the model."""
        if not self.drop_blocks:
            return
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


def _groups(blocks: Sequence[Block]) -> Rows:
    groups = [(block, group) for block in blocks for group in block.groups("none")]
    if not groups:
        raise ValueError("2SSP prunes FFN channels, and the model has none: take FLAP")
    return groups


def _cost(groups: Rows) -> int:
    """Parameters of all channels, without the consumers' biases, which stay."""
    return sum(len(group) * block.cost(group) for block, group in groups)


def _mean_attention(blocks: Sequence[Block]) -> float:
    """Mean parameters of the attentions that can be dropped."""
    sizes = [block.parameters(block.anatomy.mixer) for block in blocks if block.can_drop_attention]
    return sum(sizes) / max(1, len(sizes))


def _ends(model: PreTrainedModel, candidates: list[Block], drop: int) -> list[list[Block]]:
    """The choices of attentions that save the least and the most of the KV cache, and of the parameters."""
    size = attention_spans(model)
    cached = sorted(candidates, key=lambda b: b.kv_heads * min(size[b.index], 1 << 40))
    weighing = sorted(candidates, key=lambda b: b.parameters(b.anatomy.mixer))
    return [end for ranked in (cached, weighing) for end in (ranked[:drop], ranked[len(ranked) - drop :])]
