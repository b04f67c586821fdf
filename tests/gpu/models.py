"""Models and texts that fill a GPU's tiles, and by how much two prunings differ."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from plprune import PruningPlan
from tests.builders import tiny, tokenizer, windows

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
TEXT: list[Tensor] = list(windows(16, 64).split(4))
JUDGED: list[Tensor] = list(windows(8, 64, seed=2).split(1))


def model(**changes: Any) -> PreTrainedModel:
    """A random Llama of four blocks, of which a sum of float32 is not as large as its error."""
    made = tiny("llama", **(SIZES | changes))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data /= 3
    return made


def save(folder: Path, **changes: Any) -> str:
    """Such a model with its tokenizer in a folder."""
    model(**changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def unlike(one: PruningPlan, other: PruningPlan) -> float:
    """The fraction of all units that one plan keeps and another does not."""
    assert one.sizes == other.sizes
    differ = [len(set(keep.tolist()) ^ set(other.keep[name].tolist())) for name, keep in one.keep.items()]
    return sum(differ) / sum(one.sizes.values())
