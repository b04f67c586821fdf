"""What a model is worth: perplexity, parameters, size and speed."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import processes
from plprune.anatomy import blocks_of
from plprune.calibration import evaluating
from plprune.lora import base_parameters


def next_token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:  # [b, s, v], [b, s]
    """Cross-entropy of every token given those before it; labels of -100 do not count.

    Example:
        >>> next_token_loss(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])).exp()
        tensor(4.)
    """
    logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Iterable[Tensor], group: processes.Group = None) -> float:
    r"""Perplexity over windows of token ids, the first token of each given.

    .. math:: \exp\Bigl(-\frac1N \sum_{w} \sum_{t > 1} \log p(x_{w,t} \mid x_{w,<t})\Bigr)

    Args:
        model: A causal language model.
        windows: Token ids, [b, s] each, without padding.
        group: The processes among which the windows are shared; each gets the perplexity over all. They take as many
            steps each, as those that hold parts of one model must.

    Raises:
        ValueError: There is no token to predict.
    """
    windows = list(windows)
    mine, total, count = processes.share(windows, group), 0.0, 0
    with evaluating(model):
        for i in range(-(-len(windows) // processes.size(group))):
            ids = (mine[i] if i < len(mine) else windows[0]).to(model.device)
            loss = next_token_loss(model(input_ids=ids, use_cache=False).logits, ids, "sum")
            if i < len(mine):
                total, count = total + loss.double().item(), count + ids[:, 1:].numel()
    total, count = processes.total(torch.tensor([total, count], dtype=torch.float64), group).tolist()
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
    """Parameters in the decoder blocks, and in all, without adapters; tied ones count once."""
    return sum(_count(block.module) for block in blocks_of(model)), _count(model)


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Args:
        perplexity: On held-out windows.
        block_parameters: Parameters in the decoder blocks.
        parameters: All parameters.
        bytes: Size of the weights on disk.
        tokens_per_second: Reading speed, batch 1; None if it was not measured.
    """

    perplexity: float
    block_parameters: int
    parameters: int
    bytes: int
    tokens_per_second: float | None


def measure(
    model: PreTrainedModel, windows: list[Tensor], group: processes.Group = None, speed: bool = True
) -> Measurement:  # [b, s] each
    """Measures a model as it stands.

    Args:
        model: The model, LoRA merged unless it is in shards.
        windows: Held-out token ids.
        group: The processes that measure it together; each gets the result.
        speed: Whether the first of them measures the speed; one that holds a part of the model cannot.
    """
    in_blocks, in_all = parameters(model)
    size = sum(_numel(p) * p.element_size() for _, p in base_parameters(model))
    quality = perplexity(model, windows, group)
    alone = speed and processes.rank(group) == 0
    rate = processes.same(tokens_per_second(model, windows[0][:1]) if alone else None, group)
    return Measurement(quality, in_blocks, in_all, size, rate)


def table(rows: dict[str, Measurement]) -> str:
    """Measurements side by side, one row each, the first of them as the yardstick.

    Example:
        >>> print(table({"dense": Measurement(20.0, 100, 150, 600_000_000, 10.0)}))
        model       perplexity   in blocks  parameters   on disk   tokens/s
        dense            20.00         100         150  600.0 MB       10.0
    """
    lines = [f"{'model':<11}{'perplexity':>11}{'in blocks':>12}{'parameters':>12}{'on disk':>10}{'tokens/s':>11}"]
    for name, row in rows.items():
        speed = "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        lines.append(
            f"{name:<11}{row.perplexity:>11.2f}{row.block_parameters:>12,}{row.parameters:>12,}"
            f"{row.bytes / 1e6:>7.1f} MB{speed:>11}"
        )
    return "\n".join(lines)


def as_dict(rows: dict[str, Measurement]) -> dict[str, dict[str, float]]:
    """Measurements as JSON-ready numbers, without those that were not taken."""
    return {name: {k: v for k, v in asdict(row).items() if v is not None} for name, row in rows.items()}


def _count(module: nn.Module) -> int:
    return sum(_numel(parameter) for _, parameter in base_parameters(module))


def _numel(parameter: Tensor) -> int:
    return cast(
        int, getattr(parameter, "ds_numel", parameter.numel())
    )  # under ZeRO-3 a parameter is empty between uses


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
