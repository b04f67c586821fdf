r"""Putting right what removal broke, in closed form: least-squares restoration and bias compensation.

Symbols: W the consumer's weight, X its inputs with mean :math:`\mu` and second moments H, M the kept columns and P the
removed ones, :math:`\lambda` the damping.
"""

import torch
from torch import Tensor


def complement(keep: Tensor, size: int) -> Tensor:
    """The indices below `size` that are not in `keep`, ascending.

    Example:
        >>> complement(torch.tensor([1, 3]), 4)
        tensor([0, 2])
    """
    return torch.ones(size, dtype=torch.bool).index_fill_(0, keep.cpu(), False).nonzero().flatten()


def restore(
    weight: Tensor,  # [d_out, d_in]
    moments: Tensor,  # [d_in, d_in]
    keep: Tensor,  # [kept]
    damping: float,
) -> Tensor:  # [d_out, kept], float64
    r"""The kept columns, changed so that they also do the work of the removed ones (FASP).

    .. math:: W' = W_M + W_P H_{PM} \left(H_{MM} + \lambda \, \overline{\mathrm{diag}}(H_{MM}) \, I\right)^{-1}

    It minimises :math:`\lVert W X - W' X_M \rVert_F^2`, shrunk toward the kept weights rather than toward zero.

    Args:
        weight: The consumer's weight.
        moments: Second moments of its inputs, centred if the bias is compensated too.
        keep: Columns that stay.
        damping: :math:`\lambda`, relative to the mean diagonal.

    Example:
        >>> w, x = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        >>> restore(w, x.T @ x, torch.tensor([0]), damping=0.0)
        tensor([[3.]], dtype=torch.float64)
    """
    gone = complement(keep, len(moments)).to(moments.device)
    keep = keep.to(moments.device)
    weight, moments = weight.double().to(moments.device), moments.double()
    kept = moments[keep[:, None], keep]  # as few copies as can be: for a wide FFN each takes gigabytes
    kept.diagonal().add_(damping * kept.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(kept)
    del kept
    if info.item():
        raise ValueError(
            "the calibration inputs do not determine the restored weights: raise `damping`, or num_samples"
        )
    return weight[:, keep] + torch.cholesky_solve(moments[keep[:, None], gone] @ weight[:, gone].T, factor).T


def compensation(
    weight: Tensor,  # [d_out, d_in]
    mean: Tensor,  # [d_in]
    keep: Tensor,  # [kept]
    restored: Tensor | None = None,  # [d_out, kept]
) -> Tensor:  # [d_out], float64
    r"""What the bias must gain for the consumer's mean output to stay (FLAP's compensation; FASP's with W').

    .. math:: \Delta b = W \mu - W' \mu_M \quad (= W_P \, \mu_P \text{ when } W' = W_M)

    Example:
        >>> compensation(torch.tensor([[1.0, 2.0]]), torch.tensor([5.0, 3.0]), torch.tensor([0]))
        tensor([6.], dtype=torch.float64)
    """
    weight, mean, keep = weight.double(), mean.double().to(weight.device), keep.to(weight.device)
    restored = weight[:, keep] if restored is None else restored.to(weight.device)
    return weight @ mean - restored @ mean[keep]
