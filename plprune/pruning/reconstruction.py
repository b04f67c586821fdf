r"""Trains all weights that a pruned block keeps, by gradient, toward the outputs of the dense model.

Blocks are trained one by one, so that only one of them is on the device. A block learns on the states that the repaired
blocks before it produce, toward the states that leave it in the dense model. So it also makes up for what those blocks
lost. No gradient leaves the block.

.. math:: L(W) = \frac1T \sum_t \frac{\lVert f_W(x_t) - h_t \rVert^2}{\lVert h_t \rVert^2}

Adam changes a copy of the weights in float32. The rate of each weight is relative to the root mean square of its
values. A block that did not come closer to the dense one keeps the weights that it had.

Symbols: :math:`f_W` the block with its weights W, x its inputs in the pruned model and h its outputs in the dense one,
[d] each, t one of T tokens. Reconstruction by blocks: BRECQ (https://arxiv.org/abs/2102.05426) for quantised models;
https://arxiv.org/abs/2510.14444 for pruned ones.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plprune.architecture.blocks import Block
from plprune.architecture.modules import requiring_grad
from plprune.io import distributed
from plprune.pruning.descent import steps
from plprune.pruning.forward import BlockInputs, run_block
from plprune.pruning.journal import NotFinite

log = logging.getLogger(__name__)
WINDOWS = 4  # per step, of all processes together
ROUNDING = 1e-9  # an error below it is rounding, from which nothing is learned


def reconstruct(block: Block, inputs: BlockInputs, passes: int, rate: float) -> tuple[float, float]:
    """Trains a pruned block in place.

    Args:
        block: The block, in memory.
        inputs: Its inputs in batches of one window, with the outputs of the dense model (:meth:`BlockInputs.aim`).
        passes: Over the inputs.
        rate: The highest learning rate, relative to the root mean square of each weight.

    Returns:
        The mean error of a token before and after, relative to the dense output.
    """
    before = relative_error(inputs)
    if before < ROUNDING:
        return before, before
    weights = [p for p in block.module.parameters() if p.is_floating_point() and bool(p.detach().any())]
    first, trained = [p.detach().clone() for p in weights], [p.detach().float().clone() for p in weights]
    own_rates = [{"params": [p], "lr": rate * float(p.square().mean().sqrt())} for p in trained]
    with requiring_grad(weights, True):
        for _, step in steps(own_rates, _windows(inputs, passes)):
            _put(weights, trained)
            for weight, gradient in zip(trained, _gradients(inputs, step, weights), strict=True):
                weight.grad = gradient
    _put(weights, trained)
    after = relative_error(inputs)
    if not after < before:
        _put(weights, first)
        log.warning("%s did not come closer to the dense model, and keeps its weights: lower `repair_rate`", block.path)
        return before, before
    return before, after


def relative_error(inputs: BlockInputs) -> float:
    """The mean error of a token, relative to the dense output, over all processes; NaN if the block diverged."""
    try:
        outputs = inputs.outputs()
    except NotFinite:
        return math.nan
    errors = [_errors(y, h.to(y.device)) for y, h in zip(outputs, inputs.targets, strict=True)]
    sums = torch.tensor([float(sum(map(len, errors))), sum(float(each.sum()) for each in errors)])
    tokens, total = distributed.all_reduce_sum(sums, inputs.group).tolist()
    return total / tokens


def _errors(outputs: Tensor, targets: Tensor) -> Tensor:  # [b, s, d] each -> [b * s]
    off, size = (outputs.float() - targets.float()).square().sum(-1), targets.float().square().sum(-1)
    return (off / size.clamp(min=torch.finfo(size.dtype).tiny)).flatten()


def _windows(inputs: BlockInputs, passes: int) -> list[list[int]]:
    """This process's windows in each step. The steps are the same for every number of processes."""
    counts = distributed.gather_objects(len(inputs.calls), inputs.group)
    first, count = sum(counts[: distributed.rank(inputs.group)]), sum(counts)
    stride, mine = -(-count // WINDOWS), range(len(inputs.calls))
    own = [[i - first for i in range(start, count, stride) if i - first in mine] for start in range(stride)]
    generator = torch.Generator().manual_seed(0)
    return [own[i] for _ in range(passes) for i in torch.randperm(stride, generator=generator).tolist()]


def _gradients(inputs: BlockInputs, step: Sequence[int], weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of the mean error over the windows of a step, of all processes, in float32."""
    total, tokens = [torch.zeros_like(w, dtype=torch.float32) for w in weights], 0
    for i in step:
        with torch.enable_grad():
            outputs = run_block(inputs.block, inputs.hidden[i].to(inputs.device), inputs.calls[i].to(inputs.device))
            errors = _errors(outputs, inputs.targets[i].to(outputs.device))
            found = torch.autograd.grad(errors.sum(), weights, allow_unused=True)
        tokens += len(errors)
        for sum_, own in zip(total, found, strict=True):
            if own is not None:
                sum_ += own
    if inputs.group is not None:
        flat = torch.cat([*(each.flatten() for each in total), total[0].new_tensor([float(tokens)])])
        *parts, count = distributed.all_reduce_sum(flat, inputs.group).split([*(w.numel() for w in weights), 1])
        total, tokens = [part.view_as(w) for part, w in zip(parts, weights, strict=True)], float(count)
    return [each / tokens for each in total]


@torch.no_grad()
def _put(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
