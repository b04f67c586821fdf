"""Tiny random models that see, of the default configs of their types, and inputs of an image and text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

from tests.zoo import shrink

IMAGE = 3  # the token that stands for a part of an image, as all special tokens of shrunk configs
SIZE, PATCH = 16, 4  # of an image in pixels
PATCHES = (SIZE // PATCH) ** 2
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
GRID: dict[str, Any] = {"vision_config": {"depth": 2, "patch_size": PATCH, "out_hidden_size": 64}}
SIZES: dict[str, Any] = {"vision_config": {"image_size": SIZE, "patch_size": PATCH}}
OWN: dict[str, dict[str, Any]] = {
    "gemma3": {"mm_tokens_per_image": 4, **SIZES},
    "llava": SIZES,
    "qwen2_5_vl": {
        "vision_config": GRID["vision_config"] | {"window_size": SIZE, "fullatt_block_indexes": [1]},
        "text_config": SECTIONS,
    },
    "qwen3_vl": {
        "vision_config": GRID["vision_config"] | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
        "text_config": {"head_dim": 16, **SECTIONS},
    },
}


def build(kind: str) -> PreTrainedModel:
    """A tiny random model of a type with its towers, float32, in evaluation mode."""
    values = _merged(shrink(CONFIG_MAPPING[kind]().to_dict()), OWN.get(kind, {}))
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind].from_dict(values), dtype=torch.float32).eval()


def image_and_text(model: PreTrainedModel) -> dict[str, Tensor]:
    """The arguments for a random image in the middle of a text."""
    kind, config = model.config.model_type, model.config
    generator = torch.Generator().manual_seed(5)
    if "qwen" in kind:
        vision = config.vision_config
        width = 3 * vision.temporal_patch_size * PATCH**2
        seen = {"pixel_values": torch.randn(PATCHES, width, generator=generator)}
        seen |= {"image_grid_thw": torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]])}
        tokens = PATCHES // vision.spatial_merge_size**2
    else:
        seen = {"pixel_values": torch.randn(1, 3, SIZE, SIZE, generator=generator)}
        tokens = getattr(config, "mm_tokens_per_image", PATCHES)
    ids = torch.tensor([[10, 11, *[IMAGE] * tokens, 12, 13]])
    name = {"gemma3": "token_type_ids"}.get(kind, "mm_token_type_ids" if "qwen" in kind else "")
    return {"input_ids": ids, **seen, **({name: (ids == IMAGE).long()} if name else {})}


def _merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values) | {
        key: _merged(values[key], value) if key.endswith("_config") else value for key, value in own.items()
    }
