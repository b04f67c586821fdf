"""What a model is worth: perplexity, parameters, size and speed."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.anatomy import blocks_of
from plprune.calibration import evaluating


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:  # [b, s, v], [b, s]
    """Cross-entropy of every token given those before it; labels of -100 do not count.

    Example:
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).exp()
        tensor(4.)
    """
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Iterable[Tensor]) -> float:
    r"""Perplexity over windows of token ids, the first token of each given.

    .. math:: \exp\Bigl(-\frac1N \sum_{w} \sum_{t > 1} \log p(x_{w,t} \mid x_{w,<t})\Bigr)

    Args:
        model: A causal language model.
        windows: Token ids, [b, s] each, without padding.

    Raises:
        ValueError: There is no token to predict.
    """
    total, count = 0.0, 0
    with evaluating(model):
        for ids in windows:
            ids = ids.to(model.device)
            total += next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, "sum").double().item()
            count += ids[:, 1:].numel()
    if not count:
        raise ValueError("no text to measure perplexity on: give windows of at least two tokens")
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


@torch.no_grad()
def tokens_per_second(model: PreTrainedModel, ids: Tensor, repeats: int = 9) -> float:  # [b, s]
    """How fast a model reads: the median over `repeats` forward passes, after one that does not count."""
    ids = ids.to(model.device)
    seconds = []
    with evaluating(model):
        for _ in range(repeats + 1):
            _synchronise(model.device)
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            _synchronise(model.device)
            seconds.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(seconds[1:])


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters in the decoder blocks, and in all; tied ones count once."""
    return sum(block.parameters() for block in blocks_of(model)), sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Args:
        perplexity: On held-out windows.
        block_parameters: Parameters in the decoder blocks.
        parameters: All parameters.
        bytes: Size of the weights on disk.
        tokens_per_second: Reading speed, batch 1.
    """

    perplexity: float
    block_parameters: int
    parameters: int
    bytes: int
    tokens_per_second: float


def measure(model: PreTrainedModel, windows: list[Tensor]) -> Measurement:  # [b, s] each
    """Measures a model as it stands.

    Args:
        model: The model, LoRA merged.
        windows: Held-out token ids.
    """
    in_blocks, in_all = parameters(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Measurement(perplexity(model, windows), in_blocks, in_all, size, tokens_per_second(model, windows[0][:1]))


def table(rows: dict[str, Measurement]) -> str:
    """Measurements side by side, one row each, the first of them as the yardstick.

    Example:
        >>> print(table({"dense": Measurement(20.0, 100, 150, 600_000_000, 10.0)}))
        model       perplexity   in blocks  parameters   on disk   tokens/s
        dense            20.00         100         150  600.0 MB       10.0
    """
    lines = [f"{'model':<11}{'perplexity':>11}{'in blocks':>12}{'parameters':>12}{'on disk':>10}{'tokens/s':>11}"]
    for name, row in rows.items():
        lines.append(
            f"{name:<11}{row.perplexity:>11.2f}{row.block_parameters:>12,}{row.parameters:>12,}"
            f"{row.bytes / 1e6:>7.1f} MB{row.tokens_per_second:>11.1f}"
        )
    return "\n".join(lines)


def as_dict(rows: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """Measurements as JSON-ready numbers."""
    return {name: asdict(row) for name, row in rows.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
