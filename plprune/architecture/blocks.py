r"""The decoder blocks of a model, and the groups of prunable units in each.

A :class:`UnitGroup` holds all units of one kind in one block. Removing unit `u` removes the rows `index[u]` of every
producer and the columns `index[u]` of the consumer. Which these are is found by probing the model
(`plprune.architecture.discovery`).

Rows are outputs and columns are inputs, also for a `Conv1D`, which stores its weight transposed: :func:`matrix` returns
every weight as [d_out, d_in].

=============  =======================  ===========================  ==================================
kind           unit                     producers                    consumer
=============  =======================  ===========================  ==================================
``attention``  kv head, with its query  rows of Q, K and V, and of   columns of the output projection
               heads; or a head of      norms, convolutions and
               linear attention         parameters over all heads
``value``      value channel            rows of V                    the same channel of each query head
``ffn``        FFN channel              rows of gate and up, or fc1  columns of down, or fc2
``expert``     expert                   entries of gate, up, router  entries of down
``expert_      channel of every expert  rows of gate and up          columns of down
channel``
``whole_ffn``  the FFN, or all experts  the sub-block, for which zeros stand in
               with what is beside
=============  =======================  ===========================  ==================================

Weights of experts are stacked, so all experts of a block keep as many channels, but each its own: indices to keep are
[experts, channels] there. Kernels of experts want rows of 16 bytes, so channels leave in steps of 8.

Symbols: B blocks, d model width, n FFN width, H query heads, hd head dimension, g query heads per kv head.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.anatomy import Anatomy, Experts, ModelAnatomy, Part, Slice
from plprune.architecture.attached import attached
from plprune.architecture.cutting import held
from plprune.architecture.discovery import discover
from plprune.architecture.modeling_plprune import NoAttention, NoFFN, PrunedConfigMixin, PrunedModelMixin
from plprune.architecture.modules import (
    dense_weight,
    innermost,
    kept_rows,
    matrix,
    on_device,
    own_parameter,
    own_tensor,
    width,
    width_name,
)


@dataclass(frozen=True)
class Decision:
    """The units of one group that stay, and the parameters that were repaired."""

    group: str  # its name
    keep: Tensor  # indices of the units that stay
    size: int  # the number of units before
    repaired: list[str] = field(default_factory=list)  # names of the parameters that were changed or added

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Decision) and self._parts() == other._parts()

    def _parts(self) -> dict[str, Any]:
        return asdict(self) | {"keep": self.keep.tolist()}


Kind = Literal["attention", "value", "ffn", "expert", "expert_channel", "whole_ffn"]
UNITS = {
    "attention": "kv heads",
    "value": "value channels",
    "ffn": "FFN channels",
    "expert": "experts",
    "expert_channel": "channels of each expert",
    "whole_ffn": "whole FFNs",
}
IN_FFN = ("ffn", "expert", "expert_channel")  # kinds of units that leave with a whole FFN
STEP = 8  # channels of an expert
AttentionUnit = Literal["kv_heads", "value_channels", "none"]  # what a method removes from attention


@dataclass(frozen=True)
class UnitGroup:
    """All units of one kind in one block, and the rows and columns that each unit consists of."""

    block: int
    kind: Kind
    producers: tuple[Slice, ...]
    consumer: Slice
    counts: Mapping[str, int] = field(default_factory=dict)  # attribute that the forward pass reads -> value per unit
    experts: int = 0  # which have these channels

    @property
    def name(self) -> str:
        return f"blocks.{self.block}.{self.kind}"

    def __len__(self) -> int:
        return len(self.consumer.index)


class Home(ABC):
    """Stores the weights of a block outside memory. It is attached to the block's module."""

    version: int  # how many times the block was written

    @abstractmethod
    def present(self, device: torch.device | None) -> contextlib.AbstractContextManager[None]:
        """Loads the weights for the duration of the context, and stores changes."""

    @abstractmethod
    def note(self, decision: Decision) -> None:
        """Records a decision that was applied to the block while it is loaded."""


@dataclass(frozen=True)
class Block:
    """One decoder block: its index, its module and the names of its parts."""

    index: int
    module: nn.Module
    anatomy: Anatomy
    path: str = ""  # in the model

    @property
    def home(self) -> Home | None:
        """The storage of the weights, if they are not in memory."""
        return attached(self.module, Home)

    def present(self, device: torch.device | None = None) -> contextlib.AbstractContextManager[None]:
        """Loads the block, and moves it to `device` if given, for the duration of the context; changes are kept."""
        if self.home is not None:
            return self.home.present(device)
        return contextlib.nullcontext() if device is None else on_device(self.module, device)

    def part(self, path: str) -> nn.Module:
        """The module at `path`; a projection may be an `nn.Linear`, or the gather or scatter around one."""
        return self.module.get_submodule(path)

    def weight(self, group: UnitGroup) -> Tensor:  # [d, units, columns per unit]
        """The columns of the consumer's weight, grouped by unit; of channels of experts [d, experts, channels]."""
        if group.experts:
            weight = self._stacked(group.consumer.path).detach()
            return weight.permute(1, 0, 2) if group.consumer.axis == 2 else weight.permute(2, 0, 1)
        with self.present():
            weight, index = dense_weight(self.part(group.consumer.path)), group.consumer.index
            return weight[:, index.to(weight.device)]

    def rows_of_experts(self, group: UnitGroup) -> list[Tensor]:  # [experts, channels, d_in] each
        """The weights of gate and up, or of up alone, whose rows are the channels of experts."""
        weight, part = self._stacked(group.producers[0].path).detach(), group.producers[0]
        rows = weight if part.axis == 1 else weight.mT
        return [rows[:, own.to(rows.device)] for own in part.index.T]

    def cost(self, group: UnitGroup) -> int:
        """Parameters of one unit; of a channel of experts those in as many experts as the group has."""
        rows = sum(s.index.shape[1] * self._per_row(s) for s in group.producers)
        every = rows + group.consumer.index.shape[1] * self._per_column(group.consumer)
        return every * group.experts // self.expert_count if group.experts else every

    def _per_row(self, part: Slice) -> int:
        tensor = held(self.module, part.path)
        if tensor is not None:
            return tensor.numel() // tensor.shape[part.axis] if isinstance(tensor, nn.Parameter) else 0
        module = self.part(part.path)
        return matrix(module)[0].numel() + (getattr(innermost(module), "bias", None) is not None)

    def _per_column(self, part: Slice) -> int:
        stacked = held(self.module, part.path)
        return len(matrix(self.part(part.path))) if stacked is None else stacked.numel() // stacked.shape[part.axis]

    def absent_bias(self, group: UnitGroup) -> int:
        """Parameters that a bias would add to the consumer; 0 if it has one, or cannot have any."""
        if held(self.module, group.consumer.path) is not None:
            return 0
        consumer = self.part(group.consumer.path)
        return len(matrix(consumer)) if innermost(consumer).bias is None else 0

    def parameters(self, path: str = "") -> int:
        """Parameters of the block, or of its part at `path`."""
        return sum(p.numel() for p in self.part(path).parameters())

    @property
    def has_attention(self) -> bool:
        return self.anatomy.attention is not None and not isinstance(self.part(self.anatomy.mixer), NoAttention)

    @property
    def can_drop_attention(self) -> bool:
        return self.has_attention and self.anatomy.droppable

    @property
    def has_ffn(self) -> bool:
        """Whether the block's FFN, or its mixture of experts, was not dropped."""
        found = self.anatomy.whole_ffn
        return found is None or not isinstance(self.part(found.path), NoFFN)

    @property
    def whole_ffn(self) -> UnitGroup | None:
        """The FFN, or all experts with what is beside them, as a single unit; None if it cannot leave alone."""
        found = self.anatomy.whole_ffn
        if found is None or not self.has_ffn:
            return None
        return UnitGroup(self.index, "whole_ffn", (), Slice(found.path, torch.zeros(1, 1, dtype=torch.long)))

    @property
    def attention(self) -> Part:
        """The heads of the dense block."""
        assert self.anatomy.attention is not None
        return self.anatomy.attention

    @property
    def ffn(self) -> Part:
        """The FFN channels of the dense block."""
        assert self.anatomy.ffn is not None
        return self.anatomy.ffn

    @property
    def _present_ffn(self) -> Part | None:
        return self.anatomy.ffn if self.has_ffn else None

    @property
    def _present_experts(self) -> Experts | None:
        return self.anatomy.experts if self.has_ffn else None

    @property
    def channels(self) -> int:
        """Width of the FFN; 0 if the block has none."""
        ffn = self._present_ffn
        return 0 if ffn is None else width(self.part(ffn.consumer.path), "in_features")

    @property
    def experts(self) -> Experts:
        """The experts of the dense block."""
        assert self.anatomy.experts is not None
        return self.anatomy.experts

    @property
    def expert_count(self) -> int:
        """The number of experts; 0 if the block is no mixture."""
        found = self._present_experts
        return 0 if found is None else len(self._stacked(found.units.consumer.path))

    @property
    def expert_width(self) -> int:
        """The channels of each expert."""
        consumer = self.experts.channels.consumer
        return self._stacked(consumer.path).shape[consumer.axis]

    @property
    def expert_bias(self) -> str:
        """The path of the biases of the experts' last layers, [experts, d]; empty if they have none."""
        path = f"{self.experts.channels.consumer.path}_bias"
        return path if held(self.module, path) is not None else ""

    def _stacked(self, path: str) -> Tensor:
        owner, _, name = path.rpartition(".")
        return cast(Tensor, own_tensor(innermost(self.part(owner)), name))

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that a token does not reach."""
        if not self.expert_count:
            return 0
        own = sum(p.numel() for p in self.part(self.experts.path).parameters())
        return own - own * self.experts.active // self.expert_count

    @property
    def attention_paths(self) -> list[str]:
        """Paths of the attention's projections, without duplicates; empty if the attention was dropped."""
        return self._projections(self.anatomy.attention) if self.has_attention else []

    @property
    def projections(self) -> list[str]:
        """Paths of the projections of all units, without duplicates."""
        return list(dict.fromkeys((*self.attention_paths, *self._projections(self._present_ffn))))

    def _projections(self, part: Part | None) -> list[str]:
        if part is None:
            return []
        paths = dict.fromkeys((*(s.path for s in part.producers), part.consumer.path))
        return [path for path in paths if self._is_projection(path)]

    def _is_projection(self, path: str) -> bool:
        owner, _, name = path.rpartition(".")
        return (
            own_parameter(self.part(owner), name) is None
            and width_name(innermost(self.part(path)), "out_features") is not None
        )

    def groups(self, attention: AttentionUnit = "kv_heads", experts: bool = True) -> list[UnitGroup]:
        """The block's groups: the attention's with the given unit, if any, the FFN's, and that of the channels of
        experts unless these are left out, as far as it has them.

        Raises:
            ValueError: Units of these kinds were found, but a cut block does not compute what a masked one does.
        """
        for kind, how in self.anatomy.refused.items():
            if kind == "ffn" or attention != "none":
                spared = "a method that leaves attention alone, such as CFSP, or " if kind == "attention" else ""
                raise ValueError(
                    f"plprune cannot prune the {UNITS[kind]} of {self.path}.{how}: use {spared}a model of another "
                    "family"
                )
        return self._groups(attention, experts)

    def _groups(self, attention: AttentionUnit = "kv_heads", experts: bool = True) -> list[UnitGroup]:
        make = {"kv_heads": self._kv_heads, "value_channels": self._value_channels}.get(attention)
        own: list[UnitGroup | None] = [make()] if make and self.has_attention else []
        own += [self._channels(), self._expert_channels() if experts else None]
        return [group for group in own if group is not None]

    @property
    def all_groups(self) -> list[UnitGroup]:
        """The groups of all units: value channels, heads, FFN channels and experts, as far as the block has them."""
        values = self._value_channels() if self.has_attention else None
        channels = self._expert_channels()
        experts = [] if channels is None else [self.expert_units(), channels]  # in the order in which both can leave
        return [*([values] if values else []), *self._groups(experts=False), *experts]

    @property
    def recorded_groups(self) -> list[UnitGroup]:
        """All groups, and the whole FFN as the last of them, as plans record them."""
        return [*self.all_groups, *([self.whole_ffn] if self.whole_ffn else [])]

    def _expert_channels(self) -> UnitGroup | None:
        if self._present_experts is None:
            return None
        channels = self.experts.channels
        parts = channels.of_size(self.expert_width)
        return UnitGroup(self.index, "expert_channel", *parts, channels.counts, self.expert_count)

    def expert_units(self) -> UnitGroup:
        """The group of whole experts."""
        units = self.experts.units
        return UnitGroup(self.index, "expert", *units.of_size(self.expert_count), units.counts)

    @property
    def has_kv_cache(self) -> bool:
        """Whether the block attends to the keys and values of all earlier tokens."""
        return self.has_attention and self.anatomy.values is not None

    @property
    def kv_heads(self) -> int:
        return width(self.part(self.attention.consumer.path), "in_features") // self.attention.columns

    @property
    def queries_per_head(self) -> int:
        """Query heads per kv head (g)."""
        return self.attention.columns // self.head_dim

    @property
    def head_dim(self) -> int:
        """Value channels per head."""
        return self.anatomy.head_dim

    def _kv_heads(self) -> UnitGroup:
        producers, consumer = self.attention.of_size(self.kv_heads)
        return UnitGroup(self.index, "attention", producers, consumer, self.attention.counts)

    def _value_channels(self) -> UnitGroup | None:
        if self.anatomy.values is None:
            return None
        (values,), consumer = self.anatomy.values.of_size(self.kv_heads * self.head_dim)
        (producer,) = [
            p for p in self._kv_heads().producers if p.path == values.path and p.index.shape[1] == self.head_dim
        ][-1:]
        present = torch.isin(producer.index.flatten(), kept_rows(self.part(values.path)))  # some may be gone already
        rows, columns = producer.index.flatten()[present, None], consumer.index[present]
        return UnitGroup(self.index, "value", (Slice(values.path, rows),), Slice(consumer.path, columns))

    def _channels(self) -> UnitGroup | None:
        ffn = self._present_ffn
        if ffn is None:
            return None
        producers, consumer = ffn.of_size(self.channels)
        return UnitGroup(self.index, "ffn", producers, consumer, ffn.counts)


def blocks_of(model: PreTrainedModel) -> list[Block]:
    """The decoder blocks of a model, in depth order.

    Raises:
        ValueError: The model has no prunable decoder blocks.
    """
    found = anatomy_of(model)
    modules = cast(Iterable[nn.Module], model.get_submodule(found.blocks))
    pairs = enumerate(zip(modules, found.anatomies, strict=True))
    return [Block(i, module, anatomy, f"{found.blocks}.{i}") for i, (module, anatomy) in pairs]


def anatomy_of(model: PreTrainedModel) -> ModelAnatomy:
    """Where a model has its decoder blocks, and what the units of each were before it was pruned."""
    if model not in _KNOWN:
        kind, config = dense_class(model)
        _KNOWN[model] = discover(kind, config)
    return _KNOWN[model]


def set_anatomy(model: PreTrainedModel, found: ModelAnatomy) -> None:
    """Records that a model has lost blocks."""
    _KNOWN[model] = found


# what a pruned model's config has besides its sizes
OTHER_KEYS = ("allow_global_per_layer_attribute_access", "base_model_type", "auto_map")
_KNOWN: WeakKeyDictionary[PreTrainedModel, ModelAnatomy] = WeakKeyDictionary()


def dense_class(model: PreTrainedModel) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and the config of a model before pruning changed them."""
    kind, config = type(model), model.config
    if isinstance(config, PrunedConfigMixin):
        own = config.to_dict()
        ours = "allow_global_per_layer_attribute_access" in own  # else the sizes are the family's
        for key in ("pruned", *(("per_layer_config",) if ours else ()), *OTHER_KEYS):
            own.pop(key, None)
        config = type(config).__mro__[2].from_dict(own | {"model_type": type(config).model_type})
    if issubclass(kind, PrunedModelMixin):
        kind = next(c for c in kind.__mro__ if not issubclass(c, PrunedModelMixin) and issubclass(c, PreTrainedModel))
    return kind, config
