"""Reads the config of a DeciLM folder (`block_configs`). A copy of this file lies beside the weights."""

from types import SimpleNamespace
from typing import Any

from transformers import LlamaConfig


class DeciLMConfig(LlamaConfig):
    """Llama's config with the sizes of each block, as attributes."""

    model_type = "nemotron-nas"

    def __init__(self, *args: Any, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.block_configs = [
            SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in block.items()})
            for block in block_configs
        ]

    def to_dict(self) -> dict[str, Any]:
        blocks = [{name: vars(part) for name, part in vars(block).items()} for block in self.block_configs]
        return super().to_dict() | {"model_type": self.model_type, "block_configs": blocks}
