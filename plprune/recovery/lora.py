r"""LoRA with ranks by block importance, as CFSP proposes, through PEFT.

More important blocks get a larger rank (importance-guided recovery of CFSP, https://arxiv.org/abs/2409.13199). The
authors published neither code nor numbers, so the rule is ours:

.. math:: r_l = r \, u_l / \bar u, \qquad \alpha_l = \alpha \, r_l / r

Ranks are rounded so that each is at least 1 and they sum to B r exactly. All blocks have the same scale
:math:`\alpha_l / r_l`. Rank-stabilised LoRA (https://arxiv.org/abs/2312.03732) has
:math:`\alpha_l = \alpha \sqrt{r_l / r}`, so that the scale is :math:`\alpha / \sqrt r` in all blocks.

DoRA (https://arxiv.org/abs/2402.09353) trains the norm of each row of a weight separately from its direction. The
magnitudes start as the norms of the rows of W:

.. math:: W' = m \odot \frac{W + s B A}{\lVert W + s B A \rVert}

Stacked weights of experts have factors for each expert, of the rank of the block, by PEFT's `target_parameters`. Its
wrappers add them to the whole stack before the experts run.

Symbols: B blocks, r mean rank, :math:`u_l` weight of block l (importance or damage); for one layer, W weight
[d_out, d_in], A and B factors, s scale, m magnitudes [d_out].
"""

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import is_projection, is_transposed, saved_buffers
from plprune.io.checks import check_sizes
from plprune.pruning.allocation import largest_remainder
from plprune.pruning.plan import PruningPlan
from plprune.recovery.masters import saved_dtype, weights_in_saved_dtype

ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")  # in parameter names
NESTED = ".base_layer"  # where an adapter keeps what it wraps


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the linear layers of the blocks.

    Args:
        rank: Mean rank over the blocks; the ranks sum to `rank` times the number of blocks exactly.
        alpha: Scale, above 0: adapters are multiplied by alpha / rank, the same factor in all blocks.
        dropout: Dropout of the adapters' inputs, in [0, 1).
        by: Each block's rank is proportional to its importance, to the fraction of it that was removed (damage), or is
            the same for all blocks (uniform).
        targets: Last parts of the names of the linear layers to adapt, like `q_proj`; all layers by default.
        dora: Whether to also train the magnitude of each output (DoRA). Steps are slower; the saved model has the same
            shapes. Not under ZeRO-3 and FSDP2.
        rslora: Whether to multiply adapters by alpha / sqrt(rank) instead (rank-stabilised LoRA).
        experts: Whether to also adapt the stacked weights of experts, each with factors of its own; neither with
            `dropout` nor with `dora`. `targets` may then be empty. The sum of weights and adapters is held of each
            block, unless gradients are checkpointed.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    by: Literal["importance", "damage", "uniform"] = "importance"
    targets: list[str] | None = None
    dora: bool = False
    rslora: bool = False
    experts: bool = False

    def __post_init__(self) -> None:
        check_sizes(rank=self.rank)
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}, but scales the adapters: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must be a probability in [0, 1)")
        if self.targets == [] and not self.experts:
            raise ValueError("targets is empty: name linear layers, or leave targets out to adapt all")
        if self.experts and (self.dropout or self.dora):
            option = "dropout" if self.dropout else "dora"
            raise ValueError(f"{option} is not possible on experts: leave out {option}, or experts")


def rank_weights(lora: LoRA, plan: PruningPlan | None, blocks: int) -> Tensor:  # [blocks]
    """The weight of each block for its rank; equal weights for a model that was not pruned."""
    if plan is None or lora.by == "uniform":
        return torch.ones(blocks)
    return (plan.importance if lora.by == "importance" else plan.damage.clamp(min=0))[plan.remaining]


def allocate_ranks(weights: Sequence[float], rank: int) -> list[int]:
    """Ranks proportional to `weights`, each at least 1, with a mean of exactly `rank`.

    Example:
        >>> allocate_ranks([1.0, 2.0, 3.0], 4)
        [2, 4, 6]
    """
    return largest_remainder(weights, rank * len(weights))


def inject(model: PreTrainedModel, lora: LoRA, plan: PruningPlan | None) -> list[int]:
    """Adds adapters to a model and freezes all other parameters.

    Returns:
        The rank of each block.

    Raises:
        ValueError: No linear layer matches `lora.targets`, there are no experts to adapt, or DoRA meets a row of zeros.
    """
    blocks = blocks_of(model)
    by_block = allocate_ranks(rank_weights(lora, plan, len(blocks)).tolist(), lora.rank)
    pairs = list(zip(blocks, by_block, strict=True))
    linear = {
        f"{block.path}.{name}": rank
        for block, rank in pairs
        for name, module in block.module.named_modules()
        if is_projection(module)
        and (lora.targets is None or name.removesuffix(".linear").rpartition(".")[2] in lora.targets)
    }
    if not linear and lora.targets != []:
        raise ValueError(f"no linear layer of the blocks is named {' or '.join(lora.targets or [])}: see lora.targets")
    stacked = {f"{block.path}.{name}": rank for block, rank in pairs if lora.experts for name in stacked_weights(block)}
    if lora.experts and not stacked:
        raise ValueError("the model has no mixture of experts, so it has no experts to adapt: leave out lora.experts")
    rank_of = linear | stacked
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=list(linear),
        target_parameters=list(stacked) or None,
        fan_in_fan_out=bool(linear) and is_transposed(model.get_submodule(next(iter(linear)))),
        use_dora=lora.dora,
        use_rslora=lora.rslora,
        # PEFT reads the keys as regular expressions. An alpha per layer keeps the scale independent of the rank.
        rank_pattern={re.escape(path): rank for path, rank in rank_of.items()},
        alpha_pattern={re.escape(path): _alpha(lora, rank) for path, rank in rank_of.items()},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")  # parameters do
        inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if lora.dora:
        _initialize_magnitudes(model)
    elif not lora.dropout:  # norms of DoRA and random numbers of dropout depend on the dtype of the inputs
        for block in blocks:  # not each layer: a compiled forward with checkpoints may set nothing
            layers = [layer for _, layer in adapters(block.module)]
            block.module.register_forward_pre_hook(functools.partial(_disable_cast_under_autocast, layers))
    return by_block


def stacked_weights(block: Block) -> list[str]:
    """Names of the stacked weights of the experts in a block: gate and up, or up alone, and down."""
    if not block.expert_count:
        return []
    channels = block.experts.channels
    return [channels.producers[0].path, channels.consumer.path]


def adapters(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The adapters of a model, by name; those of several weights of one module are nested."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a model, by name, without those of its adapters."""
    return [(name, p) for name, p in model.named_parameters() if not any(part in name for part in ADAPTER_PARTS)]


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Turns the model into the one that will be saved, for the duration of the context.

    Adapters are merged into plain layers, and all weights have their saved dtypes. Afterwards the model is restored
    exactly.
    """
    layers = adapters(model)
    originals = []
    outermost = [(name, layer) for name, layer in layers if not name.endswith(NESTED)]
    for _, layer in layers:
        weight = _weight(layer)
        originals.append(weight.detach().to("cpu", copy=True))
        weight.data = _merged(layer, weight.detach(), lambda p: p.detach())
    for name, layer in outermost:
        _set(model, name, layer.get_base_layer())
    try:
        with weights_in_saved_dtype(model):
            yield
    finally:
        for (_, layer), original in zip(layers, originals, strict=True):
            weight = _weight(layer)
            weight.data = original.to(weight.device)
        for name, layer in outermost:
            _set(model, name, cast(nn.Module, layer))


def merged_state(model: nn.Module, whole: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and buffers to save, one by one, with adapters merged and in their saved dtypes.

    Args:
        model: The model, with or without adapters; it is not changed.
        whole: Gathers the value of a parameter, which may be sharded. It is called for all parameters, in order.
    """
    layers = {f"{_plain(name)}.{_weight_name(layer)}": layer for name, layer in adapters(model)}
    for name, parameter in base_parameters(model):
        (path, _, own), value = name.rpartition("."), whole(parameter)
        if layer := layers.get(_plain(name)):
            value = _merged(layer, value, whole)
        yield _plain(name), value.to(saved_dtype(model.get_submodule(path), own))
    for name, buffer in saved_buffers(model).items():  # which no strategy shards
        yield _plain(name), buffer.cpu()


def _plain(name: str) -> str:
    """A name in the model without adapters."""
    return name.replace(NESTED, "")


def _weight_name(layer: LoraLayer) -> str:
    return layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"


def _weight(layer: LoraLayer) -> nn.Parameter:
    """The weight that an adapter changes."""
    return cast(nn.Parameter, getattr(layer.get_base_layer(), _weight_name(layer)))


def _initialize_magnitudes(model: nn.Module) -> None:
    """Sets magnitudes to the norms of the rows in float32; PEFT rounds them to the dtype of the weights."""
    for name, layer in adapters(model):
        norms = _rows(layer, cast(nn.Linear, layer.get_base_layer()).weight.detach().float()).norm(dim=1)
        if not norms.all():
            raise ValueError(
                f"{name} has rows of zeros, as from --widen and --pad_to, and DoRA divides by their norms: leave out "
                "lora.dora, or recover the model before it is widened"
            )
        for magnitude in layer.lora_magnitude_vector.values():
            cast(nn.Linear, magnitude).weight.data = norms


def _alpha(lora: LoRA, rank: int) -> float:
    """The alpha with which an adapter of the given rank has the scale that all blocks share."""
    return lora.alpha * math.sqrt(rank / lora.rank) if lora.rslora else lora.alpha * rank / lora.rank


def _merged(layer: LoraLayer, weight: Tensor, whole: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight of a layer with its adapters merged."""
    value = weight.float() + sum(_delta(layer, each, whole) for each in layer.active_adapters)
    for adapter in layer.active_adapters:
        if adapter in layer.lora_magnitude_vector:
            magnitude = whole(cast(nn.Linear, layer.lora_magnitude_vector[adapter]).weight)
            rows = _rows(layer, value)
            value = _rows(layer, rows * (magnitude / rows.norm(dim=1))[:, None])
    return value.to(weight.dtype).contiguous()


def _rows(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Converts between [d_out, d_in] and the layout in which the layer stores its weight."""
    return weight.T if is_transposed(layer.get_base_layer()) else weight


def _delta(layer: LoraLayer, adapter: str, whole: Callable[[Tensor], Tensor]) -> Tensor:
    a, b = (whole(cast(nn.Linear, factor[adapter]).weight) for factor in (layer.lora_A, layer.lora_B))
    if isinstance(layer, ParamWrapper):  # A is [experts * r, d_in], and B is [d_out, r * experts]
        rank, transposed = layer.r[adapter], bool(cast(Any, layer.get_base_layer()).is_transposed)
        how = "ore,eri->eio" if transposed else "ore,eri->eoi"
        a, b = a.float().unflatten(0, (-1, rank)), b.float().unflatten(1, (rank, -1))
        return torch.einsum(how, b, a) * layer.scaling[adapter]
    return _rows(layer, b.float() @ a.float() * layer.scaling[adapter])


def _disable_cast_under_autocast(layers: list[LoraLayer], block: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Stops PEFT from casting adapter inputs to float32 under autocast, which would keep a rounded copy per adapter."""
    enabled = not torch.is_autocast_enabled(next(block.parameters()).device.type)
    for layer in layers:
        layer.cast_input_dtype_enabled = enabled


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
