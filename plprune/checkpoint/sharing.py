"""Sends the weights of a model from one process to the processes that have only its structure."""

import platform
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from plprune.architecture.modules import lacks_weights, saved_buffers, says_tied, set_parameter, tie, tied
from plprune.io.distributed import ProcessGroup, broadcast, broadcast_object, check_agreement, gather_objects


@torch.no_grad()
def receive(model: PreTrainedModel, group: ProcessGroup) -> None:
    """Fills parameters on the meta device, and saved buffers, from a process that has them.

    It is one of the same node, if one there has them.

    Every process must hold the same structure. Nothing is sent if no process lacks weights.

    Raises:
        ValueError: The structures differ, or no process has the weights.
    """
    lacking = gather_objects(lacks_weights(model), group)
    if group is None or not any(lacking):
        return
    heads = [each for each in gather_objects(None if lacks_weights(model) else tied(model), group) if each is not None]
    to_embedding = heads[0] if heads else says_tied(model.config)
    if lacked := lacks_weights(model):
        tie(model, to_embedding)  # the configuration may say otherwise than the weights
    parameters: dict[str, Tensor] = {**dict(model.named_parameters()), **saved_buffers(model)}
    own = {name: f"{p.dtype} {tuple(p.shape)}" for name, p in parameters.items()}
    first = broadcast_object(own, group)
    odd = [name for name in {**first, **own} if own.get(name) != first.get(name)]
    check_agreement(f"another {odd[0]} ({own.get(odd[0])})" if odd else "its own", "the model's structure", group)
    senders, source = _senders(lacking, group)
    for name, parameter in parameters.items():
        value = torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach()
        value = broadcast(value, source, senders)
        if lacked:
            set_parameter(model, name, value)
    if tied(model) != to_embedding:  # the embedding was replaced, and the head with it
        tie(model, to_embedding)


def _senders(lacking: list[bool], group: ProcessGroup) -> tuple[ProcessGroup, int]:
    """The group in which this process receives or sends weights, and the rank in it of the sender."""
    hosts = gather_objects(platform.node(), group)
    nodes = {host: [i for i, each in enumerate(hosts) if each == host] for host in hosts}
    if all(lacking):
        raise ValueError("no process has the model's weights: let one process of each node load them")
    if len(nodes) == 1 or any(all(lacking[i] for i in node) for node in nodes.values()):
        return group, lacking.index(False)
    groups = {host: dist.new_group(node) for host, node in nodes.items()}  # a collective call
    mine = platform.node()
    return cast(ProcessGroup, groups[mine]), next(k for k, i in enumerate(nodes[mine]) if not lacking[i])
