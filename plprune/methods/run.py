"""Runs any method for a target and a runtime, and completes its plan with the origin of the model and the text."""

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
from plprune.pruning.constraints import FREE, Constraint
from plprune.pruning.model_state import model_state
from plprune.pruning.plan import PruningPlan, fingerprint
from plprune.pruning.surgery import plan_of, set_plan

log = logging.getLogger(__name__)
version = functools.cache(metadata.version)  # which reads and parses a file


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a pruning: a method, and what its result must be like.

    Args:
        method: How to prune.
        target: What the result may be at most.
        serve_on: Where it must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served there,
            and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share it: widths and heads are divisible by their number.
    """

    method: PruningMethod
    target: Target = dataclasses.field(default_factory=Target)
    serve_on: Sequence[Runtime] = ()
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_required(self)
        serving.constraint(self.serve_on, self.tensor_parallel, self.method.conflicts)

    @property
    def settings(self) -> dict[str, Any]:
        """All of it in the form in which plans keep it, and in which a finished pruning is recognised."""
        target = {f"target_{name}": value for name, value in dataclasses.asdict(self.target).items()}
        place = {"serve_on": list(self.serve_on), "tensor_parallel": self.tensor_parallel}
        return dataclasses.asdict(self.method) | target | place

    def constraint(self, model: PreTrainedModel) -> Constraint:
        """What the pruned model must be like.

        Raises:
            ValueError: The model cannot be served where it must be, or not after a pruning by the method.
        """
        blocks = blocks_of(model)
        conflicts = functools.partial(self.method.conflicts, blocks=blocks)
        found = serving.constraint(self.serve_on, self.tensor_parallel, conflicts, model.config)
        found.check_model(blocks, model.config)
        return found

    def predict_sizes(self, model: PreTrainedModel) -> list[dict[str, int]]:
        """How many units each group would keep, as by :meth:`PruningMethod.predict_sizes`; the target does not count.

        Raises:
            ValueError: What pruning itself would refuse.
        """
        return self.method.predict_sizes(model, *_given(self.constraint(model)))

    def work(self, model: PreTrainedModel, count: int, length: int) -> Work:
        """What calibration takes beyond one pass through the blocks, as by :meth:`PruningMethod.work`."""
        return self.method.work(model, count, length, *_given(self.constraint(model)))

    def resolve_target(self, model: PreTrainedModel) -> "Request":
        """The request with the sparsity that its target comes to on a model, and without the target.

        The worst of the predicted cases decides, so that the result does fit.

        Args:
            model: Its parameters may be on the meta device.

        Raises:
            ValueError: The target is out of reach; the message names the nearest that is not.
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
            self.predict_sizes(model)  # says why
            raise
        if share > 1:
            raise ValueError(self._out_of_reach(sparsity, sizes(sparsity)))
        return self._at(sparsity)

    def prune(
        self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor], seed: int | None = None
    ) -> PruningPlan:
        """Prunes a model in place, as by :func:`prune`."""
        if isinstance(model.config, PrunedConfigMixin) and plan_of(model) is None:
            raise ValueError("the pruned model lacks its plan: load it by plprune.load_pruned from its folder")
        calibration = Calibration.of(batches)
        sharing.receive(model, calibration.group)
        of, resolved = origin(model, calibration, seed), self.resolve_target(model)
        if self.target.limits and not distributed.rank(calibration.group):
            log.info(
                "sparsity %.4f, for %s", resolved.method.sparsity, " and ".join(map(self._asked, self.target.limits))
            )
        plan = resolved.method.prune(model, calibration, *_given(resolved.constraint(model)))
        plan = dataclasses.replace(plan, settings=plan.settings | self.settings, origin=of | self.reached(model))
        set_plan(model, plan)
        equalise(model, plan, calibration.group)
        return plan

    def reached(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a pruned model came to in terms of the target, for the record; empty if there is none."""
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
    """Prunes a model in place by any method, and completes the plan with where it came from.

    Args:
        model: A causal language model. Of several processes (`Calibration.group`) one needs to have its weights, and
            the others a model of the same structure, with parameters on meta; all end with the pruned model.
        method: How to prune.
        batches: Calibration token ids, [b, s] each, without padding.
        seed: The seed that chose the calibration text, for the record.
        target: What the result may be at most; the method's sparsity is then found by it.
        serve_on: Where the result must load, as for :class:`Request`.
        tensor_parallel: Devices that will share the result.

    Raises:
        ValueError: The method cannot do it, or the processes came to different plans.
    """
    return Request(method, target, serve_on, tensor_parallel).prune(model, batches, seed)


def preflight(request: Request, load: Callable[[], PreTrainedModel]) -> None:
    """Refuses, before any weight is loaded, a pruning that would not be served, or would not meet its target.

    Args:
        request: What is asked for.
        load: Gives the model, without its weights.

    Raises:
        ValueError: The method cannot do it.
    """
    if request.serve_on or request.tensor_parallel > 1 or request.target.limits:
        model = load()
        request.resolve_target(model).predict_sizes(model)


def equalise(model: PreTrainedModel, plan: PruningPlan, group: distributed.ProcessGroup) -> None:
    """Makes sure that all processes have one plan, and gives them the first one's repaired values.

    Those are computed by each of them, and may differ in the last bit where the processors do.
    """
    distributed.check_agreement(plan.digest, "the plan", group)
    if group is not None:
        state = model.state_dict()
        for name in plan.repaired:
            state[name].copy_(distributed.broadcast(state[name], 0, group))


def source_of(method: PruningMethod) -> str:
    """A hash of the source that a method's decisions depend on: its own, and that of all below it."""
    own = {each.__module__ for each in type(method).__mro__ if issubclass(each, PruningMethod)}
    return source_digest(*sorted({__name__, *own}))


def origin(model: PreTrainedModel, calibration: Calibration, seed: int | None = None) -> dict[str, Any]:
    """What a plan is made from, for the record."""
    return {
        "model": model.config.name_or_path,
        "weights": model_state(model).fingerprint or fingerprint(model.named_parameters()),
        "calibration": calibration.fingerprint,
        "tokens": sum(ids.numel() for ids in calibration),
        "seed": seed,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("plprune", "torch", "transformers")},
    }


def _given(constraint: Constraint) -> tuple[Any, ...]:
    """What a method is given of a constraint: without one, nothing, as it may not know of any."""
    return () if constraint == FREE else (constraint,)


def _amount(name: str, size: float) -> str:
    return format_value(size, "bytes") if name == "memory" else f"{format_value(size, 'short')} parameters"
