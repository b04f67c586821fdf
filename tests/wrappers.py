"""Tiny random models that see, of the default configs of their types, and inputs of an image and text."""

import inspect
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
    "aya_vision": SIZES,
    "exaone4_5": {"vision_config": GRID["vision_config"] | {"window_size": SIZE, "fullatt_block_indexes": [1]}},
    "gemma4": {
        "vision_config": {
            **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 4, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2},
            "position_embedding_size": PATCHES,
        }
    },
    "got_ocr2": {"vision_config": SIZES["vision_config"] | {"window_size": 2, "global_attn_indexes": [1]}},
    "idefics3": {"scale_factor": 2, **SIZES},
    "internvl": {"vision_config": {"image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}},
    "llava_onevision": {"image_grid_pinpoints": [[SIZE, SIZE]], **SIZES},
    "mistral3": {"spatial_merge_size": 1, **SIZES},
    "ovis2": SIZES,
    "paligemma": {"projection_dim": 64, "vision_config": SIZES["vision_config"] | {"projection_dim": 64}},
    "qwen3_5": {
        "vision_config": GRID["vision_config"] | {"num_position_embeddings": 16},
        "text_config": {"rope_parameters": {**SECTIONS["rope_parameters"], "partial_rotary_factor": 1.0}},
    },
}
OWN |= {"smolvlm": OWN["idefics3"], "qwen3_5_moe": OWN["qwen3_5"]}
OWN["qwen3_vl_moe"] = OWN["qwen3_vl"] | {"text_config": OWN["qwen3_vl"]["text_config"] | {"moe_intermediate_size": 128}}


def build(kind: str) -> PreTrainedModel:
    """A tiny random model of a type with its towers, float32, in evaluation mode."""
    values = _merged(shrink(CONFIG_MAPPING[kind]().to_dict()), OWN.get(kind, {}))
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind].from_dict(values), dtype=torch.float32).eval()


def image_and_text(model: PreTrainedModel) -> dict[str, Tensor]:
    """The arguments for a random image in the middle of a text."""
    kind, vision = model.config.model_type, model.config.vision_config
    taken = inspect.signature(model.forward).parameters
    shape = {"llava_onevision": (1, 2), "idefics3": (1, 1), "smolvlm": (1, 1)}.get(kind, (1,))
    shape = (*shape, 3, SIZE, SIZE)
    seen: dict[str, Any] = {}
    if "image_grid_thw" in taken:
        shape = (PATCHES, 3 * vision.temporal_patch_size * PATCH**2)
        seen = {"image_grid_thw": torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]])}
    elif kind in ("llava_onevision", "mistral3"):
        seen = {"image_sizes": torch.tensor([[SIZE, SIZE]])}
    elif "image_position_ids" in taken:
        shape, side = (1, PATCHES, 3 * PATCH**2), torch.arange(SIZE // PATCH)
        seen = {"image_position_ids": torch.cartesian_prod(side, side)[None]}
    seen["pixel_values"] = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    found: Any = model.get_image_features(**seen).pooler_output  # type: ignore[operator]
    parts = found if isinstance(found, list | tuple) else [found]
    ids = torch.tensor([[10, 11, *[IMAGE] * sum(part.shape[:-1].numel() for part in parts), 12, 13]])
    types = [name for name in ("token_type_ids", "mm_token_type_ids") if name in taken]
    return {"input_ids": ids, **seen, **{name: (ids == IMAGE).long() for name in types}}


def _merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return dict(values) | {
        key: _merged(values[key] or {}, value) if key.endswith("_config") else value for key, value in own.items()
    }
