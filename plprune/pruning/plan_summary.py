"""Describes in one line how much a plan removes."""

from plprune.io.units import format_value
from plprune.pruning.plan import PruningPlan


def plan_summary(plan: PruningPlan) -> str:
    """Describes the reached sparsity, and the targets if there were any.

    Example:
        FLAP removed 25.0% of the blocks' parameters (25.0% asked), 19.7% of the model's
    """
    targets = plan.origin.get("targets", {})
    parts = [
        f"{plan.method} removed {plan.reached:.1%} of the blocks' parameters ({plan.sparsity:.1%} "
        f"{'for the target' if targets else 'asked'}), {plan.reached_of_model:.1%} of the model's"
    ]
    for name, target in targets.items():
        size = format_value(target["reached"], "bytes" if name == "memory" else "short")
        unit = "active parameters" if name == "active_parameters" else "parameters"
        if name == "memory":
            batch, context = (plan.settings[f"target_{key}"] for key in ("batch", "context"))
            unit = f"for weights and cache of {batch} x {context} tokens"
        parts.append(f"{size} {unit} ({plan.settings[f'target_{name}']} asked)")
    return "; ".join(parts)
