"""How llama.cpp has mixtures of experts: stacked weights, one tensor each for gate, up and down, and the router.

A file has one number of experts and one width of them for all its blocks, where an FFN's width may be an array. Some
architectures have an FFN in the place of experts in their first blocks, and experts that every token has beside them.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from plprune.architecture.blocks import Block
from plprune.architecture.cutting import held
from plprune.architecture.modules import detached

PARTS = ("ffn_gate_exps", "ffn_up_exps")
CORRECTION = "exp_probs_b.bias"  # added to what a router chooses experts by
UNIFORM = "prune by REAP, or by FASP with `attention` none, FLAP with `structure` UL-UM, or 2SSP, which treat all alike"


@dataclass(frozen=True)
class Mixture:
    """The mixtures that an architecture computes.

    Args:
        leading: Whether the first blocks may have an FFN in the place of experts.
        shared: Whether the file gives the width of the expert that every token has, or how many times that of the
            others it is; empty if there is none.
        biases: Whether router and experts have biases.
    """

    leading: bool = False
    shared: Literal["", "width", "count"] = ""
    biases: bool = False


def refusals(blocks: Sequence[Block], name: str, mixture: Mixture | None, places: Collection[str]) -> Iterator[str]:
    """Reasons why an architecture does not compute the experts of a model; none if it has no experts.

    Args:
        blocks: Of the model.
        name: Of the architecture.
        mixture: The mixtures that it computes.
        places: Its tensors of a block.
    """
    some = [block for block in blocks if block.expert_count]
    dense = [block for block in blocks if not block.expert_count]
    if not some:
        return
    if mixture is None:
        yield f"experts are not written for llama.cpp's {name}: take a model of the family without"
        return
    if [block.index for block in dense] != list(range(len(dense) if mixture.leading else 0)):
        yield (
            f"blocks {[block.index for block in dense]} have no experts, which llama.cpp's {name} takes "
            f"{'in the first blocks only' if mixture.leading else 'in no block'}"
        )
    sizes = {
        "numbers of experts for a token": {block.experts.active for block in some},
        "numbers of experts": {block.expert_count for block in some},
        "widths of experts": {block.expert_width for block in some},
        "widths of shared experts": {block.channels for block in some},
        "FFN widths of the first blocks": {block.channels for block in dense},
    }
    uneven = {what: found for what, found in sizes.items() if len(found) > 1}
    for what, found in uneven.items():
        yield f"{what} differ between blocks ({min(found)} to {max(found)}), and llama.cpp's {name} has one: {UNIFORM}"
    if mixture.shared == "count" and not uneven and some[0].channels % some[0].expert_width:
        yield (
            f"the shared expert has {some[0].channels} channels, and llama.cpp's {name} wants a multiple of the "
            f"{some[0].expert_width} of the others: remove whole experts by REAP"
        )
    own = dict.fromkeys(each for block in some for each, _ in tensors(block, meta=True))
    if lost := [each for each in own if not _has_place(each, places, mixture)]:
        yield f"llama.cpp's {name} has no place for {', '.join(lost)}"


def ffn_widths(blocks: Sequence[Block]) -> list[int]:
    """The FFN width of each block that a file gives; experts count where there is no FFN."""
    dense = [block.channels for block in blocks if not block.expert_count]
    return [block.channels if not block.expert_count else (dense or [block.expert_width])[0] for block in blocks]


def fields(blocks: Sequence[Block], mixture: Mixture | None) -> dict[str, Any]:
    """The fields of a file for the experts of a model; none if it has no experts."""
    some = [block for block in blocks if block.expert_count]
    if not some or mixture is None:
        return {}
    first = some[0]
    found: dict[str, Any] = {
        "{arch}.expert_count": first.expert_count,
        "{arch}.expert_used_count": first.experts.active,
        "{arch}.expert_feed_forward_length": first.expert_width,
    }
    if mixture.leading:
        found["{arch}.leading_dense_block_count"] = len(blocks) - len(some)
    if mixture.shared == "width":
        found["{arch}.expert_shared_feed_forward_length"] = first.channels
    if mixture.shared == "count":
        found["{arch}.expert_shared_count"] = first.channels // first.expert_width
    return found


def paths(block: Block) -> tuple[str, ...]:
    """Where a block has its stacked weights, and the parameters and buffers of its router."""
    return (f"{block.experts.path}.", *_router(block)) if block.expert_count else ()


def tensors(block: Block, meta: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a block's router and experts, by llama.cpp's names; none if it has no experts."""
    if not block.expert_count:
        return
    group = next(each for each in block.all_groups if each.kind == "expert_channel")
    weight, *bias = group.producers
    index = weight.index.T[-len(PARTS) :]
    for name, rows in zip(PARTS[-len(index) :], index, strict=True):
        yield f"{name}.weight", _taken(_held(block, weight.path, meta), rows, weight.axis)
        for each in bias:
            yield f"{name}.bias", _taken(_held(block, each.path, meta), rows, each.axis)
    down = _held(block, group.consumer.path, meta)
    yield "ffn_down_exps.weight", down if group.consumer.axis == 2 else down.mT
    if held(block.module, f"{group.consumer.path}_bias") is not None:
        yield "ffn_down_exps.bias", _held(block, f"{group.consumer.path}_bias", meta)
    for path in _router(block):
        value = _held(block, path, meta)
        yield _router_name(path), value if path.endswith("weight") else value.flatten()


def _router(block: Block) -> list[str]:
    own = f"{block.experts.path}."
    return [each.path for each in block.experts.units.producers if not each.path.startswith(own)]


def _router_name(path: str) -> str:
    kind = path.rpartition(".")[2]
    return f"ffn_gate_inp.{kind}" if kind in ("weight", "bias") else CORRECTION


def _has_place(own: str, places: Collection[str], mixture: Mixture) -> bool:
    name, _, kind = own.partition(".")
    return name in places and (kind == "weight" or mixture.biases or own == CORRECTION)


def _held(block: Block, path: str, meta: bool) -> Tensor:
    return detached(cast(Tensor, held(block.module, path)), meta)


def _taken(value: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Rows of experts, with the features that they read last."""
    taken = value.index_select(axis, rows.to(value.device))
    return taken.mT if axis == 2 else taken
