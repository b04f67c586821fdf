"""Full fine-tuning of a text decoder: of its blocks, embeddings, norms and head.

All of its weights are kept in float32, so that it computes in float32 where nothing else is asked for
(`trainer.precision` bf16-mixed), and are saved in their own dtypes.
"""

from transformers import PreTrainedModel

from plprune.architecture.blocks import anatomy_of
from plprune.architecture.wrappers import text_parts
from plprune.recovery.masters import keep_in_float32


def unfreeze(model: PreTrainedModel) -> list[str]:
    """Freezes what of a model is not its text decoder, in place.

    Returns:
        The names of the trained parameters, tied ones once. Those that the family does not train, as biases that
        correct the choice of experts, stay frozen.
    """
    parts = text_parts(model, anatomy_of(model).blocks)
    trained = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    for part in parts:
        for module in part.modules():
            keep_in_float32(module)
    return [name for name, p in model.named_parameters() if p.requires_grad]
