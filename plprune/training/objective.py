"""The loss of recovery: cross-entropy of the next token and, with a teacher, the distance from its answers.

Where the model's config has `output_router_logits`, the family's loss of unequal loads of experts is added, times
`router_aux_loss_coef`, as the model's own forward pass does. Of a step it is the mean over its batches, weighted by
their counted tokens.
"""

import contextlib

from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.architecture.wrappers import text_config
from plprune.pruning.losses import (
    HeadInputs,
    counted_positions,
    head_inputs,
    model_inputs,
    next_token_criterion,
    weighted_loss,
)
from plprune.recovery.distillation import Teacher, hidden_distances, loss_denominators, recorded_outputs
from plprune.training.compilation import compiled_blocks


class Objective:
    """The losses of a batch, divided by sums over its optimizer step, so that every token counts the same.

    Args:
        model: The model that is trained.
        teacher: The teacher to learn from, if any.
        whole_head: Whether this process holds the whole head of the model.
        compiles: Whether losses come from compiled blocks.
    """

    def __init__(self, model: PreTrainedModel, teacher: Teacher | None, whole_head: bool, compiles: bool) -> None:
        self.model, self.teacher, self.whole_head = model, teacher, whole_head
        self._compiled = compiled_blocks(model) if compiles else contextlib.nullcontext

    def denominators(self, batch: dict[str, Tensor]) -> Tensor:  # [1 + compared blocks]
        """The batch's share in the sums by which losses are divided: its counted tokens, and its teacher's norms."""
        compares = self.teacher is not None and self.teacher.settings.of != "logits"
        answers = self.teacher.answers(model_inputs(batch)) if self.teacher is not None and compares else {}
        return loss_denominators(batch["labels"], answers)

    def losses(self, batch: dict[str, Tensor], denominators: Tensor) -> dict[str, Tensor]:
        """The batch's share in the losses of its step, by name; `train_loss` is the one to minimise.

        Args:
            batch: The batch.
            denominators: The sum of :meth:`denominators` over all batches of the step, in all processes.
        """
        labels, positions, tokens = batch["labels"], counted_positions(batch["labels"]), denominators[0]
        cross_entropy = next_token_criterion(labels, positions)
        if self.teacher is None:
            with self._compiled():
                states = self.head_inputs(batch, positions)
                loss, _ = weighted_loss(states, [cross_entropy], [1.0])
            return {"train_loss": (loss + self._unequal_loads(states)) / tokens}
        settings, answers = self.teacher.settings, self.teacher.answers(model_inputs(batch))
        parts = [cross_entropy, settings.criterion(answers, positions)] if settings.uses_logits else [cross_entropy]
        weights = [1 - settings.weight, settings.weight][: len(parts)]
        with self._compiled(), recorded_outputs(self.model, settings.blocks(len(blocks_of(self.model)))) as hidden:
            states = self.head_inputs(batch, positions)
            loss, sums = weighted_loss(states, parts, weights)
        loss, distilled = (loss + self._unequal_loads(states)) / tokens, sums[1:].sum() / tokens
        if hidden:
            distance = (hidden_distances(hidden, labels, answers["hidden"]) / denominators[1:]).mean()
            loss, distilled = loss + settings.weight * distance, distilled + distance
        return {"train_loss": loss, "next_token_loss": sums[0] / tokens, "distillation_loss": distilled}

    def _unequal_loads(self, states: HeadInputs) -> Tensor | float:
        """What a batch loses by unequal loads of experts, times its counted tokens."""
        if states.unequal_loads is None:
            return 0.0
        return text_config(self.model.config).router_aux_loss_coef * len(states.values) * states.unequal_loads

    def head_inputs(self, batch: dict[str, Tensor], positions: Tensor) -> HeadInputs:
        """The hidden states that enter the model's head, at some positions of a batch."""
        return head_inputs(self.model, model_inputs(batch), positions, whole=self.whole_head)
