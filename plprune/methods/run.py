"""Prunes by any method for a target size and a runtime, and records the origin of the model and text in the plan."""

import dataclasses
import functools
import logging
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.architecture.modeling_plprune import PrunedConfigMixin
from plprune.checkpoint import sharing
from plprune.io import distributed
from plprune.io.cache import source_digest
from plprune.io.checks import check_required
from plprune.io.units import format_value
from plprune.methods.base import PruningMethod
from plprune.planning import serving
from plprune.planning.needs import Work
from plprune.planning.serving import Runtime
from plprune.planning.sizes import Ledger
from plprune.planning.targets import Target, least_sparsity
from plprune.pruning.calibration import Calibration
from plprune.pruning.constraints import Constraint
from plprune.pruning.model_state import model_state
from plprune.pruning.plan import PruningPlan, fingerprint
from plprune.pruning.surgery import plan_of, set_plan

log = logging.getLogger(__name__)
version = functools.cache(metadata.version)  # cached, as each call parses a file


@dataclasses.dataclass(frozen=True)
class Request:
    """A pruning method with the requirements on its result.

    Args:
        method: The pruning method.
        target: The maximum size of the result.
        serve_on: Programs that must load the result: llama.cpp, vllm, decilm, transformers. Only sizes that these
            support are chosen, with the sparsity nearest to the requested one. Impossible requests raise ValueError.
        tensor_parallel: Number of devices that will share the result; it divides widths and numbers of heads.
    """

    method: PruningMethod
    target: Target = dataclasses.field(default_factory=Target)
    serve_on: Sequence[Runtime] = ()
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_required(self)
        if self.method.ranks_experts and self.target.active_parameters is not None:
            raise ValueError(
                "target.active_parameters cannot be planned with `experts` true, as a token runs as many experts "
                "however many stay: set `experts` to false, or give target.parameters"
            )
        serving.constraint(self.serve_on, self.tensor_parallel, self.method.conflicts)

    @property
    def settings(self) -> dict[str, Any]:
        """The request as a dictionary for the plan; a finished pruning is recognised by it."""
        target = {f"target_{name}": value for name, value in dataclasses.asdict(self.target).items()}
        if self.target.active_parameters is None:  # earlier plans have no such setting
            del target["target_active_parameters"]
        place = {"serve_on": list(self.serve_on), "tensor_parallel": self.tensor_parallel}
        return self.method.settings | target | place

    def constraint(self, model: PreTrainedModel) -> Constraint:
        """The constraint on the sizes of the pruned model.

        Raises:
            ValueError: A requested program cannot load the model, or cannot load it after pruning by the method.
        """
        blocks = blocks_of(model)
        conflicts = functools.partial(self.method.conflicts, blocks=blocks)
        found = serving.constraint(self.serve_on, self.tensor_parallel, conflicts, model.config)
        found.check_model(blocks)
        return found

    def predict_sizes(self, model: PreTrainedModel) -> list[dict[str, int]]:
        """Predicts sizes as :meth:`PruningMethod.predict_sizes` does; ignores the target.

        Raises:
            ValueError: Pruning by this request would fail.
        """
        return self.method.predict_sizes(model, *self.constraint(model).given)

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """The cost of calibration beyond one pass through the blocks, as :meth:`PruningMethod.work` gives it."""
        return self.method.work(model, count, length, *self.constraint(model).given)

    def resolve_target(self, model: PreTrainedModel) -> "Request":
        """Replaces the target by the lowest sparsity that meets it on a model.

        The largest of the predicted cases decides, so that the result fits in any case.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: The target is out of reach; the message names the smallest size that is possible.
        """
        limits = self.target.limits
        if not limits:
            return self
        ledger = Ledger(model, self.method.biased)

        def sizes(sparsity: float) -> dict[str, int]:
            cases = [self.target.sizes(ledger, case) for case in self._at(sparsity).predict_sizes(model)]
            return {name: max(case[name] for case in cases) for name in limits}

        def excess(sparsity: float) -> float | None:
            try:
                return max(size / limits[name] for name, size in sizes(sparsity).items())
            except ValueError:
                return None

        try:
            sparsity, share = least_sparsity(excess)
        except ValueError:
            self.predict_sizes(model)  # raises an error that says why
            raise
        if share > 1:
            raise ValueError(self._out_of_reach(sparsity, sizes(sparsity)))
        return self._at(sparsity)

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], seed: int | None = None
    ) -> PruningPlan:
        """Prunes a model in place, as :func:`prune` does."""
        if isinstance(model.config, PrunedConfigMixin) and plan_of(model) is None:
            raise ValueError("the pruned model lacks its plan: load it by plprune.load_pruned from its folder")
        calibration = Calibration.of(batches)
        sharing.receive(model, calibration.group)
        of, resolved = origin(model, calibration, seed), self.resolve_target(model)
        if self.target.limits and not distributed.rank(calibration.group):
            log.info(
                "sparsity %.4f, for %s", resolved.method.sparsity, " and ".join(map(self._asked, self.target.limits))
            )
        plan = resolved.method.prune(model, calibration, *resolved.constraint(model).given)
        plan = dataclasses.replace(
            plan, settings=plan.settings | self.settings, origin=plan.origin | of | self.reached(model)
        )
        set_plan(model, plan)
        equalise(model, plan, calibration.group)
        return plan

    def reached(self, model: PreTrainedModel) -> dict[str, Any]:
        """The requested and the reached sizes of a pruned model, for the plan; empty without a target."""
        limits = self.target.limits
        if not limits:
            return {}
        found = self.target.sizes(Ledger(model))
        return {"targets": {name: {"asked": asked, "reached": found[name]} for name, asked in limits.items()}}

    def _at(self, sparsity: float) -> "Request":
        method = dataclasses.replace(self.method, sparsity=sparsity)
        return dataclasses.replace(self, method=method, target=Target())

    def _asked(self, name: str) -> str:
        return f"target.{name} {getattr(self.target, name)}"

    def _out_of_reach(self, sparsity: float, found: dict[str, int]) -> str:
        missed = [name for name, size in found.items() if size > self.target.limits[name]]
        asked = " and ".join(map(self._asked, missed))
        least = " and ".join(_amount(name, found[name]) for name in missed)
        return (
            f"{asked} is out of reach of {type(self.method).__name__} with these settings: the least that it leaves is "
            f"{least}, at sparsity {sparsity:.3f}; ask for that, or start from a smaller model"
        )


def prune(
    model: PreTrainedModel,
    method: PruningMethod,
    batches: Calibration | Iterable[Tensor],
    seed: int | None = None,
    *,
    target: Target = Target(),
    serve_on: Sequence[Runtime] = (),
    tensor_parallel: int = 1,
) -> PruningPlan:
    """Prunes a model in place by any method, and records the origin of the model and the text in the plan.

    Args:
        model: A causal language model. With several processes (`Calibration.group`), one needs the weights; the others
            need the same structure, with parameters on the meta device. All end with the pruned model.
        method: The pruning method.
        batches: Calibration token ids, [b, s] each, without padding.
        seed: The seed that chose the calibration text; only recorded in the plan.
        target: The maximum size of the result; it then determines the sparsity.
        serve_on: Programs that must load the result, as for :class:`Request`.
        tensor_parallel: Number of devices that will share the result.

    Raises:
        ValueError: The method cannot meet the request, or the processes computed different plans.
    """
    return Request(method, target, serve_on, tensor_parallel).prune(model, batches, seed)


def preflight(request: Request, load: Callable[[], PreTrainedModel]) -> None:
    """Checks, before any weight is loaded, that a request can be met.

    Args:
        request: The request.
        load: Returns the model without its weights.

    Raises:
        ValueError: The method cannot meet the target or the constraint.
    """
    if request.serve_on or request.tensor_parallel > 1 or request.target.limits:
        model = load()
        request.resolve_target(model).predict_sizes(model)


def equalise(model: PreTrainedModel, plan: PruningPlan, group: distributed.ProcessGroup) -> None:
    """Checks that all processes have the same plan, and copies the repaired values of the first one to the others.

    Each process computes these values; different processors may give different last bits.
    """
    distributed.check_agreement(plan.digest, "the plan", group)
    if group is not None:
        state = model.state_dict()
        for name in plan.repaired:
            state[name].copy_(distributed.broadcast(state[name], 0, group))


def source_of(method: PruningMethod) -> str:
    """A hash of the source code of a method and of the modules that it imports."""
    kinds = {type(each) for each in (method, *method.inner)}
    own = {each.__module__ for kind in kinds for each in kind.__mro__ if issubclass(each, PruningMethod)}
    return source_digest(*sorted({__name__, *own}))


def origin(model: PreTrainedModel, calibration: Calibration, seed: int | None = None) -> dict[str, Any]:
    """Records the model, the text and the versions that a plan results from."""
    return {
        "model": model.config.name_or_path,
        "weights": model_state(model).fingerprint or fingerprint(model.named_parameters()),
        "calibration": calibration.fingerprint,
        "tokens": sum(ids.numel() for ids in calibration),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("plprune", "torch", "transformers")},
    }


def _amount(name: str, size: float) -> str:
    return (
        format_value(size, "bytes") if name == "memory" else f"{format_value(size, 'short')} {name.replace('_', ' ')}"
    )
