"""What a pruning method is, and how one is run so that its plan says where everything came from."""

import dataclasses
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune.allocation import check_sparsity
from plprune.calibration import Calibration
from plprune.plan import PruningPlan, fingerprint
from plprune.surgery import attach


class PruningMethod(ABC):
    """A one-shot structured pruning method.

    Subclasses are frozen dataclasses of the paper's settings, `sparsity` among them: the fraction of the decoder
    blocks' parameters to remove, in [0, 1).
    """

    sparsity: float

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)

    @abstractmethod
    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        """Prunes in place, and says what was kept.

        Args:
            model: A causal language model of a family in `plprune.anatomy.FAMILIES`.
            batches: Calibration token ids, [b, s] each, without padding.

        Raises:
            ValueError: The sparsity is out of reach, the family unknown, or activations hold NaN or infinity.
        """


def prune(
    model: PreTrainedModel, method: PruningMethod, batches: Calibration | Iterable[Tensor], seed: int | None = None
) -> PruningPlan:
    """Prunes a model in place by any method, and completes the plan with where it came from.

    Args:
        model: A causal language model.
        method: How to prune.
        batches: Calibration token ids, [b, s] each, without padding.
        seed: The seed that chose the calibration text, for the record.
    """
    calibration = Calibration.of(batches)
    origin = {
        "model": model.config.name_or_path,
        "weights": fingerprint(model.named_parameters()),
        "calibration": text_fingerprint(calibration),
        "tokens": sum(ids.numel() for ids in calibration),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("plprune", "torch", "transformers")},
    }
    plan = dataclasses.replace(method.prune(model, calibration), origin=origin)
    attach(model, plan)
    return plan


def text_fingerprint(batches: Calibration) -> str:
    """A hash of the calibration windows, whatever the size of the batches."""
    ids, lengths = [ids.flatten() for ids in batches], [ids.shape[1] for ids in batches for _ in ids]
    return fingerprint([("ids", torch.cat(ids).cpu()), ("lengths", torch.tensor(lengths))], values=1 << 30)
