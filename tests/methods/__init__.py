"""What the methods' tests measure by themselves, with plain hooks on the whole model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import perplexity
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import innermost


@torch.no_grad()
def traced(model: PreTrainedModel, ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs of every consumer by the name of its group, and the hidden states between blocks, [b, s, d] float64."""
    inputs: dict[str, Tensor] = {}
    states: list[Tensor] = []

    def reads(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            inputs[name] = args[0].reshape(*ids.shape, -1).double()

        return hook

    def enters(_: nn.Module, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).double())

    def leaves(_: nn.Module, args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).double())

    blocks = blocks_of(model)
    hooks = [block.module.register_forward_pre_hook(enters, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].module.register_forward_hook(leaves))
    for block in blocks:
        for group in block.groups():
            hooks.append(block.part(group.consumer.path).register_forward_pre_hook(reads(group.name)))
    model(input_ids=ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    return inputs, states


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """A projection's weight in float64, by its path in the model."""
    return innermost(model.get_submodule(name)).weight.detach().double()


def best(score: Tensor, k: int) -> list[int]:
    """The `k` best units, ascending; of equals the first."""
    values = score.tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def plain_loop(model: PreTrainedModel, ids: Tensor, count: int) -> list[int]:
    """The attentions that are missed least, one after another, each judged by the perplexity of the whole model."""
    outputs = [innermost(block.part(block.attention.consumer.path)) for block in blocks_of(model)]
    dropped: list[int] = []
    for _ in range(count):
        found = {}
        for i in set(range(len(outputs))) - set(dropped):
            own = [p.detach().clone() for p in outputs[i].parameters()]
            for p in outputs[i].parameters():
                p.data.zero_()
            found[i] = perplexity(model, [ids])
            for p, value in zip(outputs[i].parameters(), own, strict=True):
                p.data.copy_(value)
        dropped.append(min(found, key=lambda i: found[i]))
        for p in outputs[dropped[-1]].parameters():
            p.data.zero_()
    return dropped


@torch.no_grad()
def inside_experts(model: PreTrainedModel, ids: Tensor) -> dict[str, list[Tensor]]:
    """Of each block of a Mixtral, by its group, the inner activations of each expert, [tokens, channels]."""
    found: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        def run(experts: Any, args: Any) -> None:
            x, chosen = args[0].double(), args[1]
            own = [x[(chosen == e).any(1)] for e in range(len(experts.down_proj))]
            halves = [each.double().chunk(2) for each in experts.gate_up_proj]
            found[name] = [
                torch.nn.functional.silu(each @ gate.T) * (each @ up.T)
                for each, (gate, up) in zip(own, halves, strict=True)
            ]

        return run

    blocks = blocks_of(model)
    hooks = [b.part(b.experts.path).register_forward_pre_hook(hook(f"blocks.{b.index}.expert_channel")) for b in blocks]
    model(input_ids=ids, use_cache=False)
    for handle in hooks:
        handle.remove()
    return found
