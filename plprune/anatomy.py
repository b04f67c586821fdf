r"""Where the prunable parts of each model family are. A new family is one record here, and nothing elsewhere.

A :class:`Family` names modules by dotted paths relative to a decoder block. A :class:`Group` is a set of units that
can only leave together: unit `u` owns the rows `rows[u]` of every producer and the columns `columns[u]` of the one
consumer. As a group holds indices, fused projections need no code: a path that is named twice holds its parts stacked,
in the order in which they are named.

To add a family, look at its modelling file in transformers. Which names differ from Llama's? Does the forward pass
read a number of heads, or a width, that is not taken from the weights (`counts`)? Is anything else as wide as all heads
together (`qk_norms`)? What does its configuration call the sizes (`config_keys`)? Then give `tests/builders.py` a tiny
configuration of it: the tests take every family from :data:`FAMILIES`, and find what the record has wrong.

Rows are outputs and columns are inputs, however a projection stores its weight: :func:`matrix` gives it as
[d_out, d_in] also where it is a `Conv1D`, which holds the transpose.

=============  =======================  ===========================  ==================================
kind           unit                     producers                    consumer
=============  =======================  ===========================  ==================================
``attention``  kv head, with its query  rows of Q, K and V, and of   columns of the output projection
               heads                    norms over all heads
``value``      value channel            rows of V                    the same channel of each query head
``ffn``        FFN channel              rows of gate and up, or fc1  columns of down, or fc2
=============  =======================  ===========================  ==================================

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, g query heads per kv head.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune.journal import Decision

Kind = Literal["attention", "value", "ffn"]
Attention = Literal["kv_heads", "value_channels", "none"]  # the unit of it that can leave
Count = Literal["heads", "kv_heads", "query_width"]
Side = Literal["in_features", "out_features"]


@dataclass(frozen=True)
class Family:
    """Dotted paths, relative to one decoder block (`blocks` to the model).

    Args:
        blocks: The list of decoder blocks.
        qkv: Query, key and value projections; one path three times when they are fused.
        interleaved: Whether fused projections hold queries, keys and values of one head after those of another, and
            not all queries first.
        qk_norms: Norms of queries and keys over all heads together, if there are any. Once heads have left they are
            over those that stay.
        output: The projection that consumes the heads.
        ffn_in: The projections that produce the FFN channels; one path twice when gate and up are fused.
        ffn_out: The projection that consumes the FFN channels.
        attention: The attention sub-block; under grouped queries its `num_key_value_groups` is read.
        head_dim: What the attention sub-block calls the dimension of a head.
        counts: Attributes that must follow the number of `heads`, of `kv_heads`, or the `query_width` of all heads,
            because the family's forward pass does not read them off the weights. `config` in such a path is the
            block's own view of the config.
        config_keys: What `config.json` calls the FFN's width, the numbers of heads and their dimension.
    """

    blocks: str = "model.layers"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved: bool = False
    qk_norms: tuple[str, str] | tuple[()] = ()
    output: str = "self_attn.o_proj"
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    attention: str = "self_attn"
    head_dim: str = "head_dim"
    counts: Mapping[str, Count] = field(default_factory=dict)
    config_keys: Mapping[Literal["width", "heads", "kv_heads", "head_dim"], str] = field(
        default_factory=lambda: {
            "width": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        }
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(
        qkv=("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj"),
        ffn_in=("mlp.gate_up_proj", "mlp.gate_up_proj"),
        counts={"self_attn.config.num_attention_heads": "heads", "self_attn.num_key_value_heads": "kv_heads"},
    ),
    "opt": Family(
        blocks="model.decoder.layers",
        output="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        counts={"self_attn.num_heads": "heads"},
        config_keys={"width": "ffn_dim", "heads": "num_attention_heads"},
    ),
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        qkv=("attention.query_key_value", "attention.query_key_value", "attention.query_key_value"),
        interleaved=True,
        output="attention.dense",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        attention="attention",
        head_dim="head_size",
        config_keys={"width": "intermediate_size", "heads": "num_attention_heads"},
    ),
    "gpt2": Family(
        blocks="transformer.h",
        qkv=("attn.c_attn", "attn.c_attn", "attn.c_attn"),
        output="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        attention="attn",
        counts={"attn.num_heads": "heads", "attn.split_size": "query_width"},
        config_keys={"width": "n_inner", "heads": "n_head"},
    ),
    "phi": Family(output="self_attn.dense", ffn_in=("mlp.fc1",), ffn_out="mlp.fc2"),
    "olmo2": Family(qk_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "granite": Family(),
    "smollm3": Family(),
    "cohere2": Family(),
}


@dataclass(frozen=True)
class Slice:
    """The part of one projection that belongs to a group: row or column `u` of `index` is unit `u`'s."""

    path: str
    index: Tensor  # [units, rows or columns per unit], int64


@dataclass(frozen=True)
class Group:
    """Units of one block that leave together."""

    block: int
    kind: Kind
    producers: tuple[Slice, ...]
    consumer: Slice

    @property
    def name(self) -> str:
        return f"blocks.{self.block}.{self.kind}"

    def __len__(self) -> int:
        return len(self.consumer.index)


class Home(Protocol):
    """Where the weights of a block are while they are not in memory; its module carries it as `home`."""

    version: int  # how often the block was written there

    def present(self, device: torch.device | None) -> contextlib.AbstractContextManager[None]:
        """The weights in memory, for the time of the context."""
        ...

    def note(self, decision: Decision) -> None:
        """A decision that was carried out on the block, which is present."""
        ...


@dataclass(frozen=True)
class Block:
    """One decoder block: its place, its module and the names of its parts."""

    index: int
    module: nn.Module
    family: Family

    @property
    def home(self) -> Home | None:
        """Where the weights are, if they are not in memory."""
        return getattr(self.module, "home", None)

    def present(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """The block in memory, and on `device` if one is given, for the time of the context; what changed is kept."""
        if self.home is not None:
            return self.home.present(device)
        return contextlib.nullcontext() if device is None else on_device(self.module, device)

    def part(self, path: str) -> nn.Module:
        """The module at `path`; a projection may be an `nn.Linear`, or the gather or scatter around one."""
        return self.module.get_submodule(path)

    def weight(self, group: Group) -> Tensor:  # [d, units, columns per unit]
        """The consumer's weight, by unit."""
        with self.present():
            weight, index = dense_weight(self.part(group.consumer.path)), group.consumer.index
            return weight[:, index.to(weight.device)]

    def cost(self, group: Group) -> int:
        """Parameters that leave with one unit."""
        rows = sum(s.index.shape[1] * _per_row(self.part(s.path)) for s in group.producers)
        return rows + group.consumer.index.shape[1] * len(matrix(self.part(group.consumer.path)))

    def absent_bias(self, group: Group) -> int:
        """Parameters that a bias of the consumer would add: none if it has one."""
        consumer = self.part(group.consumer.path)
        return len(matrix(consumer)) if innermost(consumer).bias is None else 0

    def parameters(self, path: str = "") -> int:
        """Parameters of the block, or of the part of it at `path`."""
        return sum(p.numel() for p in self.part(path).parameters())

    @property
    def has_attention(self) -> bool:
        return hasattr(self.part(self.family.attention), self.family.head_dim)

    @property
    def channels(self) -> int:
        """Width of the FFN."""
        return width(self.part(self.family.ffn_out), "in_features")

    @property
    def attention_paths(self) -> list[str]:
        """Where the projections of the attention are, each once; none if it was dropped."""
        return list(dict.fromkeys((*self.family.qkv, self.family.output))) if self.has_attention else []

    @property
    def projections(self) -> list[str]:
        """Where all projections are, each once."""
        return list(dict.fromkeys((*self.attention_paths, *self.family.ffn_in, self.family.ffn_out)))

    def groups(self, attention: Attention = "kv_heads") -> list[Group]:
        """The block's groups, attention first, with the unit of attention asked for."""
        make = {"kv_heads": self._kv_heads, "value_channels": self._value_channels}.get(attention)
        return [make(), self._channels()] if make and self.has_attention else [self._channels()]

    @property
    def kv_heads(self) -> int:
        return width(self.part(self.family.output), "in_features") // (self.queries_per_head * self.head_dim)

    @property
    def queries_per_head(self) -> int:
        """Query heads of one kv head (g)."""
        return cast(int, getattr(self.part(self.family.attention), "num_key_value_groups", 1))

    @property
    def head_dim(self) -> int:
        return cast(int, getattr(self.part(self.family.attention), self.family.head_dim))

    def _kv_heads(self) -> Group:
        columns = torch.arange(width(self.part(self.family.output), "in_features")).view(self.kv_heads, -1)
        producers = (*self._norms(), *self._projected())
        return Group(self.index, "attention", producers, Slice(self.family.output, columns))

    def _value_channels(self) -> Group:
        kv, g, hd = self.kv_heads, self.queries_per_head, self.head_dim
        values = self._projected()[2]
        rows = values.index.flatten()
        present = torch.isin(rows, kept_rows(self.part(values.path)))  # some may have left in an earlier pruning
        columns = torch.arange(kv * g * hd).view(kv, g, hd).transpose(1, 2).reshape(kv * hd, g)
        consumer = Slice(self.family.output, columns[present])
        return Group(self.index, "value", (Slice(values.path, rows[present, None]),), consumer)

    def _projected(self) -> list[Slice]:
        """The rows of queries, keys and values, by kv head."""
        kv, sizes = self.kv_heads, self._per_kv_head()
        if self.family.interleaved:
            parts = torch.arange(kv * sum(sizes)).view(kv, -1).split(sizes, dim=1)
            return [Slice(path, rows) for path, rows in zip(self.family.qkv, parts, strict=True)]
        stacked = _stacked(self.family.qkv, tuple(kv * size for size in sizes))
        return [Slice(path, rows.view(kv, -1)) for path, rows in stacked]

    def _norms(self) -> list[Slice]:
        """What norms over all heads together have for each kv head."""
        sizes = self._per_kv_head()
        return [
            Slice(path, torch.arange(self.kv_heads * size).view(-1, size))
            for path, size in zip(self.family.qk_norms, sizes, strict=False)
        ]

    def _per_kv_head(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values that belong to one kv head."""
        return self.queries_per_head * self.head_dim, self.head_dim, self.head_dim

    def _channels(self) -> Group:
        channels = self.channels
        parts = _stacked(self.family.ffn_in, (channels,) * len(self.family.ffn_in))
        producers = tuple(Slice(path, rows[:, None]) for path, rows in parts)
        return Group(self.index, "ffn", producers, Slice(self.family.ffn_out, torch.arange(channels)[:, None]))


def family_of(config: PreTrainedConfig) -> Family:
    """The record for a model's `config.model_type`.

    Raises:
        ValueError: The family is not in :data:`FAMILIES`, or the model is a mixture of experts.
    """
    if any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        raise ValueError(
            f"{config.model_type!r} is a mixture of experts, which plprune does not prune; "
            f"take a dense model of these families: {', '.join(FAMILIES)}"
        )
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"unknown model family {config.model_type!r}; supported: {', '.join(FAMILIES)}. "
            "Add one record to FAMILIES in plprune/anatomy.py to support another"
        )
    return FAMILIES[config.model_type]


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a model, in depth order."""
    family = family_of(model.config)
    modules = cast(Iterable[nn.Module], model.get_submodule(family.blocks))
    return [Block(i, module, family) for i, module in enumerate(modules)]


@contextlib.contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device`, for the time of the context."""
    home = next(module.parameters()).device
    if home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Gives a module another parameter under a dotted name."""
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    setattr(owner, last, nn.Parameter(value, requires_grad=getattr(owner, last).requires_grad))


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding: by the parameters, whatever the configuration says."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, embedding).weight


def tie(model: PreTrainedModel, to_embedding: bool) -> None:
    """Makes the output head the embedding or a parameter of its own, and has the configuration say so."""
    if tied(model) and not to_embedding:
        head = cast(Any, model.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.tie_word_embeddings = to_embedding
    model.tie_weights()


def innermost(module: nn.Module) -> nn.Linear:
    """The projection itself, inside a gather or scatter, and below LoRA; it may be a `Conv1D`, or a norm."""
    for name in ("linear", "base_layer"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return innermost(inner)
    return cast(nn.Linear, module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection stores its weight as [d_in, d_out]."""
    return isinstance(innermost(module), Conv1D)


def matrix(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """The weight of a projection, inside whatever is around it; a view of it where it is stored transposed."""
    weight = innermost(module).weight
    return weight.T if is_transposed(module) else weight


def width_name(module: nn.Module, side: Side) -> str | None:
    """The attribute in which a projection has the number of its inputs or outputs; a norm has none."""
    name = {"in_features": "nx", "out_features": "nf"}[side] if isinstance(module, Conv1D) else side
    return name if hasattr(module, name) else None


def width(module: nn.Module, side: Side) -> int:
    """How many inputs or outputs a projection has; of a norm, how many values it scales."""
    name = width_name(module, side)
    return len(matrix(module)) if name is None else getattr(module, name)


def kept_rows(module: nn.Module) -> Tensor:
    """The output channels that a projection computes: all of them, unless it is a scatter."""
    return cast(Tensor, module.index).cpu() if hasattr(module, "index") else torch.arange(width(module, "out_features"))


def dense_weight(module: nn.Module) -> Tensor:  # [d_out, d_in]
    """A consumer's weight over all its inputs, with zeros for those that a gather leaves out."""
    weight = matrix(module).detach()
    if not hasattr(module, "index"):
        return weight
    full = weight.new_zeros(len(weight), width(module, "in_features"))
    return full.index_copy_(1, cast(Tensor, module.index), weight)


def _per_row(module: nn.Module) -> int:
    weight = matrix(module)
    return weight[0].numel() + (getattr(innermost(module), "bias", None) is not None)


def _stacked(paths: tuple[str, ...], sizes: tuple[int, ...]) -> list[tuple[str, Tensor]]:
    """Row indices of each part, counted on within a path that is named again."""
    start = dict.fromkeys(paths, 0)
    parts = []
    for path, size in zip(paths, sizes, strict=True):
        parts.append((path, torch.arange(start[path], start[path] + size)))
        start[path] += size
    return parts
