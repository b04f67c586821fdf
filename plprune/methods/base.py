"""What a pruning method is, and how one is run so that its plan says where everything came from."""

import dataclasses
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import processes, serving
from plprune.allocation import check_sparsity
from plprune.anatomy import Block, blocks_of
from plprune.calibration import Calibration
from plprune.modeling_plprune import Written
from plprune.plan import PruningPlan, fingerprint
from plprune.serving import Constraint, Place
from plprune.surgery import attach, plan_of


@dataclasses.dataclass(frozen=True)
class PruningMethod(ABC):
    """A one-shot structured pruning method.

    Subclasses are frozen dataclasses of the paper's settings. One that is to honour `serve_on` says in `conflicts` what
    it cannot do, and makes in `prune` what `check` returns.

    Args:
        sparsity: The fraction of the decoder blocks' parameters to remove, in [0, 1).
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
    """

    sparsity: float
    serve_on: Sequence[Place] = dataclasses.field(default_factory=list, kw_only=True, hash=False)
    tensor_parallel: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        object.__setattr__(self, "serve_on", list(self.serve_on))  # as in a plan that was read
        serving.constraint(self.serve_on, self.tensor_parallel, self.conflicts)

    def conflicts(self, asked: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        """Why the method, with its settings, cannot honour a constraint, each reason with what to change.

        Args:
            asked: The constraint.
            blocks: The model's; if not given, of one that has no biases.
        """
        return [] if asked == serving.FREE else [f"{type(self).__name__} does not know how: leave out `serve_on`"]

    def check(self, model: PreTrainedModel) -> Constraint:
        """Makes sure that the method can prune a model so that it can be served where it must; needs no weights.

        Args:
            model: Its parameters may be on the meta device.

        Returns:
            What the pruned model must be like.

        Raises:
            ValueError: The method cannot.
        """
        blocks = blocks_of(model)
        asked = serving.constraint(
            self.serve_on, self.tensor_parallel, lambda asked: self.conflicts(asked, blocks), model.config
        )
        asked.check_model(blocks, model.config)
        return asked

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
        model: A causal language model. Of several processes (`Calibration.group`) one needs to have its weights, and
            the others a model of the same structure, with parameters on meta; all end with the pruned model.
        method: How to prune.
        batches: Calibration token ids, [b, s] each, without padding.
        seed: The seed that chose the calibration text, for the record.

    Raises:
        ValueError: The method cannot do it, or the processes came to different plans.
    """
    if isinstance(model.config, Written) and plan_of(model) is None:
        raise ValueError("the pruned model lacks its plan: load it by plprune.load_pruned from its folder")
    calibration = Calibration.of(batches)
    processes.receive(model, calibration.group)
    of = origin(model, calibration, seed)
    plan = dataclasses.replace(method.prune(model, calibration), origin=of)
    attach(model, plan)
    equalise(model, plan, calibration.group)
    return plan


def equalise(model: PreTrainedModel, plan: PruningPlan, group: processes.Group) -> None:
    """Makes sure that all processes have one plan, and gives them the first one's repaired values.

    Those are computed by each of them, and may differ in the last bit where the processors do.
    """
    processes.agree(plan.digest, "the plan", group)
    if group is not None:
        state = model.state_dict()
        for name in plan.repaired:
            state[name].copy_(processes.sent(state[name], 0, group))


def origin(model: PreTrainedModel, calibration: Calibration, seed: int | None = None) -> dict[str, Any]:
    """What a plan is made from, for the record."""
    weights = getattr(model, "weights_fingerprint", None)  # of a model whose weights are on disk
    return {
        "model": model.config.name_or_path,
        "weights": weights or fingerprint(model.named_parameters()),
        "calibration": text_fingerprint(calibration),
        "tokens": sum(ids.numel() for ids in calibration),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("plprune", "torch", "transformers")},
    }


def text_fingerprint(batches: Calibration) -> str:
    """A hash of the calibration windows, whatever the size of the batches."""
    ids, lengths = [ids.flatten() for ids in batches], [ids.shape[1] for ids in batches for _ in ids]
    return fingerprint([("ids", torch.cat(ids).cpu()), ("lengths", torch.tensor(lengths))], values=1 << 30)
