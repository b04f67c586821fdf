"""Finds the units of a model's decoder blocks by probing, without knowing its family.

One block of each kind is run without its weights (`plprune.architecture.probing`), rows are traced to columns
(`plprune.architecture.tracing`), and some of the units found are cut on trial (`plprune.architecture.trials`).
"""

import contextlib
import dataclasses
import itertools
import json
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from plprune.architecture import experts
from plprune.architecture.anatomy import Anatomy, ModelAnatomy, Part, Slice, SubBlock
from plprune.architecture.modeling_plprune import NoFFN
from plprune.architecture.modules import is_projection, multiplies_groups, width
from plprune.architecture.probing import (
    SAMPLES,
    SMALL,
    TOKENS,
    BlockProbes,
    Call,
    Probes,
    ReadingNoWeights,
    differs,
    has_interface,
    is_experts,
    kind_of,
    weightless,
)
from plprune.architecture.proof import Proof, reads_others
from plprune.architecture.tracing import Found, Inseparable, Reach, Source, Tracer, bit_code, found_in
from plprune.architecture.trials import Fault, Trial, failure, projection_rows
from plprune.architecture.wrappers import in_text_decoder, text_config


class Assembly:
    """Makes the anatomy of a block from the units of its consumers.

    Args:
        model: From :func:`weightless`.
        call: Of the block.
        norms: Whether norms multiply by their weights only.
        known: See :class:`Tracer`.
    """

    def __init__(self, model: nn.Module, call: Call, norms: bool, known: dict[Hashable, dict[str, Reach]]) -> None:
        self.model, self.call, self.norms = model, call, norms
        self.probes = Probes(model, norms)
        self.probes.samples = SAMPLES
        with self.probes.standing_in():
            self.block = BlockProbes(self.probes, call)
            with ReadingNoWeights():
                self.called = list(self.block.run())
            self.found, self.inseparable = self._linear(*found_in(Tracer(self.block, known)))
            self._values = {id(f): self._value_rows(f) for f in self.found if not f.elementwise}

    def _linear(self, found: list[Found], others: list[Inseparable]) -> tuple[list[Found], list[Inseparable]]:
        """What was found, without the units of consumers whose inputs are not one row per token."""
        kept, others = [], list(others)
        for each in found:
            module = self.block.block.get_submodule(each.consumer)
            if multiplies_groups(module):
                others.append(Inseparable(each.consumer, False, "it multiplies groups of its inputs apart"))
            elif each.columns.numel() != width(module, "in_features"):
                others.append(Inseparable(each.consumer, False, "another layer multiplies groups of inputs apart"))
            else:
                kept.append(each)
        return kept, others

    def heads(self) -> Found | None:
        """The units of attention: those with value channels first, then those with most columns."""
        several = [f for f in self.found if not f.elementwise and f.columns.shape[1] > 1]
        several = [f for f in several if len(f.columns) > 1 or not f.inner]
        return max(several, key=lambda f: (self._values[id(f)] is not None, f.columns.numel()), default=None)

    def attention(self, found: Found) -> tuple[Part, Part | None]:
        """The units of attention, and its single value channels."""
        values = self._values[id(found)]
        producers: list[Slice] = []
        for source, index in found.wide.items():
            producers += self._split(found, source, index)
        singles = [self._slice(source, index) for source, index, _ in found.single]
        parameters = [s for s in (*producers, *singles) if not self._projects(s)]
        projections = [s for s in (*producers, *singles) if self._projects(s)]
        projections.sort(key=lambda s: self.called.index(s.path))  # queries first, whatever their names
        part = Part((*parameters, *projections), Slice(found.consumer, found.columns), tied=self.norms)
        if values is None:
            return part, None
        source, index, row = values
        rows = index.flatten()
        columns = torch.stack([(row == r).nonzero().flatten() for r in rows.tolist()])
        return part, Part((Slice(source[0], rows[:, None]),), Slice(found.consumer, columns))

    def ffn(self, mixer: str) -> Part | None:
        """The channels of the widest elementwise consumer outside the mixer."""
        inside = f"{mixer}."
        channels = [f for f in self.found if f.elementwise and not f.consumer.startswith(inside)]
        found = max(channels, key=lambda f: len(f.columns), default=None)
        if found is None:
            return None
        producers = tuple(self._slice(source, index) for source, index, _ in found.single)
        return Part(producers, Slice(found.consumer, found.columns), tied=self.norms)

    def _projects(self, part: Slice) -> bool:
        return part.path in self.block.rows

    def _slice(self, source: Source, index: Tensor) -> Slice:
        name, axis = source
        if axis == 0 and name.endswith(".weight"):
            name = name.removesuffix(".weight")
        return Slice(name, index, axis or 0)

    def _split(self, found: Found, source: Source, index: Tensor) -> list[Slice]:
        """Queries and keys that one projection computes, apart."""
        values = self._values[id(found)]
        if values is not None and values[0] == source:
            queries = found.columns.shape[1] // values[1].shape[1]
            size, rest = divmod(index.shape[1], queries + 1)
            if not rest:
                return [self._slice(source, part) for part in index.split([queries * size, size], dim=1)]
        return [self._slice(source, index)]

    def _value_rows(self, found: Found) -> tuple[Source, Tensor, Tensor] | None:
        """The producer of value channels: each column is proportional to a single row of it, of all tokens."""
        for source, index, row in found.single:
            if (
                source[1] is None
                and (row >= 0).all()
                and self.block.proportional(source[0], index.flatten(), found.consumer)
            ):
                return source, index, row
        return None


def _mixer(*parts: Part) -> str:
    """The path of the smallest module with all projections of some parts."""
    paths = [s.path.split(".")[:-1] for part in parts for s in (*part.producers, part.consumer)]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))
    return ".".join(names[0] for names in shared)


EXPERTS = (
    "{!r} is a mixture of experts that transformers does not run by its interface for experts, so plprune does not "
    "prune it; use a model of another family"
)


def check_supported(config: PreTrainedConfig) -> None:
    """Raises ValueError if plprune cannot prune models with a config, as far as that shows without building one."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind!r} is an encoder-decoder, which plprune does not prune; use a decoder-only model")


# what a block does not depend on: names, numbers of weights outside of blocks, and how weights begin or are stored
APART = ("_name_or_path", "architectures", "dtype", "initializer_range", "tie_word_embeddings", "transformers_version")
APART += ("use_cache", "vocab_size")


def shaping(config: PreTrainedConfig) -> str:
    """A config as text, without what its blocks do not depend on: models alike in the rest have one anatomy."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if k not in APART and not k.endswith("_token_id")}

    return json.dumps(json.loads(config.to_json_string(), object_hook=kept))


def discover(kind: type[PreTrainedModel], config: PreTrainedConfig) -> ModelAnatomy:
    """Finds the decoder blocks of a class of models with a config, and their units."""
    key = kind, shaping(config)
    if key not in _DISCOVERED:
        with alone():
            _DISCOVERED[key] = _discover(kind, config)
    return _DISCOVERED[key]


_DISCOVERED: dict[tuple[type, str], ModelAnatomy] = {}


def _discover(kind: type[PreTrainedModel], config: PreTrainedConfig) -> ModelAnatomy:
    check_supported(config)
    with _running_without_weights(config.model_type):
        model = weightless(kind, config)
    path, blocks = decoder_blocks(model)
    if _other_experts(config, blocks):
        raise ValueError(EXPERTS.format(config.model_type))
    kinds, known = [kind_of(block) for block in blocks], dict[Hashable, dict[str, Reach]]()
    with _running_without_weights(config.model_type):
        calls = _calls(model, path, {kinds.index(each) for each in kinds})
        tried = {i: anatomy(model, call, known) for i, call in calls.items()}
        read = reads_others(
            model, path, {i: tried[n].returned for i, n in enumerate(map(kinds.index, kinds)) if n in tried}
        )
        if _heads_reach_other_blocks(model, path, [tried.get(kinds.index(each), Anatomy()) for each in kinds]):
            tried = {i: _with_shared_heads(each) for i, each in tried.items()}
        proof = Proof(model, path)
        proven = proof.proven(tried, [kinds.index(each) for each in kinds])
        anatomies = {kinds[i]: each for i, each in proven.items()}
    if read:
        raise ValueError(
            f"the blocks of a {config.model_type!r} model {read}, so they cannot run one by one: use a model of "
            "another family"
        )
    search, called = experts.Search(model, path), {kinds[i]: call for i, call in calls.items()}
    anatomies = {
        each: _with_experts(anatomies.get(each, Anatomy()), search, kinds.index(each), called.get(each))
        for each in dict.fromkeys(kinds)
    }
    with _running_without_weights(config.model_type):
        whole = {i: _with_whole_ffn(model, call, anatomies[kinds[i]]) for i, call in calls.items()}
        anatomies |= {kinds[i]: each for i, each in proof.whole_ffns(whole).items()}
    found = [anatomies[each] for each in kinds]
    if not any(each.attention or each.ffn or each.experts for each in anatomies.values()):
        reasons = [why for each in anatomies.values() for why in (*each.whole.values(), *each.refused.values())]
        raise ValueError(
            f"the blocks of a {config.model_type!r} model have no heads or FFN channels that can leave one by one"
            f"{''.join(f' ({each})' for each in dict.fromkeys(reasons))}: use a model of another family"
        )
    return ModelAnatomy(path, tuple(found))


def _other_experts(config: PreTrainedConfig, blocks: nn.Module) -> bool:
    """Whether blocks have experts that are not on transformers' interface for them."""
    found = [module for module in blocks.modules() if is_experts(module)]
    others = (m for m in blocks.modules() if not is_projection(m) and not isinstance(m, nn.Conv1d))
    large = any(p.ndim > 1 and p.numel() > SMALL >> 10 for m in others for p in m.parameters(recurse=False))
    return not all(map(has_interface, found)) or (_says_experts(config) and large and not found)


def _says_experts(config: PreTrainedConfig) -> bool:
    own = text_config(config)
    return any(getattr(own, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def _with_experts(each: Anatomy, search: experts.Search, index: int, call: Call | None) -> Anatomy:
    try:
        return dataclasses.replace(each, experts=search.experts(index, call))
    except experts.Unlike as why:
        return dataclasses.replace(each, whole={**each.whole, "expert": str(why)})


def _with_whole_ffn(model: nn.Module, call: Call, each: Anatomy) -> Anatomy:
    """The anatomy with the sub-block of the FFN, or of the experts, if zeros can stand in for it."""
    parts = [part for part in (each.ffn, each.experts and each.experts.units) if part]
    consumers = [each.ffn.consumer.path] if each.ffn else []  # experts stand in as zeros anyhow
    if not parts or not (path := _mixer(*parts)):
        return each
    trial = Trial(model, call, norms=False)
    lengths = [n for n in (0, 2) if trial.removable(path, NoFFN(n), consumers)]
    return dataclasses.replace(each, whole_ffn=SubBlock(path, lengths[0])) if lengths else each


def _with_shared_heads(each: Anatomy) -> Anatomy:
    if each.attention is not None:
        each = each.keeping(
            "attention", f"{each.attention.consumer.path}, as blocks read the keys and values of others"
        )
    return dataclasses.replace(each, mixer="")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """For models without weights: makes new tensors on the CPU in float64, and gives the random numbers back."""
    there, before = torch.get_default_device() == torch.device("cpu"), torch.get_default_dtype()
    cpu = contextlib.nullcontext() if there else torch.device("cpu")  # it doubles the time
    torch.set_default_dtype(torch.float64)
    try:
        with cpu, torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _running_without_weights(family: str) -> Iterator[None]:
    """Turns any error of the model's own code into one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"plprune cannot see how the blocks of a {family!r} model work, as it fails without its weights"
            f"{_place(error)} ({failure(error)}): use a model of another family"
        ) from error


def _place(error: Exception) -> str:
    """Where in the code of models an error was raised, in words."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "modeling_" in frame.filename]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line}" if frames else ""


def _heads_reach_other_blocks(model: PreTrainedModel, path: str, anatomies: Sequence[Anatomy]) -> bool:
    """Whether blocks read the heads of others other than through hidden states, as where they share keys and values.

    In each sample, the heads of some blocks are disturbed: those whose index has a certain bit, or lacks it. Any two
    blocks differ in one of these.
    """
    code = bit_code(len(anatomies))
    disturbed = torch.cat([code, ~code], 1)  # [blocks, samples - 1]
    probes = Probes(model)
    probes.samples = 1 + disturbed.shape[1]
    for index, each in enumerate(anatomies):
        if each.attention is not None:
            block = model.get_submodule(f"{path}.{index}")
            for part in each.attention.producers:
                if rows := projection_rows(block, part.path):
                    probes.disturb(f"{path}.{index}.{part.path}", disturbed[index][:, None].expand(-1, rows))
    probes.seen = changed = _Changed(probes.samples)
    with probes.standing_in():
        model(input_ids=torch.ones(probes.samples, 2, dtype=torch.long), use_cache=False)
    inside = [(name.removeprefix(f"{path}."), hits) for name, hits in changed.items() if name.startswith(f"{path}.")]
    return any((hits & ~disturbed[int(name.partition(".")[0])]).any() for name, hits in inside)


class _Changed(dict[str, Tensor]):
    """Keeps of each input only in which samples it differs from the first, [samples - 1], as a model has many.

    Args:
        samples: Of a batch.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples

    def __setitem__(self, path: str, x: Tensor) -> None:
        x = x.reshape(self.samples, -1, x.shape[-1])
        super().__setitem__(path, differs(x[1:], x[:1], 1e-5).any(1))  # some compute softmax in float32


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks: as long as the config says, and the largest of those."""
    config = text_config(model.config)
    depth = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", None)
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    lists = [(n, m) for n, m in lists if in_text_decoder(model, n)] or lists  # a tower may be as deep
    if not lists:
        some = f"list of {depth} decoder blocks" if depth else "one list of decoder blocks"
        raise ValueError(f"{config.model_type!r} has no {some}, so plprune cannot prune it")
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def anatomy(model: nn.Module, call: Call, known: dict[Hashable, dict[str, Reach]]) -> Anatomy:
    """The units of one block; for `known` see :class:`Tracer`."""
    attention, values, mixer, ffn = None, None, "", None
    for norms in (False, True):
        assembly = Assembly(model, call, norms, known)
        heads = assembly.heads()
        if heads is not None and (attention is None or len(heads.columns) > len(attention)):
            attention, values = assembly.attention(heads)
            mixer = _mixer(attention)
        ffn = ffn or assembly.ffn(mixer)
        tied = [f.consumer for f in assembly.found if len(f.columns) == 1]
        heads_tied = attention is None or attention.consumer.path in tied
        if not (heads_tied and tied) and (ffn or all(c.startswith(f"{mixer}.") for c in tied)):
            break
    found = Anatomy(attention, values, ffn, mixer, assembly.block.returned, whole=_whole(assembly, attention, ffn))
    for kind, part, inside in (("attention", attention, mixer), ("ffn", ffn, "")):
        if part is not None:
            found = _tried(found, kind, Trial(model, call, part.tied), part, inside)
    if found.attention is None:
        return found
    droppable = Trial(model, call, found.attention.tied).droppable(found.attention, mixer)
    return dataclasses.replace(found, droppable=droppable)


def _tried(found: Anatomy, kind: str, trial: Trial, part: Part, inside: str) -> Anatomy:
    """The anatomy with the attributes that must change with the number of units; without these units if they fail."""
    counts = trial.counts(part, inside)
    if not isinstance(counts, Fault):
        return dataclasses.replace(found, **{kind: dataclasses.replace(part, counts=counts)})
    consumer = part.consumer.path
    if not (argument := trial.passed(part, inside)):
        return found.refusing(kind, f"{consumer}, as {counts.said}")
    return found.keeping(kind, f"{consumer}, as the model passes `{argument}` for all {len(part)} units")


def _whole(assembly: Assembly, attention: Part | None, ffn: Part | None) -> dict[str, str]:
    """The kinds of units that a block has none of, and why."""
    reasons: dict[str, str] = {}
    for each in assembly.inseparable:
        if (ffn if each.elementwise else attention) is None:
            reasons.setdefault("ffn" if each.elementwise else "attention", f"{each.consumer}, as {each.why}")
    return reasons


def _calls(model: PreTrainedModel, path: str, indices: set[int]) -> dict[int, Call]:
    """How the model calls some of its blocks."""
    calls: dict[int, Call] = {}

    class Done(Exception):
        pass

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[index] = Call(f"{path}.{index}", args, kwargs)
            if len(calls) == len(indices):
                raise Done

        return hook

    handles = [model.get_submodule(f"{path}.{i}").register_forward_pre_hook(note(i), with_kwargs=True) for i in indices]
    probes = Probes(model)
    probes.samples = SAMPLES
    ids = torch.ones(SAMPLES, TOKENS, dtype=torch.long)
    with probes.standing_in(), contextlib.suppress(Done):
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls
