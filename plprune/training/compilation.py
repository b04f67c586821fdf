"""Compiles the decoder blocks of a model one by one, for training batches.

Pruned blocks have unlike widths. The dimensions in which they differ are symbolic, so that the blocks share graphs:
without that, dynamo would compile each block anew, and give up after eight.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import replaced_forwards

SETTINGS = {
    "force_parameter_static_shapes": False,  # both, or widths are constants of a graph
    "force_nn_module_property_static_shapes": False,
    "optimize_ddp": False,  # which splits a graph by DDP's buckets; a block is smaller than one
    "recompile_limit": 64,  # blocks of several kinds, and batches of several shapes
}


def compiled_blocks(
    model: PreTrainedModel, backend: str | Callable[..., object] = "inductor"
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Prepares the blocks of a model, to be compiled when they are first called, and for another shape of batch again.

    Args:
        model: Its modules and parameters stay as they are.
        backend: Of `torch.compile`.

    Returns:
        Makes a context in which the blocks are compiled. Outside of it they are not.
    """
    modules = [block.module for block in blocks_of(model)]
    _mark_unlike_widths(modules)
    forwards = [torch.compile(module.forward, fullgraph=True, backend=backend) for module in modules]

    @contextlib.contextmanager
    def compiled() -> Iterator[None]:
        try:
            with dynamo.config.patch(SETTINGS), replaced_forwards(modules, forwards):
                yield
        except TorchDynamoException as error:
            reason = " ".join(" ".join(str(error).split("\n")[:2]).split())
            raise ValueError(f"the blocks cannot be compiled ({reason}): leave out model.compile") from error

    return compiled


def _mark_unlike_widths(modules: list[nn.Module]) -> None:
    """Marks the dimensions of parameters and buffers that are not the same in all blocks that have them."""
    by_name: dict[str, list[Tensor]] = {}
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            by_name.setdefault(name, []).append(tensor)
    for tensors in by_name.values():
        for dim, sizes in enumerate(zip(*(tensor.shape for tensor in tensors), strict=True)):
            for tensor in tensors if len(set(sizes)) > 1 else ():
                dynamo.maybe_mark_dynamic(tensor, dim)
