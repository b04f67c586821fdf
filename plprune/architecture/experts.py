"""Finds the experts of a block, by building the family's own class with fewer of them.

What changes with the number of experts is theirs: an axis of some parameters and buffers, and numbers that modules
keep. The channels within an expert lie as `transformers.integrations.moe` says; that is tried with random weights.
"""

import copy
import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.anatomy import Experts, Part, Slice
from plprune.architecture.cutting import cut, cut_within
from plprune.architecture.modules import set_parameter
from plprune.architecture.probing import SAMPLES, BlockProbes, Call, Probes, has_interface, rebuilt
from plprune.architecture.trials import FAILURES, copied, failure, gap
from plprune.architecture.wrappers import text_config

GROUPS = ("n_group", "num_expert_group")  # keys of a config for groups of experts that a router chooses among
TRIED = 4, 16  # experts and channels of a trial


class Unlike(ValueError):
    """Experts that are not laid out as any that can be pruned."""


class Search:
    """Finds the experts of the blocks of a model.

    Args:
        model: Whole, without weights.
        path: Of its list of blocks.
    """

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path
        self._smaller: dict[tuple[str, int], PreTrainedModel | None] = {}

    def experts(self, index: int, call: Call | None) -> Experts | None:
        """The experts of a block; None if it has none.

        Args:
            index: Of the block.
            call: Of the block, if the model makes one.

        Raises:
            Unlike: They cannot be pruned; the message says why.
        """
        prefix = f"{self.path}.{index}"
        block = self.model.get_submodule(prefix)
        paths = [name for name, module in block.named_modules() if has_interface(module)]
        if not paths:
            return None
        if len(paths) > 1:
            raise Unlike(f"{', '.join(paths)}, as a block has several mixtures")
        (path,) = paths
        active = _routed(self.model, call).get(f"{prefix}.{path}") if call else None
        if call is None or active is None:
            raise Unlike(f"{path}, as its router does not say which experts each token has")
        channels = _channels(block, path)
        units, key, outside = self._units(index, block, path)
        found = Experts(path, units, channels, active, _groups(self.model.config), key, outside=outside)
        check_channels(block.get_submodule(path), found)
        return dataclasses.replace(found, least=self._least(call, found))

    def _least(self, call: Call, found: Experts) -> int:
        """The least number of experts with which the block runs, as some routers judge groups by their best two."""
        step, count, why = found.groups, len(found.units), ""
        first = step * -(-found.active // step)
        for number in range(first, min(count, first + 4 * step), step):
            with copied(self.model, call.path) as block:
                cut(block, found.units.producers, found.units.consumer, found.units.counts, torch.arange(number))
                try:
                    _routed(self.model, call)
                    return number
                except FAILURES as error:
                    why = why or f" ({failure(error)})"
        if first >= count:
            return count
        raise Unlike(f"{found.path}, as its router fails with fewer experts{why}")

    def _units(self, index: int, block: nn.Module, path: str) -> tuple[Part, str, tuple[str, ...]]:
        consumer = f"{path}.down_proj"
        count = len(cast(Tensor, block.get_submodule(path).down_proj))
        fewer, reasons = count // 2, []
        for key in expert_keys(self.model.config, count):
            smaller = self._built(key, fewer)
            if smaller is None:
                continue
            other = smaller.get_submodule(f"{self.path}.{index}")
            try:
                tensors, counts = _changed(block, other, count, fewer)
            except Unlike as why:
                reasons.append(str(why))
                continue
            if consumer in tensors:
                every = torch.arange(count)[:, None]
                producers = tuple(Slice(name, every, axis) for name, axis in tensors.items() if name != consumer)
                return (
                    Part(producers, Slice(consumer, every, tensors[consumer]), counts),
                    key,
                    self._outside(smaller, count, fewer),
                )
        raise Unlike(f"{path}, as {reasons[0] if reasons else f'no key of the config sets the {count} experts'}")

    def _outside(self, smaller: PreTrainedModel, count: int, fewer: int) -> tuple[str, ...]:
        """The attributes of modules outside of the blocks that hold the number of experts."""
        prefix, theirs = f"{self.path}.", dict(smaller.named_modules())
        rest = [(name, module) for name, module in self.model.named_modules() if not name.startswith(prefix)]
        return tuple(
            f"{name}.{key}".removeprefix(".")
            for name, module in rest
            for key, value in _numbers(module).items()
            if (value, _numbers(theirs[name]).get(key)) == (count, fewer)
        )

    def _built(self, key: str, value: int) -> PreTrainedModel | None:
        if (key, value) not in self._smaller:
            self._smaller[key, value] = rebuilt(type(self.model), self.model.config, {key: value})
        return self._smaller[key, value]


def _routed(model: nn.Module, call: Call) -> dict[str, int]:
    """How many experts of a block run for a token, by their path in the model."""
    probes = Probes(model)
    probes.samples = SAMPLES
    with probes.standing_in():
        BlockProbes(probes, call, children=False).run()
    return probes.routed


def expert_keys(config: PreTrainedConfig, count: int) -> list[str]:
    """The keys of a decoder's config that may set a number of experts, or a width of them."""
    own = text_config(config).to_dict()
    keys = [key for key, value in own.items() if type(value) is int and value == count and not key.endswith("_id")]
    return sorted(keys, key=lambda key: "expert" not in key)


def _changed(block: nn.Module, other: nn.Module, count: int, fewer: int) -> tuple[dict[str, int], dict[str, int]]:
    """The axis of each tensor that has an entry per expert, and what an expert has of each number that changes."""
    axes, counts = {}, {}
    ours, theirs = dict(block.named_modules()), dict(other.named_modules())
    if ours.keys() != theirs.keys():
        raise Unlike("other modules come with another number of experts")
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(other).items()}
    for name, tensor in _tensors(block).items():
        before, after = list(tensor.shape), shapes.get(name, [])
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b]
        if len(before) != len(after) or [(before[i], after[i]) for i in changed] not in ([], [(count, fewer)]):
            raise Unlike(f"{name} is {before} with {count} experts, and {after} with {fewer}")
        if changed:
            axes[name] = changed[0]
    for name, module in ours.items():
        own, new = _numbers(module), _numbers(theirs[name])
        for key in [key for key in own if own[key] != new.get(key)]:
            if type(own[key]) is not int or own[key] % count or new.get(key) != own[key] // count * fewer:
                raise Unlike(f"{name}.{key} is {own[key]} with {count} experts, and {new.get(key)} with {fewer}")
            counts[f"{name}.{key}"] = own[key] // count
    return axes, counts


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """The numbers that a module keeps, and lists of them."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return {key: value for key, value in own.items() if type(value) in (int, float, list, tuple)}


def _channels(block: nn.Module, path: str) -> Part:
    """The channels within each expert, as the flags of the interface say."""
    module: Any = block.get_submodule(path)
    transposed, parts = int(module.is_transposed), 1 + module.has_gate
    name = f"{path}.{'gate_up_proj' if module.has_gate else 'up_proj'}"
    width, outer = module.down_proj.shape[2 - transposed], module.down_proj.shape[1 + transposed]
    channel, part = torch.arange(width)[:, None], torch.arange(parts)
    index = channel + width * part if module.is_concatenated else parts * channel + part
    producers = [Slice(name, index, 1 + transposed), *([Slice(f"{name}_bias", index, 1)] if module.has_bias else [])]
    for each in producers:
        shape = getattr(module, each.path.rpartition(".")[2]).shape
        if shape[each.axis] != index.numel():
            raise Unlike(f"{each.path} is {list(shape)}, which is not that of {width} channels")
    own = [key for key, value in _numbers(module).items() if value == width]
    counts = {f"{path}.{key}": 1 for key in own if width != outer or "intermediate" in key}  # nothing computes by these
    return Part(tuple(producers), Slice(f"{path}.down_proj", channel, 2 - transposed), counts)


def _groups(config: PreTrainedConfig) -> int:
    own = text_config(config)
    return next((n for key in GROUPS if isinstance(n := getattr(own, key, None), int)), 1)


@torch.no_grad()
def check_channels(whole: nn.Module, found: Experts) -> None:
    """Raises Unlike if small experts with random weights compute something else once they are cut than if masked."""
    block = nn.Module()  # where paths begin
    holder: nn.Module = block
    for name in found.path.split(".")[:-1]:
        holder.add_module(name, nn.Module())
        holder = holder.get_submodule(name)
    holder.add_module(found.path.rpartition(".")[2], copy.deepcopy(whole))
    mine = dataclasses.replace(found.units, producers=_inside(found.units.producers, found.path))
    mine = dataclasses.replace(mine, counts={k: n for k, n in mine.counts.items() if k.startswith(f"{found.path}.")})
    experts, width = (min(size, most) for size, most in zip((len(mine), len(found.channels)), TRIED, strict=True))
    cut(block, mine.producers, mine.consumer, mine.counts, torch.arange(experts))
    channels = found.channels
    cut(block, channels.producers, channels.consumer, channels.counts, torch.arange(width))
    module: Any = block.get_submodule(found.path)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(module.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        set_parameter(module, name, values / parameter.shape[-1] ** 0.5)
    inputs = _inputs(module, found, experts, generator)
    keep = torch.stack([torch.randperm(width, generator=generator)[: width // 2].sort().values for _ in range(experts)])
    smaller = copy.deepcopy(block)
    producers, consumer = channels.of_size(width)
    cut_within(smaller, producers, consumer, channels.counts, keep)
    masked = torch.zeros(experts, width).scatter(1, keep, 1)
    module.down_proj.mul_(masked[:, None] if consumer.axis == 2 else masked[..., None])
    try:
        seen = [{found.path: each.get_submodule(found.path)(*inputs)} for each in (block, smaller)]
    except FAILURES as error:
        raise Unlike(f"{found.path}, which fails with fewer channels ({failure(error)})") from error
    if different := gap(*seen):
        raise Unlike(f"{found.path}, as its experts with fewer channels differ by {different[0]:.2g} from masked ones")


def _inside(slices: tuple[Slice, ...], path: str) -> tuple[Slice, ...]:
    return tuple(each for each in slices if each.path.startswith(f"{path}."))


def _inputs(module: Any, found: Experts, experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of some tokens, two experts for each, and routing weights."""
    outer = module.down_proj.shape[1 if found.channels.consumer.axis == 2 else 2]
    first = found.channels.producers[0]
    inner = getattr(module, first.path.rpartition(".")[2]).shape[3 - first.axis]
    if inner != outer:
        raise Unlike(f"{found.path}, which reads {inner} features and writes {outer}")
    x, weights = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (outer, 2))
    return x, torch.stack([torch.randperm(experts, generator=generator)[:2] for _ in x]), weights
