"""Random models in the shapes of real ones, and what running them takes."""

import gc
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from plprune.planning.hardware import GPUS

Cells = dict[str, Callable[[], dict[str, Any]]]  # of a section: what to measure, by its name
SHAPES: dict[str, dict[str, Any]] = {
    "OPT-125M": {"model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072}
    | {"num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50272},
    "Llama-3-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256},
    "LLaMA-30B": {"hidden_size": 6656, "intermediate_size": 17920, "num_attention_heads": 52}
    | {"num_key_value_heads": 52, "num_hidden_layers": 60, "vocab_size": 32000},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "vocab_size": 128256}
    | {"num_key_value_heads": 8, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "SmolLM2-135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "vocab_size": 49152}
    | {"num_key_value_heads": 3, "num_hidden_layers": 30, "tie_word_embeddings": True},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM = 2  # steps that do not count


def made(shape: str, blocks: int, device: torch.device, length: int, **changes: Any) -> PreTrainedModel:
    """A random model on the device, of at most so many blocks; of the changes those that its family knows."""
    sizes: dict[str, Any] = {"model_type": "llama"} | SHAPES[shape]
    sizes |= {name: value for name, value in changes.items() if name in sizes}
    sizes |= {"num_hidden_layers": min(blocks, sizes["num_hidden_layers"]), "max_position_embeddings": length}
    config = CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def depth(shape: str) -> int:
    return SHAPES[shape]["num_hidden_layers"]


def tokens(model: PreTrainedModel, count: int, length: int) -> torch.Tensor:  # [count, length]
    return torch.randint(5, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))


def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the peak of memory over what was allocated before, in GB."""
    gc.collect()
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start, 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = now(device)
    work()
    return now(device) - start, (torch.cuda.max_memory_allocated() - before) / 1e9


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def called(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def sheet(name: str) -> str | None:
    """Of :data:`GPUS`, the one that a device is by the name that it gives itself."""
    words = re.split(r"[\s-]", name.upper())
    return next((key for key in GPUS if set(key.split("-")) <= set(words)), None)
