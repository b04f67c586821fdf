"""The state that plprune attaches to a model: its plan and, if its blocks are on disk, their journal."""

from dataclasses import dataclass

from torch import nn

from plprune.architecture.attached import attached
from plprune.pruning.journal import Journal, NoJournal
from plprune.pruning.plan import PruningPlan


@dataclass(frozen=True)
class ModelState:
    """The state of a model besides its weights.

    Args:
        plan: How the model was pruned; None if it was not.
        journal: Where changes are written, if the blocks are on disk.
        fingerprint: Hash of the weights in the model's files, if the blocks are on disk.
    """

    plan: PruningPlan | None = None
    journal: Journal | None = None
    fingerprint: str | None = None


def model_state(model: nn.Module) -> ModelState:
    """The state of a model; an empty one if nothing is attached to it."""
    return attached(model, ModelState) or ModelState()


def journal_of(model: nn.Module) -> NoJournal:
    """The journal of a model whose blocks are on disk; for a model in memory, a new one that stores nothing."""
    return model_state(model).journal or NoJournal()
