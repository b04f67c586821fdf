r"""Best of several: tries whole candidates, each pruned and repaired, and prunes by the one nearest to the dense model.

A candidate is a method with its settings: widths by importance at some strength or by gates, kv heads or not, whole
blocks or not, some repair. Candidates are calibrated on a part of the text, and judged on windows that none of them
sees. Each round keeps the better half and doubles the part (successive halving, https://arxiv.org/abs/1502.07943).
The last one then prunes the model with all windows but those that judge.

A candidate is judged by the mean divergence of its next-token distributions from the dense model's:

.. math:: D = \frac1T \sum_t \mathrm{KL}(p_t \,\Vert\, q_t)

Symbols: t one of T tokens of the windows that judge, p the dense model's distribution, q the candidate's.
"""

import copy
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import on_device
from plprune.io import distributed
from plprune.io.checks import check_shares, check_sizes
from plprune.methods.base import PruningMethod
from plprune.planning.extremes import distinct
from plprune.planning.needs import Work
from plprune.planning.sizes import block_flops
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.forward import evaluating
from plprune.pruning.gate_training import TeacherSample, states_of, teacher_sample
from plprune.pruning.plan import PruningPlan

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BestOf(PruningMethod):
    """Prunes by that of several methods whose model is nearest to the dense one on windows that none of them saw.

    It needs the model twice in memory.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1), for all candidates.
        candidates: Methods with their settings; their own sparsity does not count.
        held_out: The number of calibration windows that judge, the last ones.
        first_share: The fraction of the other windows that all candidates are calibrated on; each further round doubles
            it for the better half.
    """

    sparsity: float = 0.25
    candidates: Sequence[PruningMethod] = ()
    held_out: int = 8
    first_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(held_out=self.held_out)
        if not self.candidates:
            raise ValueError("`candidates` is empty: give the methods to try")
        check_shares(first_share=self.first_share)
        object.__setattr__(
            self, "candidates", [dataclasses.replace(c, sparsity=self.sparsity) for c in self.candidates]
        )

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"candidates": [_named(each) for each in self.candidates]}

    @property
    def inner(self) -> Sequence[PruningMethod]:
        return self.candidates

    @property
    def biased(self) -> bool:
        return any(each.biased for each in self.candidates)

    @property
    def ranks_experts(self) -> bool:
        return any(each.ranks_experts for each in self.candidates)

    @property
    def unstreamable(self) -> str:
        return "candidates are tried on copies of the whole model: leave out --stream, or give one method"

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], constraint: Constraint = FREE
    ) -> PruningPlan:
        calibration = Calibration.of(batches)
        self.check_weights(model)
        count = len(calibration.windows()) - self.held_out
        if count < 1:
            raise ValueError(
                f"`held_out` takes {self.held_out} windows, but there are {len(calibration.windows())}: raise "
                "num_samples, or lower `held_out`"
            )
        others, judges = calibration.part(0, count), calibration.part(count, count + self.held_out)
        device = calibration.device or model.device
        with evaluating(model), on_device(model, device):
            samples = [teacher_sample(model, ids.to(device)) for ids in judges.own_windows()]
        ranked, trials = list(self.candidates), []
        for left, windows in self._rounds(count):
            found = []
            for method in ranked[:left]:
                trial = copy.deepcopy(model)
                method.prune(trial, others.part(0, windows), *constraint.given)
                found.append(_divergence(trial, samples, self.held_out, calibration))
                trials.append(_named(method) | {"windows": windows, "divergence": round(found[-1], 4)})
                log.info("%s on %d windows: divergence %.4f from the dense model", _name(method), windows, found[-1])
            ranked = [ranked[i] for i in sorted(range(left), key=found.__getitem__)]
        plan = ranked[0].prune(model, others, *constraint.given)
        final = _divergence(model, samples, self.held_out, calibration)
        log.info("%s is the best: divergence %.4f on %d windows", _name(ranked[0]), final, count)
        origin = {"trials": trials, "best": _named(ranked[0]) | {"windows": count, "divergence": round(final, 4)}}
        return dataclasses.replace(plan, method="BestOf", settings=self.settings, origin=origin)

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        found = [f"{_name(c)}: {reason}" for c in self.candidates for reason in c.conflicts(constraint, blocks)]
        return list(dict.fromkeys(found))

    def predict_sizes(self, model: PreTrainedModel, constraint: Constraint = FREE) -> list[dict[str, int]]:
        cases = [case for each in self.candidates for case in each.predict_sizes(model, *constraint.given)]
        return distinct(cases)

    def work(self, model: PreTrainedModel, count: int, length: int, constraint: Constraint = FREE) -> Work:
        """The cost of all trials: each calibrates and is judged; and a copy of the model. The dearest ones go on."""
        rest, once = max(1, count - self.held_out), sum(block_flops(block, length) for block in blocks_of(model))
        flops, single, most = self.held_out * length * once, 0.0, 0.0
        for left, windows in [*self._rounds(rest), (1, rest)]:
            works = [each.work(model, windows, length, *constraint.given) for each in self.candidates]
            works = sorted(works, key=lambda work: work.flops + work.single)[-left:]
            flops += sum(work.flops + (windows + self.held_out) * length * once for work in works)
            single += sum(work.single for work in works)
            most = max(most, *(work.bytes for work in works))
        copied = sum(p.numel() * p.element_size() for p in model.parameters())
        return Work(flops - rest * length * once, single, most + copied)

    def _rounds(self, count: int) -> Iterator[tuple[int, int]]:
        """The number of candidates of each round, and of windows that they are calibrated on."""
        left, share = len(self.candidates), self.first_share
        while left > 1:
            yield left, max(1, round(min(1.0, share) * count))
            left, share = (left + 1) // 2, 2 * share


@torch.no_grad()
def _divergence(
    model: PreTrainedModel, samples: Sequence[TeacherSample], count: int, calibration: Calibration
) -> float:
    """The mean divergence of a model on all windows that judge, of which this process has some."""
    device = calibration.device or model.device
    with evaluating(model), on_device(model, device):
        total = sum((float(each.divergence(states_of(model, each.ids))) for each in samples), 0.0)
    return float(distributed.all_reduce_sum(torch.tensor([total]), calibration.group)) / count


def _name(method: PruningMethod) -> str:
    """The class of a candidate, with the settings that are not its defaults."""
    changed = [f.name for f in dataclasses.fields(method) if getattr(method, f.name) != f.default]
    listed = ", ".join(f"{name} {getattr(method, name)}" for name in changed if name != "sparsity")
    return f"{type(method).__name__} ({listed})" if listed else type(method).__name__


def _named(method: PruningMethod) -> dict[str, Any]:
    return {"method": type(method).__name__, **method.settings}
