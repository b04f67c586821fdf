"""Finds the keys of a model's config that set the sizes of its blocks, by building the model with other values."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.anatomy import ModelAnatomy, Part, by_producer
from plprune.architecture.blocks import dense_class
from plprune.architecture.cutting import held
from plprune.architecture.depth import DEPTHS
from plprune.architecture.discovery import discover, shaping
from plprune.architecture.experts import expert_keys
from plprune.architecture.modules import width
from plprune.architecture.probing import empty, rebuilt
from plprune.architecture.wrappers import text_config

Keys = dict[str, str]  # width, heads, kv_heads, head_dim, experts, expert_width -> the config's key
NOT_SIZES = (*DEPTHS, "vocab_size")


def size_keys(model: PreTrainedModel) -> Keys:
    """The keys for the FFN's width, the numbers of query and kv heads, their dimension, the number of experts and
    their width, as far as there are any.
    """
    kind, config = dense_class(model)
    key = kind, shaping(config)
    if key not in _FOUND:
        search = Search(kind, config, discover(kind, config))
        _FOUND[key] = search.ffn() | search.heads() | search.experts()
    return _FOUND[key]


_FOUND: dict[tuple[type, str], Keys] = {}


class Search:
    """Tries keys of a config.

    Args:
        kind: The model's class before pruning.
        config: Its config.
        anatomy: Its units.
    """

    def __init__(self, kind: type[PreTrainedModel], config: PreTrainedConfig, anatomy: ModelAnatomy) -> None:
        self.kind, self.config, self.anatomy = kind, config, anatomy
        own = text_config(config).to_dict()
        self.values = {k: v for k, v in own.items() if v is None or type(v) is int}
        self.dense = empty(kind, config)

    def ffn(self) -> Keys:
        """The key for the width of the FFN."""
        index, part = self._first("ffn")
        if part is None:
            return {}
        size = len(part)
        for key in (*self._keys(size), *self._keys(None)):
            block = self._built(index, {key: size // 2})
            if block is not None and self._has(index, block, part, size // 2):
                return {"width": key}
        return {}

    def heads(self) -> Keys:
        """The keys for the numbers of heads and their dimension."""
        index, part = self._first("attention")
        if part is None:
            return {}
        units, dim = len(part), self.anatomy.anatomies[index].head_dim
        each = part.columns // dim  # query heads per unit
        fewer = max(1, units // 2)
        for key, kv, own in self._pairs(units * each, units, dim):
            changes = {key: fewer * each} | ({kv: fewer} if kv else {}) | ({"head_dim": dim} if own else {})
            block = self._built(index, changes)
            if block is not None and units > 1 and self._has(index, block, part, fewer):
                return {"heads": key} | ({"kv_heads": kv} if kv else {}) | ({"head_dim": "head_dim"} if own else {})
        for key in self._keys(units * each):  # a number of heads that sets their dimension too
            block = self._built(index, {key: fewer * each})
            if block is not None and _numbers(block) != _numbers(self._block(index)):
                return {"heads": key}
        return {}

    def experts(self) -> Keys:
        """The keys for the number of experts, which their search has found, and for their width."""
        pairs = [(i, each.experts) for i, each in enumerate(self.anatomy.anatomies) if each.experts]
        if not pairs:
            return {}
        index, found = pairs[0]
        consumer, size = found.channels.consumer, len(found.channels)
        for key in expert_keys(self.config, size):
            other = rebuilt(self.kind, self.config, {key: size // 2})
            stacked = held(other.get_submodule(f"{self.anatomy.blocks}.{index}"), consumer.path) if other else None
            if stacked is not None and stacked.shape[consumer.axis] == size // 2:
                return {"experts": found.key, "expert_width": key}
        return {"experts": found.key}

    def _first(self, name: str) -> tuple[int, Part | None]:
        parts = [(i, getattr(each, name)) for i, each in enumerate(self.anatomy.anatomies)]
        return next(((i, part) for i, part in parts if part is not None), (0, None))

    def _keys(self, value: int | None) -> list[str]:
        own = [key for key, each in self.values.items() if each == value]
        return [key for key in own if key not in NOT_SIZES and not key.endswith("_id")]

    def _block(self, index: int) -> nn.Module:
        return self.dense.get_submodule(f"{self.anatomy.blocks}.{index}")

    def _pairs(self, heads: int, kv_heads: int, head_dim: int) -> Iterator[tuple[str, str | None, bool]]:
        dim = text_config(self.config).to_dict().get("head_dim")
        for own in (True, False) if dim in (None, head_dim) else (False,):  # elsewhere it is that of something else
            for key in self._keys(heads):
                for kv in (*[k for k in self._keys(kv_heads) if k != key], None):
                    yield key, kv, own

    def _built(self, index: int, changes: dict[str, Any]) -> nn.Module | None:
        """A block of a model with other values; None if there is none."""
        model = rebuilt(self.kind, self.config, changes)
        return None if model is None else model.get_submodule(f"{self.anatomy.blocks}.{index}")

    def _has(self, index: int, block: nn.Module, part: Part, units: int) -> bool:
        """Whether a block has as many units, and nothing else changed in their projections."""
        if width(block.get_submodule(part.consumer.path), "in_features") != part.columns * units:
            return False
        for (path, _), rows in by_producer(part.producers).items():
            if path in dict(block.named_modules()):
                before = width(self._block(index).get_submodule(path), "out_features")
                if width(block.get_submodule(path), "out_features") != before - rows.shape[1] * (len(part) - units):
                    return False
        return True


def _numbers(block: nn.Module) -> list[tuple[str, str, int]]:
    return [(n, k, v) for n, m in block.named_modules() for k, v in vars(m).items() if type(v) is int]
