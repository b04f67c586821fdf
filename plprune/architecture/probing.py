"""Runs a model without its weights, to see which values of one projection reach which inputs of another.

Every projection is replaced by a stand-in, which notes its input and returns random outputs. All that lies between one
projection and the next (activations, attention, norms, convolutions) runs as it is, so the weights of projections are
not needed: models on the meta device will do. Some outputs (rows) of one projection are then disturbed, and the inputs
(columns) of others that change depend on them. Every sample of a batch is disturbed in another way, and compared with
the first, which is not disturbed.
"""

import contextlib
import copy
import functools
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture.modules import is_projection, replaced_forwards, width, without_weights
from plprune.architecture.wrappers import text_config

SAMPLES = 16  # of a batch: one is left as it is, the others are disturbed
TOKENS = 4
SCALES = (1.0, 0.3, 1.0, 0.1)  # of random outputs, by draw: large ones saturate gates
SMALL = 1 << 22  # a parameter outside projections gets random values if it has at most so many
LARGE = 1 << 16  # one that is larger, as a router, has the same values in all blocks
OUTPUT = ""  # stands for the output of a block among the paths of consumers

Hits = dict[str, Tensor]  # path of a consumer -> [disturbances, columns] bool


def empty(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a class without weights, in float64: parameters are on the meta device, buffers on the CPU.

    Recurrences run in chunks of few tokens.
    """
    with without_weights():
        model = kind._from_config(copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager")
    for module in model.modules():
        if isinstance(getattr(module, "chunk_size", None), int):  # recurrences pad sequences to it
            module.chunk_size = TOKENS  # type: ignore[assignment]
    return model


def rebuilt(
    kind: type[PreTrainedModel], config: PreTrainedConfig, changes: Mapping[str, Any]
) -> PreTrainedModel | None:
    """A model as from :func:`empty`, with other values in the config of its text decoder; None if it refuses them."""
    config = copy.deepcopy(config)
    try:
        for key, value in changes.items():
            setattr(text_config(config), key, value)
        return empty(kind, config)
    except Exception:  # classes refuse values in many ways
        return None


def weightless(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model whose projections have no weights, and all else has random values, in float64 on the CPU."""
    model = empty(kind, config)
    if any(p.dtype != torch.float64 for p in model.parameters()):
        _MIXED.add(model)
    own: Any = text_config(model.config)
    own._is_quantized = True  # whose code calls projections where it may use their weights
    own.output_router_logits = False  # routers that stand in have none
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    values: dict[str, Tensor] = {}
    for name, parameter in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        if isinstance(owner, nn.Embedding):  # all tokens are alike, as projections do not look at their inputs
            row = _normal(name, parameter.shape[1:]).expand(parameter.shape)
            setattr(owner, last, nn.Parameter(row, requires_grad=False))
        elif (not is_projection(owner) or last == "bias") and parameter.numel() <= SMALL:
            key = re.sub(r"\.\d+\.", ".", name, count=1) if parameter.numel() > LARGE else name
            if key not in values:
                values[key] = 1 + 0.3 * _normal(name, parameter.shape)
            setattr(owner, last, nn.Parameter(values[key], requires_grad=False))
    return model.eval()


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the stacked weights of experts."""
    stacked = any(p.ndim == 3 and p.numel() > SMALL // 64 for p in module.parameters(recurse=False))
    return has_interface(module) or (stacked and not isinstance(module, nn.Conv1d))


def has_interface(module: nn.Module) -> bool:
    """Whether `transformers.integrations.moe` runs a module's experts."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def kind_of(module: nn.Module) -> str:
    """What modules of one kind have in common: their parts, shapes, and numbers other than an index."""
    parts = [
        (name, type(m).__name__, sorted((k, v) for k, v in vars(m).items() if type(v) is int and "layer" not in k))
        for name, m in module.named_modules()
    ]
    return str((parts, [(name, tuple(p.shape)) for name, p in module.named_parameters()]))


def is_norm(module: nn.Module) -> bool:
    """Whether a module only has one value, or a value and a bias, for each of its inputs."""
    own = list(module.parameters(recurse=False))
    return 0 < len(own) <= 2 and all(p.ndim == 1 for p in own) and not list(module.children()) and "Norm" in str(module)


class Probes:
    """Stand-ins for the projections of a model without weights.

    Args:
        model: From :func:`weightless`.
        norms: Whether norms multiply by their weights only, so that they do not tie their inputs together.
    """

    def __init__(self, model: nn.Module, norms: bool = False) -> None:
        self.model = model
        self.kept: dict[str, tuple[Tensor, int]] = {}  # rows that a projection still has, and how many it had
        self.silent: set[str] = set()  # paths of projections that output zeros
        self.samples, self.draw = 1, 0
        self.seen: dict[str, Tensor] = {}
        self.routed: dict[str, int] = {}  # experts per token, by the path of the experts
        self._delta: dict[str, tuple[Tensor, str, bool]] = {}
        self.norms = norms

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Replaces the projections for the duration of the context."""
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for path, module in self.model.named_modules():
            if is_projection(module):
                replaced[module] = self._projection(path, module)
            elif is_experts(module):
                replaced[module] = self._experts(path)
            elif self.norms and is_norm(module):
                replaced[module] = _scaling(module)
        mode = _InFloat64() if self.model in _MIXED else contextlib.nullcontext()
        with replaced_forwards(list(replaced), list(replaced.values())), mode:
            yield

    def disturb(self, path: str, masks: Tensor, first: bool = False) -> None:  # [n, rows] bool
        """Sample i + 1 differs from sample 0 in the rows of mask i, of all tokens or of the first."""
        self._delta[path] = torch.cat([torch.zeros_like(masks[:1]), masks]), f"{path} disturbed", first

    def double(self, path: str, rows: Tensor, size: int) -> None:
        """Sample 1 has twice the values of sample 0 in some rows."""
        factor = torch.zeros(2, size, dtype=torch.float64)
        factor[1, rows] = 1
        self._delta[path] = factor, path, False

    def rest(self) -> None:
        """Disturbs nothing."""
        self._delta = {}

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Random values that depend on the name and the draw."""
        return SCALES[self.draw % len(SCALES)] * _remembered(f"{self.draw} {name}", tuple(shape))

    def _experts(self, path: str) -> Callable[..., Tensor]:
        def forward(x: Tensor, *routing: Any, **more: Any) -> Tensor:
            index = next((t for t in (*routing, *more.values()) if _is_index(t)), None)
            if index is not None:
                self.routed[path] = index.shape[-1]
            return torch.zeros_like(x)

        return forward

    def _projection(self, path: str, module: nn.Module) -> Callable[..., Tensor]:
        rows = width(module, "out_features")

        def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
            self.seen[path] = x.detach()
            tokens = x.shape[:-1].numel() // self.samples
            y, shape = self._outputs(path, tokens, rows).expand(self.samples, tokens, rows), (*x.shape[:-1], rows)
            if path in self._delta:
                factor, name, first = self._delta[path]
                change = self._outputs(name, tokens, rows)
                if first:
                    change[1:] = 0
                y = y.clone()
                y[: len(factor)] += factor[:, None] * change
            if path in self.silent:
                return torch.zeros_like(y).reshape(shape)
            return y.reshape(shape) if path in self._delta else y.reshape(shape).clone()

        return forward

    def _outputs(self, path: str, tokens: int, rows: int) -> Tensor:  # [tokens, rows]
        kept, rows = self.kept.get(path, (None, rows))
        y = self.normal(path, (tokens, rows))
        return y if kept is None else y[:, kept]


_MIXED: WeakSet[nn.Module] = WeakSet()  # models with parameters that are float32 whatever the model's dtype is


class _InFloat64(TorchFunctionMode):
    """Computes in float64 what models compute in float32 whatever their dtype is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        values = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if each is torch.float32 else each for each in args), **values)


class ReadingNoWeights(TorchFunctionMode):
    """Raises RuntimeError where a model computes with weights itself: without them, PyTorch may use any numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ not in SIZES and any(isinstance(each, Tensor) and each.is_meta for each in args):
            raise RuntimeError("it computes with weights itself")
        return func(*args, **(kwargs or {}))


SIZES = ("__get__", "dim", "is_floating_point", "numel", "size")  # functions that do not look at values


@dataclass(frozen=True)
class Call:
    """A module that the model has called, with its arguments for a batch of `SAMPLES`."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockProbes:
    """Probes in one decoder block, and in those of its children that are called once.

    Args:
        probes: The model's, with projections replaced.
        call: Of the block.
        children: Whether to run children by themselves, where that is enough.
    """

    def __init__(self, probes: Probes, call: Call, children: bool = True) -> None:
        self.probes, self.path = probes, call.path
        self.block = probes.model.get_submodule(call.path)
        self.rows = {
            name: width(module, "out_features") for name, module in self.block.named_modules() if is_projection(module)
        }
        self._call = call
        self.returned = 0  # length of the tuple that the block returns
        self._children = self._calls_of_children() if children else {}

    def run(self, call: Call | None = None, disturbed: bool = False) -> dict[str, Tensor]:
        """Runs the block, or a child; `disturbed` input differs in all samples but the first.

        Returns:
            The inputs of its projections, and its output, [samples, tokens, columns] each.
        """
        probes, call = self.probes, call or self._call
        probes.seen = {}
        args, kwargs = list(_first(call.args, probes.samples)), dict(_first(call.kwargs, probes.samples))
        key = "hidden_states" if not args else 0
        holder: Any = args if args else kwargs
        old = holder[key]
        hidden = probes.normal("hidden", old.shape[1:]).expand(old.shape).clone()
        if disturbed:
            hidden[1:] += probes.normal("hidden disturbed", old.shape[1:])
        holder[key] = hidden
        out = probes.model.get_submodule(call.path)(*args, **kwargs)
        seen = {name.removeprefix(f"{self.path}."): x for name, x in probes.seen.items()}
        if call is self._call:
            self.returned = len(out) if isinstance(out, tuple | list) else 0
        out = out[0] if isinstance(out, tuple | list) else out
        return {name: x.reshape(probes.samples, -1, x.shape[-1]) for name, x in (seen | {OUTPUT: out}).items()}

    def reached(self, path: str | None, masks: Tensor, draws: int = 1) -> Hits:  # [n, rows] bool
        """The columns that depend on the rows of each mask; on the block's input, if the path is None."""
        parts = [self._reached(path, part, draws) for part in masks.split(SAMPLES - 1)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _reached(self, path: str | None, masks: Tensor, draws: int) -> Hits:
        hits: Hits = {}
        for draw in range(draws):
            self.probes.draw = draw
            if path is not None:
                self.probes.disturb(f"{self.path}.{path}", masks)
            seen = self.run(self._around(path), disturbed=path is None)
            self.probes.rest()
            _merge(hits, {name: differs(x[1 : 1 + len(masks)], x[:1]) for name, x in seen.items()})
        return hits

    def proportional(self, path: str, rows: Tensor, consumer: str) -> bool:
        """Whether all columns of a consumer double if these rows of a producer do, and depend on earlier tokens."""
        self.probes.double(f"{self.path}.{path}", rows, self.rows[path])
        x = self.run(self._around(path))[consumer]
        self.probes.rest()
        doubled = torch.allclose(x[1], 2 * x[0], rtol=1e-5, atol=1e-9)
        self.probes.disturb(f"{self.path}.{path}", torch.ones(1, self.rows[path], dtype=torch.bool), first=True)
        x = self.run(self._around(path))[consumer]
        self.probes.rest()
        return doubled and bool((x[1, -1] != x[0, -1]).any())

    def reached_by_parameter(self, name: str, axis: int, masks: Tensor, draws: int = 1) -> Hits:  # [n, size] bool
        """The columns that depend on elements of a parameter that is not a projection's."""
        owner, _, last = name.rpartition(".")
        module = self.block.get_submodule(owner)
        old = getattr(module, last)
        shape = [-1 if i == axis else 1 for i in range(old.ndim)]
        self.probes.samples, hits = 1, {}
        for draw in range(draws):
            self.probes.draw = draw
            before = self.run(self._around(name))
            rows: dict[str, list[Tensor]] = {}
            for mask in masks:
                change = mask.double().view(shape) * _normal(f"{draw} {name}", old.shape)
                setattr(module, last, nn.Parameter(old + change, requires_grad=False))
                for c, x in self.run(self._around(name)).items():
                    rows.setdefault(c, []).append(differs(x, before[c]))
            setattr(module, last, old)
            _merge(hits, {c: torch.cat(found) for c, found in rows.items()})
        self.probes.samples = SAMPLES
        return hits

    def open_children(self, residual: Collection[str]) -> None:
        """Runs children with the whole block from now on, where inputs other than `residual` ones depend on them."""
        for child in list(self._children):
            for name, rows in self.rows.items():
                if name.startswith(f"{child}."):
                    self.probes.disturb(f"{self.path}.{name}", torch.ones(1, rows, dtype=torch.bool))
            seen = self.run()
            self.probes.rest()
            outside = {c: x for c, x in seen.items() if not c.startswith(f"{child}.") and c not in residual}
            if any(differs(x[1:2], x[:1]).any() for x in outside.values()):
                del self._children[child]

    def part(self, path: str) -> str | None:
        """What the child is that runs by itself around a part of the block; None if the whole block does."""
        call = self._around(path)
        return None if call is None else f"{self.probes.norms} {kind_of(self.probes.model.get_submodule(call.path))}"

    def _around(self, path: str | None) -> Call | None:
        """The child that holds a part of the block."""
        return self._children.get(path.partition(".")[0]) if path else None

    def _calls_of_children(self) -> dict[str, Call]:
        """The calls of children that need not run with the whole block, as only their outputs leave them."""
        calls: dict[str, list[Call]] = {}
        handles = []
        for name, child in self.block.named_children():
            if any(map(is_projection, child.children())):

                def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                    calls.setdefault(name, []).append(Call(f"{self.path}.{name}", args, kwargs))

                handles.append(child.register_forward_pre_hook(note, with_kwargs=True))
        self.run()
        for handle in handles:
            handle.remove()
        return {name: each[0] for name, each in calls.items() if len(each) == 1 and _takes_hidden_states(each[0])}


def _takes_hidden_states(call: Call) -> bool:
    first = call.args[0] if call.args else call.kwargs.get("hidden_states")
    return isinstance(first, Tensor) and first.is_floating_point() and len(first) == SAMPLES


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and not value.is_floating_point()


def _merge(hits: Hits, more: Hits) -> None:
    for name, new in more.items():
        hits[name] = hits[name] | new if name in hits else new


def differs(
    x: Tensor, like: Tensor, rounding: float = 1e-9
) -> Tensor:  # [n, tokens, columns], [1, tokens, columns] -> [n, columns]
    """The columns that are not what they are in the undisturbed sample."""
    gap, scale = (x - like).abs().amax(1), like.abs().amax(1)
    return gap > rounding * scale.clamp(min=1e-30)


@functools.lru_cache(maxsize=64)
def _remembered(name: str, shape: tuple[int, ...]) -> Tensor:
    """Random values of which a block's probes ask again and again; not to be changed."""
    return _normal(name, shape)


def _normal(name: str, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _first(value: Any, samples: int) -> Any:
    """Arguments for the first samples of a batch."""
    if isinstance(value, Tensor):
        each, rest = divmod(len(value), SAMPLES) if value.ndim else (0, 1)
        return value if rest else value[: each * samples]
    if isinstance(value, tuple | list):
        return type(value)(_first(each, samples) for each in value)
    return {k: _first(v, samples) for k, v in value.items()} if type(value) is dict else value


def _scaling(norm: nn.Module) -> Callable[..., Tensor]:
    """The norm without its statistic; some multiply by a gate too."""

    def forward(x: Tensor, *others: Any, **more: Any) -> Any:
        weight = next(norm.parameters())
        if x.shape[-1] != len(weight):  # its values are for something else than its inputs
            return type(norm).forward(norm, x, *others, **more)
        for each in (*others, *more.values()):
            x = x * each if isinstance(each, Tensor) and each.shape == x.shape else x
        return x * weight

    return forward
