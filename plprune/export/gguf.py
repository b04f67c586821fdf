"""Writes dense and pruned models to GGUF files for llama.cpp.

A model is written as the first of its family's architectures that computes it; `deci`, which has sizes per block, comes
last. Of a model that sees or hears, the text decoder is written: llama.cpp has the other parts in files of their own.

Some graphs rotate neighbouring pairs (`normal`), others pairs of halves, as transformers does. For the former, the rows
of Q and K are reordered.

In float32, log-probabilities agree to about 1e-6 with SiLU, and to about 1e-3 with GELU, for which llama.cpp uses a
half-precision table on CPUs, and the tanh approximation in GPT-NeoX.
"""

import contextlib
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

try:
    import gguf
    from gguf import GGMLQuantizationType, Keys, LlamaFileType
except ImportError as error:
    raise ImportError("writing GGUF needs the package gguf: pip install 'plprune[export]'") from error

from plprune.architecture.blocks import Block, UnitGroup, anatomy_of, blocks_of
from plprune.architecture.head import like_alone
from plprune.architecture.modeling_plprune import Gather, Scatter, is_wrapper
from plprune.architecture.modules import detached, innermost, matrix, tied
from plprune.architecture.wrappers import text_config, text_parts
from plprune.checkpoint.weights import check_finite
from plprune.export import delta, gemma4, latent, mixtures, vocabulary
from plprune.export.architectures import ARCHS, FFN_IN, LAYOUTS, QKV, Arch, Layout
from plprune.io.atomic import staged

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
Rope = dict[str, Any]
log = logging.getLogger(__name__)


KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
SCALINGS = ("default", "linear", "yarn", "longrope", "llama3")
FACTORS = ("longrope", "llama3")  # scalings that need a tensor of factors
NOPE = 4  # in llama.cpp's `smollm3`, every fourth block has no rotary embedding
Q8_0_BLOCK = 32
PART = 2**22  # values converted at a time
SLIDING = "sliding_attention"
IN_FLOAT = (".ffn_gate_inp", ".shortconv.conv.", ".ssm_conv1d.")
HEAD, QUERY_NORM = "lm_head.weight", ".q_norm."


def refusals(model: PreTrainedModel) -> list[str]:
    """The reasons why llama.cpp cannot run a model, with the settings to change; empty if it can."""
    layout = LAYOUTS.get(_config(model).model_type)
    if layout is None:
        known = ", ".join(LAYOUTS)
        return [f"llama.cpp has no architecture for {_config(model).model_type!r}: take a model of {known}"]
    return [*_family_refusals(model, layout), *_choose(model, layout)[1]]


def arch_of(model: PreTrainedModel) -> str:
    """The name of the llama.cpp architecture that a model is written as.

    Raises:
        ValueError: No architecture computes the model; the message gives every reason.
    """
    if reasons := refusals(model):
        raise ValueError(f"llama.cpp cannot run this model: {'; '.join(reasons)}")
    return _choose(model, LAYOUTS[_config(model).model_type])[0]


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | os.PathLike[str],
    dtype: Dtype = "f16",
    overwrite: bool = False,
) -> None:
    """Writes a model and its tokenizer to a GGUF file, whole or not at all.

    Args:
        model: A dense or pruned model with merged LoRA.
        tokenizer: The model's tokenizer.
        path: The file.
        dtype: Dtype of the matrices; vectors are float32. With `q8_0`, matrices whose rows are not multiples of 32 are
            written in f16.
        overwrite: Whether to replace an existing file.

    Raises:
        FileExistsError: The file exists.
        ValueError: llama.cpp cannot run the model or its tokenizer; the message gives every reason.
        OSError: The file could not be written; nothing is left behind.
    """
    arch = arch_of(model)
    if tokenizer is None:
        raise ValueError("a GGUF file holds its tokenizer: give the model's, or the name or folder of one")
    words = vocabulary.fields(tokenizer, model.get_input_embeddings().weight.shape[0])  # type: ignore[union-attr]
    with staged(path, overwrite) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        for key, value in {**_fields(model, arch), **words}.items():
            _add(writer, key, value)
        _, file_type = KINDS[dtype]
        writer.add_file_type(file_type)
        if dtype == "q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _check_written(temporary, _write_tensors(writer, model, arch, dtype))


def _write_tensors(writer: gguf.GGUFWriter, model: PreTrainedModel, arch: str, dtype: Dtype) -> dict[str, Any]:
    """Writes the table of tensors from their conversion on the meta device, then converts and writes one by one.

    Returns:
        A hash of each tensor's data.
    """
    kinds, digests = {}, {}
    for name, tensor in _tensors(model, arch, meta=True):
        kinds[name] = kind = _kind(name, tensor, dtype)
        size = gguf.quants.quant_shape_to_byte_shape(tuple(tensor.shape), kind)
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), int(np.prod(size)), raw_dtype=kind)
    if uneven := sum(kind == GGMLQuantizationType.F16 for kind in kinds.values()) if dtype == "q8_0" else 0:
        log.warning("%d of %d tensors have rows that are not multiples of 32: written in f16", uneven, len(kinds))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        for name, tensor in _tensors(model, arch):
            writer.write_padding(writer.fout[0], writer.fout[0].tell())
            digest = digests[name] = hashlib.sha256()
            for part in tensor.split(max(1, PART // tensor[0].numel())):  # add_tensor would hold the whole tensor
                encoded = _encoded(part, kinds[name])
                _check_finite(name, part, encoded)
                digest.update(encoded.data)
                encoded.tofile(writer.fout[0])
        writer.write_padding(writer.fout[0], writer.fout[0].tell())
    finally:
        writer.close()
    return digests


def _check_finite(name: str, value: Tensor, encoded: np.ndarray) -> None:
    check_finite(name, value)
    if encoded.dtype == np.float16 and not np.isfinite(encoded).all():
        raise ValueError(f"{name} has values above 65504, the largest of f16: export with --gguf bf16 or f32")


def _check_written(path: str | os.PathLike[str], digests: dict[str, Any]) -> None:
    """Checks that a file holds the tensors that were written."""
    stored = {tensor.name: hashlib.sha256(tensor.data.data).digest() for tensor in gguf.GGUFReader(path).tensors}
    if unlike := [name for name, digest in digests.items() if stored.get(name) != digest.digest()]:
        raise OSError(f"{unlike[0]} differs between the disk and memory: nothing was saved; check the disk")


def _kind(name: str, tensor: Tensor, dtype: Dtype) -> GGMLQuantizationType:
    small = tensor.ndim == 1 or name.startswith(("position_embd", "rope_")) or name.endswith(".bias")
    if small or any(part in name for part in IN_FLOAT):
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return KINDS[dtype][0]


def _encoded(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if kind == GGMLQuantizationType.BF16:
        return tensor.bfloat16().contiguous().view(torch.int16).numpy()
    if kind == GGMLQuantizationType.F16:
        return tensor.half().contiguous().numpy()
    values = tensor.float().contiguous().numpy()
    return values if kind == GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


# Refusals


def _choose(model: PreTrainedModel, layout: Layout) -> tuple[str, list[str]]:
    """The first architecture that computes the model, or else the one with the fewest refusals, and these."""
    refused = [(name, list(_arch_refusals(model, name))) for name in layout.archs]
    return min(refused, key=lambda one: len(one[1]))


def _family_refusals(model: PreTrainedModel, layout: Layout) -> Iterator[str]:
    """Reasons that hold for every architecture of a family."""
    blocks, modules = blocks_of(model), list(model.modules())
    if any(isinstance(module, Gather | Scatter) for module in modules):
        yield (
            "value channels were removed one by one, for which llama.cpp has no tensor: widen them with zeros when "
            "exporting, or prune whole kv heads"
        )
    if any(hasattr(module, "base_layer") for module in modules):
        yield "the LoRA adapters are not merged: merge them before exporting"
    if _removed(blocks[0]):
        yield (
            "block 0 has no attention, and llama.cpp refuses to load that: prune so that block 0 keeps its attention, "
            "which serve_on: [llama.cpp] does"
        )
    for block in blocks:
        if not block.channels and not block.expert_count:
            yield (
                f"block {block.index} has no FFN channels, which llama.cpp computes wrongly: keep some in every block, "
                "as `drop_ffns` 0 does"
            )
    if is_wrapper(type(model.config)) and not like_alone(model.config):
        yield (
            f"{model.config.model_type} makes its logits otherwise than {_config(model).model_type} does alone, which "
            "is what llama.cpp computes: take a model of the decoder alone"
        )
    for key, allowed in layout.fixed.items():
        if getattr(_config(model), key, allowed[0]) not in allowed:
            yield f"{key} is {getattr(_config(model), key)!r}, and llama.cpp computes {allowed[0]!r} only"
    for key in layout.keys:
        if getattr(_config(model), key, None) is None:
            yield f"{key} is not set, and llama.cpp always applies it"


def _arch_refusals(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Reasons why one architecture does not compute a model."""
    yield from _size_refusals(model, name)
    yield from _rope_refusals(model, name)
    arch = ARCHS[name]
    if arch.head == "tied" and not tied(model):
        yield f"the output head is not tied to the embedding, as llama.cpp's {name} requires: tie them"
    if _windowed(_config(model), arch) and not any(_windows(_config(model))):
        yield f"no block has a sliding window, and llama.cpp's {name} does not run without one"
    nope = _config(model).no_rope_layers if name == "smollm3" else ()
    if any(bool(rotated) == (not (i + 1) % NOPE) for i, rotated in enumerate(nope)):
        yield f"llama.cpp's smollm3 leaves every {NOPE}th block without rotary embedding, this model others"
    if lost := [own for own, target in _names(model, name).items() if target is None and own != HEAD]:
        yield f"llama.cpp's {name} has no place for {lost[0]}{f' and {len(lost) - 1} others' if lost[1:] else ''}"


def _size_refusals(model: PreTrainedModel, name: str) -> Iterator[str]:
    arch, blocks = ARCHS[name], blocks_of(model)
    mixture = any(block.expert_count for block in blocks)
    places = {gguf.TENSOR_NAMES[each].rpartition(".")[2] for each in gguf.MODEL_TENSORS[_number(name)]}
    if arch.delta:
        yield from delta.refusals(blocks, name)
    if arch.kinds:
        yield from gemma4.refusals(blocks, _config(model))
    if arch.latent:
        yield from latent.refusals(blocks[0], len(blocks), _config(model).vocab_size)
    yield from mixtures.refusals(blocks, name, arch.mixture, places)
    widths = sorted({block.channels for block in blocks})
    heads = sorted({_heads(block) for block in _attending(model)})
    without = [block.index for block in blocks if _removed(block)]
    if without and not arch.skips:
        yield f"blocks {without} have no attention, and llama.cpp's {name} has it in every block: keep attention"
    if len(widths) > 1 and not arch.per_block and not mixture:
        yield (
            f"FFN widths differ between blocks ({widths[0]} to {widths[-1]}), and llama.cpp's {name} has one: "
            "prune every block to the same width"
        )
    if len(heads) > 1 and not arch.per_block:
        yield (
            f"numbers of query and kv heads differ between blocks ({heads[0]} to {heads[-1]}), and llama.cpp's {name} "
            "has one of each: prune as many in every block, or none"
        )
    if arch.alone and any(query != kv for query, kv in heads):
        yield f"query heads share kv heads, and in llama.cpp's {name} each has its own"
    if len(blocks) in arch.depths:
        yield f"there are {len(blocks)} blocks, at which llama.cpp's {name} computes another model: drop a block"
    hidden = _config(model).hidden_size
    unfilled = [query for query, _ in heads if query * _head_dim(model) != hidden]
    if arch.fills and unfilled:
        yield (
            f"{unfilled[0]} heads of {_head_dim(model)} do not fill the hidden size {hidden}, which "
            f"llama.cpp's {name} takes for granted: prune no heads"
        )
    added = sorted(
        {
            part
            for block in blocks
            for part, (path, _) in _parts(block).items()
            if innermost(block.part(path)).bias is not None and part not in arch.biases
        }
    )
    if added:
        yield (
            f"llama.cpp's {name} has no bias in {', '.join(added)}: take a model without, and prune it with "
            "`repair` none, or restore with `bias` false"
        )


def _rope_refusals(model: PreTrainedModel, name: str) -> Iterator[str]:
    arch = ARCHS[name]
    if arch.kinds:  # has its own
        return
    rope, sliding = _rope(_config(model))
    kind, other = _scaling(rope), sliding.get("rope_type", "default")
    if kind not in SCALINGS or (kind in FACTORS and not arch.factors):
        yield f"llama.cpp's {name} does not scale rotary embeddings by {rope['rope_type']!r} as it is set here"
    beside = ("default", "linear", *(["yarn"] if arch.yarn else []))
    if sliding and (other != "default" or kind not in beside):
        yield (
            f"rotary embeddings are scaled by {kind!r}, and by {other!r} where there is a window: llama.cpp's {name} "
            f"scales the former only, linearly{' or by YaRN' if arch.yarn else ''}"
        )
    if arch.latent and getattr(_rotary(model), "attention_scaling", 1) != 1:
        yield f"llama.cpp's {name} scales attention by YaRN only where `mscale` is `mscale_all_dim`"
    if rope and _rotated(model) != _head_dim(model) and not arch.partial:
        yield f"a part of each head is not rotated, and llama.cpp's {name} rotates the whole"


# Metadata


def _fields(model: PreTrainedModel, name: str) -> dict[str, Any]:
    config, arch, blocks = _config(model), ARCHS[name], blocks_of(model)
    attending = {block.index for block in _attending(model)}
    heads = [_heads(block) if block.index in attending else (0, 0) for block in blocks]
    sizes = {
        Keys.LLM.FEED_FORWARD_LENGTH: mixtures.ffn_widths(blocks),
        Keys.Attention.HEAD_COUNT: [query for query, _ in heads],
        Keys.Attention.HEAD_COUNT_KV: [kv for _, kv in heads],
    }
    fields: dict[str, Any] = {
        Keys.LLM.CONTEXT_LENGTH: _context(config, arch),
        Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        Keys.LLM.BLOCK_COUNT: len(blocks),
        **{key: size if arch.per_block else max(size) for key, size in sizes.items()},
        Keys.Attention.KEY_LENGTH: _head_dim(model),
        Keys.Attention.VALUE_LENGTH: _head_dim(model),
        **{key: kind(getattr(config, own)) for own, (key, kind) in LAYOUTS[config.model_type].keys.items()},
        **_rope_fields(model),
        **({Keys.Attention.HEAD_COUNT_KV: [kv for _, kv in heads]} if arch.convolutions else {}),
        **(delta.fields(blocks, _rotated(model)) if arch.delta else {}),
        **(latent.fields(blocks[0]) if arch.latent else {}),
        **(gemma4.fields(blocks, config) if arch.kinds else {}),
        **mixtures.fields(blocks, arch.mixture),
        **LAYOUTS[config.model_type].constants,
    }
    if LAYOUTS[config.model_type].rounded and not (config.rope_parameters or {}).get("truncate", True):
        log.warning("llama.cpp rounds the bounds of YaRN, and this model does not: its outputs there differ a little")
    if arch.scaled:
        fields |= {key: float(getattr(config, own)) for own, (key, *_) in LAYOUTS[config.model_type].scales.items()}
    windowed = _windowed(config, arch)
    if windowed and _windows(config) != [bool((i + 1) % arch.windows) for i in range(len(blocks))]:
        fields[Keys.Attention.SLIDING_WINDOW_PATTERN] = _windows(config)
    # llama.cpp treats some names specially, so an unnamed model gets none.
    label = os.path.basename((model.config.name_or_path or "").rstrip("/"))
    named = {Keys.General.NAME: label} if label else {}
    return named | {key.format(arch=name): value for key, value in fields.items()}


def _rope_fields(model: PreTrainedModel) -> dict[str, Any]:
    rope, sliding = _rope(_config(model))
    if not rope:
        return {}
    fields = {Keys.Rope.DIMENSION_COUNT: _rotated(model), Keys.Rope.FREQ_BASE: float(rope["rope_theta"])}
    if sliding:
        fields[Keys.Rope.FREQ_BASE_SWA] = float(sliding["rope_theta"])
    kind, factor = _scaling(rope), float(rope.get("factor") or 1.0)
    if kind in ("linear", "yarn", "longrope"):
        fields[Keys.Rope.SCALING_TYPE] = kind
    if kind in ("linear", "yarn"):
        fields[Keys.Rope.SCALING_FACTOR] = factor
    if kind in ("yarn", "longrope"):
        fields[Keys.Rope.SCALING_ORIG_CTX_LEN] = _original_context(_config(model))
    if beta := rope.get("llama_4_scaling_beta"):
        fields[Keys.Attention.TEMPERATURE_SCALE] = float(beta)
    prefix = "full_attention_" if sliding else ""
    attention = float(getattr(_rotary(model), f"{prefix}attention_scaling", 1.0))
    if kind == "yarn":  # llama.cpp multiplies by this factor itself
        attention /= 1 + 0.1 * math.log(factor)
    return fields if attention == 1 else fields | {Keys.Rope.SCALING_ATTN_FACTOR: attention}


def _config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config of the text decoder, which is all that a file holds."""
    return text_config(model.config)


def _scaling(rope: Rope) -> str:
    """The kind of scaling in llama.cpp; YaRN with settings other than the factor is written like Llama 3's."""
    kind = rope.get("rope_type", "default")
    settings = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)
    return "llama3" if kind == "yarn" and settings != (32, 1, True) else kind


def _rope(config: PreTrainedConfig) -> tuple[Rope, Rope]:
    """The parameters of rotary embeddings, and those of blocks with a sliding window if they differ."""
    rope = getattr(config, "rope_parameters", None) or {}
    if LAYOUTS[config.model_type].rounded:
        rope = {**rope, "truncate": True}
    if rope.get("rope_type") == "dynamic" and rope.get("alpha"):  # of HunYuan: a larger base at every length
        base = rope["rope_theta"] * rope["alpha"] ** (config.head_dim / (config.head_dim - 2))
        rope = {"rope_type": "default", "rope_theta": base}
    if "full_attention" in rope:
        return rope["full_attention"], rope["sliding_attention"]
    return rope, {}


def _original_context(config: PreTrainedConfig) -> int:
    rope, _ = _rope(config)
    own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return own or config.max_position_embeddings


def _rotary(model: PreTrainedModel) -> nn.Module | None:
    decoder = text_parts(model, anatomy_of(model).blocks)[0]
    return next((module for name, module in decoder.named_modules() if name.endswith("rotary_emb")), None)


def _rotated(model: PreTrainedModel) -> int:
    if latent.is_latent(blocks_of(model)[0]):
        return _config(model).qk_rope_head_dim
    return int(_head_dim(model) * _rope(_config(model))[0].get("partial_rotary_factor", 1.0))


def _context(config: PreTrainedConfig, arch: Arch) -> int:
    """The context length up to which llama.cpp agrees with transformers: the window, if the graph has none."""
    longest = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if arch.windows or not window or SLIDING not in (getattr(config, "layer_types", None) or [SLIDING]):
        return longest
    if window < longest:
        log.warning("llama.cpp has no sliding window here: the file's context length is the window, %d", window)
    return min(window, longest)


def _windowed(config: PreTrainedConfig, arch: Arch) -> bool:
    """Whether a graph has sliding windows for a family."""
    return bool(arch.windows) and "sliding_window" in LAYOUTS[config.model_type].keys


def _windows(config: PreTrainedConfig) -> list[bool]:
    """Whether each block has a sliding window."""
    return [kind == SLIDING for kind in config.layer_types]


def _heads(block: Block) -> tuple[int, int]:
    return block.kv_heads * block.queries_per_head, block.kv_heads


def _head_dim(model: PreTrainedModel) -> int:
    return next((block.head_dim for block in _attending(model)), 0)


def _removed(block: Block) -> bool:
    """Whether a block's attention was removed."""
    return bool(block.anatomy.mixer) and not block.has_attention and not delta.is_delta(block)


def _attending(model: PreTrainedModel) -> list[Block]:
    """The blocks with attention whose projections are those of most families."""
    return [block for block in blocks_of(model) if block.has_attention and not _apart(block)]


def _apart(block: Block) -> bool:
    """Whether a block's attention is written by a module of its own."""
    return delta.is_delta(block) or gemma4.is_own(block)


# Tensors


def _tensors(model: PreTrainedModel, name: str, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file by name, converted one at a time."""
    for own, value in _made(model, name, meta):
        factor = _factor(_config(model), name, own)
        yield own, _times(value, factor)


def _made(model: PreTrainedModel, name: str, meta: bool) -> Iterator[tuple[str, Tensor]]:
    names = _name_map(model, name)
    gain = LAYOUTS[_config(model).model_type].gain
    outside = _outside(model)
    if HEAD in names:  # even if it is tied to the embedding
        outside[HEAD] = model.get_output_embeddings().weight  # type: ignore[union-attr,assignment]
    for own, value in outside.items():
        yield names[own], _plain(own, value, gain, meta)
    yield from _rope_tensors(model)
    for block in blocks_of(model):
        with contextlib.nullcontext() if meta else block.present():
            yield from _projections(block, _config(model), name, meta)
            special = (each.tensors(block, meta) for each in (latent, delta, gemma4, mixtures))
            for own, value in itertools.chain.from_iterable(special):
                yield f"blk.{block.index}.{own}", value
            for own, value in _others(block):
                if own in names:  # not the norm before a removed attention
                    factor = _query_factor(block, _config(model), name) if QUERY_NORM in own else 1
                    yield names[own], _times(_plain(own, value, gain, meta), factor)


def _factor(config: PreTrainedConfig, name: str, own: str) -> float:
    """The factor of a tensor that makes up for `scales` that the graph lacks."""
    if ARCHS[name].scaled:
        return 1
    scales, part = LAYOUTS[config.model_type].scales, own.split(".")[-2]
    return math.prod(getattr(config, key) ** power for key, (_, power, parts) in scales.items() if part in parts)


def _projections(block: Block, config: PreTrainedConfig, name: str, meta: bool) -> Iterator[tuple[str, Tensor]]:
    """The projections of a block, fused as in the architecture."""
    parts = _parts(block)
    fused = {part: whole for whole, some in ARCHS[name].fused.items() for part in some}
    for whole in dict.fromkeys(fused.get(part, part) for part in parts):
        some = [part for part in parts if fused.get(part, part) == whole]
        for kind in ("weight", "bias"):
            if getattr(innermost(block.part(parts[some[0]][0])), kind) is not None:
                values = [_projection(block, part, kind, config, name, meta) for part in some]
                yield f"blk.{block.index}.{whole}.{kind}", values[0] if len(values) == 1 else torch.cat(values)


def _projection(block: Block, part: str, kind: str, config: PreTrainedConfig, name: str, meta: bool) -> Tensor:
    """The weight or bias of a projection, converted for an architecture."""
    path, rows = _parts(block)[part]
    module = block.part(path)
    value = detached(matrix(module) if kind == "weight" else innermost(module).bias, meta)
    if len(rows) != len(value) or not torch.equal(rows, torch.arange(len(rows))):
        value = value[rows.to(value.device)]
    if part in QKV[:2] and ARCHS[name].normal and not LAYOUTS[config.model_type].neighbours:
        value = value.unflatten(0, (-1, 2, block.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    normed = any(QUERY_NORM in own for own, _ in _others(block))
    factor = _query_factor(block, config, name) if part in ("attn_q", "attn_q_b") and not normed else 1
    return _times(value, factor)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1 else value.float() * factor


def _query_factor(block: Block, config: PreTrainedConfig, name: str) -> float:
    """The factor of queries that makes up for llama.cpp's different scaling of attention."""
    arch = ARCHS[name]
    ours = getattr(block.part(block.anatomy.mixer), "scaling", None)
    if ours is None or arch.scaled or arch.kinds:
        return 1
    broad = arch.broad == config.num_hidden_layers
    size = latent.head_dim(block) if arch.latent else block.head_dim
    factor = ours * math.sqrt(config.hidden_size // _heads(block)[0] if broad else size)
    return 1 if math.isclose(factor, 1, rel_tol=1e-6) else factor


def _parts(block: Block) -> dict[str, tuple[str, Tensor]]:
    """The path and rows of each projection of a block, by llama.cpp's names."""
    shared = "_shexp" if block.expert_count else ""  # beside experts
    inside = tuple(f"{part}{shared}" for part in FFN_IN)
    groups: list[tuple[tuple[str, ...], str, UnitGroup]]
    groups = [(inside, f"ffn_down{shared}", group) for group in block.groups("none", experts=False)]
    parts = {}
    if latent.is_latent(block):
        heads = block.groups()[0]
        parts[latent.query(block)] = (heads.producers[0].path, heads.producers[0].index.flatten())
        groups.insert(0, ((), "attn_output", heads))
    elif block.has_attention and not _apart(block):
        groups.insert(0, (QKV, "attn_output", block.groups()[0]))
    for names, consumer, group in groups:
        count = min(len(names), len(group.producers))  # norms over all heads come before Q, K and V
        for part, source in zip(names[-count:], group.producers[-count:] if count else (), strict=True):
            gated = sum(other.path == source.path for other in group.producers) == 2  # beside each head's gate
            whole = torch.arange(len(matrix(block.part(source.path))))
            parts[part] = (source.path, whole if gated and part == "attn_q" else source.index.flatten())
        parts[consumer] = (group.consumer.path, torch.arange(len(matrix(block.part(group.consumer.path)))))
    return parts


def _others(block: Block) -> list[tuple[str, Tensor]]:
    """The parameters of a block outside its projections, with their names in the model."""
    paths = (*(f"{path}." for path, _ in _parts(block).values()), *mixtures.paths(block), *gemma4.paths(block))
    paths += (f"{delta.path(block)}.",) if delta.is_delta(block) else ()
    paths += (f"{latent.path(block)}.",) if latent.is_latent(block) else ()
    prefix = f"{block.path}."
    own = block.module.named_parameters()
    return [(prefix + name, value) for name, value in own if not name.startswith(paths)]


def _plain(name: str, value: Tensor, gain: float, meta: bool) -> Tensor:
    """A tensor unchanged, or a norm's weight with the gain added; a convolution of each channel is a matrix."""
    value = detached(value, meta)
    value = value.squeeze(1) if value.ndim == 3 else value
    return value.float() + gain if gain and "norm" in name and name.endswith("weight") else value


def _name_map(model: PreTrainedModel, name: str) -> dict[str, str]:
    """llama.cpp's names, by ours, of the parameters outside projections that it reads."""
    found, blocks = _names(model, name), blocks_of(model)
    bare = {f"blk.{block.index}.attn_norm.weight" for block in blocks if _removed(block)}
    return {own: target for own, target in found.items() if target and target not in bare}


def _names(model: PreTrainedModel, name: str) -> dict[str, str | None]:
    blocks, own = blocks_of(model), list(_outside(model))
    folded = LAYOUTS[_config(model).model_type].scales and not ARCHS[name].scaled
    own += [HEAD] if ARCHS[name].head == "own" or folded else []
    own += [own for block in blocks for own, _ in _others(block)]
    names = gguf.get_tensor_name_map(_number(name), len(blocks))
    around = f"{anatomy_of(model).blocks.rpartition('.')[0]}."
    found = {each: names.get_name(_unwrapped(each, around), (".weight", ".bias")) for each in own}
    bare = {each: f"{name}.weight" for each, name in found.items() if name and not each.endswith((".weight", ".bias"))}
    return found | bare


def _outside(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters of the text decoder and of the head outside the blocks."""
    blocks = anatomy_of(model).blocks
    read = {id(value) for part in text_parts(model, blocks) for value in part.parameters()}
    return {
        own: value for own, value in model.named_parameters() if not own.startswith(f"{blocks}.") and id(value) in read
    }


def _unwrapped(own: str, around: str) -> str:
    """The name of a decoder's parameter where the decoder is not inside a larger model."""
    return f"model.{own.removeprefix(around)}" if "." in around[:-1] and own.startswith(around) else own


def _number(name: str) -> Any:
    """The number of an architecture in the package gguf."""
    return next(number for number, own in gguf.MODEL_ARCH_NAMES.items() if own == name)


def _rope_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The divisors of rotary frequencies, if they differ between frequencies."""
    rope, _ = _rope(_config(model))
    kind, count = _scaling(rope), _rotated(model)
    if kind == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, count, 2).float() / count)
        yield "rope_freqs.weight", plain / cast(Any, _rotary(model)).inv_freq.float().cpu()
    if kind == "proportional":
        yield "rope_freqs.weight", gemma4.rope_factors(_rotary(model), rope["rope_theta"])
    if kind == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"])
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"])
