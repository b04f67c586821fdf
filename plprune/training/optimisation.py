"""The learning rate schedule, and the norms of gradients."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from plprune.io import distributed


def gradient_norms(parameters: list[list[nn.Parameter]]) -> Tensor:  # [groups]
    """Computes the gradient norm of each group of parameters, also of those that FSDP2 has sharded.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> gradient_norms([[weight], []])
        tensor([5., 0.])
    """
    grads = [[p.grad for p in group if p.grad is not None] for group in parameters]
    sharded = any(isinstance(grad, DTensor) for group in grads for grad in group)
    local = [[grad.to_local() if isinstance(grad, DTensor) else grad for grad in group] for group in grads]
    device = next(p.device for group in parameters for p in group)
    squares = torch.stack([get_total_norm(group).to(device) for group in local]).square()
    return (distributed.all_reduce_sum(squares, distributed.world()) if sharded else squares).sqrt()


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step as a fraction of its peak: a linear warmup, then a cosine to 0.

    Example:
        >>> [round(warmup_cosine(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))
