"""What every method promises on every family, and on two mixtures of experts.

In the quick suite: every method on llama, one of them on every other family, and, where caches and checkpoints are
concerned, on every variant of a family. All else is slow. Every method runs on both mixtures or is refused there; some
promises are tried with a part of these only.

A method of your own is judged, on every family and variant, by `pytest tests/test_contract.py --method MODULE.CLASS`.
"""

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from plprune import PruningPlan, load_pruned, perplexity, prune, save_pruned
from plprune.architecture.blocks import STEP, Block, UnitGroup, blocks_of
from plprune.architecture.cutting import held
from plprune.architecture.modules import innermost, matrix
from plprune.pruning import surgery
from tests.builders import (
    DEFAULTS,
    FAMILIES,
    MIXTURES,
    NOT_OF_MIXTURES,
    OWN,
    PAIRS,
    REST,
    VARIANTS,
    logits,
    method,
    tiny,
    windows,
)

ALL = [*FAMILIES, *VARIANTS, *MIXTURES]
EVERY = [*itertools.product([*FAMILIES, *VARIANTS], OWN)] if OWN else PAIRS
SPARSITY = 0.25


def pairs(quick_variants: bool, rest: bool = False) -> pytest.MarkDecorator:
    """Parametrises a test over families and methods, and over the rest of the methods on mixtures if asked to."""

    def quick(family: str, name: str) -> bool:
        if family == "llama" or (family in VARIANTS and not quick_variants):
            return family == "llama"
        if family in MIXTURES:
            return (family, name) == ("qwen2_moe", "REAP")
        turns = OWN or DEFAULTS
        return name == turns[ALL.index(family) % len(turns)]

    marked = [pytest.param(*pair, marks=[] if quick(*pair) else pytest.mark.slow) for pair in EVERY]
    marked += [pytest.param(*pair, marks=pytest.mark.slow) for pair in (REST if rest and not OWN else [])]
    return pytest.mark.parametrize(("family", "name"), marked)


every_method = pairs(quick_variants=False)
every_method_and_the_rest = pairs(quick_variants=False, rest=True)
every_method_and_variant = pairs(quick_variants=True)
every_method_variant_and_the_rest = pairs(quick_variants=True, rest=True)
every_family = pytest.mark.parametrize("family", ALL)


@functools.cache
def pruned(family: str, name: str, sparsity: float = SPARSITY, **settings: Any) -> tuple[PreTrainedModel, PruningPlan]:
    """A pruned model, which other tests look at too: none changes it."""
    model = tiny(family, **settings)
    return model, prune(model, method(name, sparsity), list(windows().split(2)))


@every_method_and_the_rest
def test_pruning_changes_the_function_and_keeps_it_finite(family: str, name: str) -> None:
    model, plan = pruned(family, name)
    assert plan.reached > 0
    assert logits(model).isfinite().all()
    assert not torch.allclose(logits(model), logits(tiny(family)))


@every_method_variant_and_the_rest
def test_cached_decoding_equals_the_full_forward_pass(family: str, name: str) -> None:
    model, _ = pruned(family, name)
    ids = windows(2, 12, seed=7)  # longer than any sliding window
    steps = decoded(model, ids, DynamicCache(config=model.config), [1] * 12)
    torch.testing.assert_close(steps, logits(model, ids), rtol=1e-4, atol=2e-5)


@every_method_and_variant
def test_generate_with_cache_equals_generate_without(family: str, name: str) -> None:
    model, _ = pruned(family, name)
    ways: list[dict[str, Any]] = [{"use_cache": True}, {"use_cache": False}, {"cache_implementation": "static"}]
    first, *others = [
        model.generate(windows(2, 5), max_new_tokens=10, do_sample=False, **way)  # type: ignore[operator]
        for way in ways
    ]
    assert all(torch.equal(first, other) for other in others)


@every_family
@pytest.mark.parametrize("block", [0, 1, 2])
def test_an_attention_dropped_anywhere_leaves_every_cache_right(family: str, block: int) -> None:
    model = tiny(family)
    surgery.drop_attention(blocks_of(model)[block])
    ids = windows(2, 13)
    for cache in (DynamicCache(config=model.config), DynamicCache(), StaticCache(model.config, max_cache_len=16)):
        together = decoded(model, ids, cache, [5, 1, 4, 1, 1, 1])
        torch.testing.assert_close(together, logits(model, ids), rtol=1e-4, atol=2e-5)


@every_method_variant_and_the_rest
def test_saving_and_loading_is_bit_exact(family: str, name: str, tmp_path) -> None:
    model, plan = pruned(family, name)
    save_pruned(model, tmp_path / "out")
    again = load_pruned(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    assert surgery.plan_of(again).digest == plan.digest  # type: ignore[union-attr]
    assert shapes(again) == shapes(model)
    text = [m.generate(windows(1, 5), max_new_tokens=8, do_sample=False) for m in (model, again)]  # type: ignore[operator]
    assert torch.equal(*text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_may_be_tied_or_not(family: str, tied: bool, tmp_path) -> None:
    model, _ = pruned(family, "FASP kv_heads", tie_word_embeddings=tied)
    save_pruned(model, tmp_path / "out")
    again = load_pruned(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    inputs, outputs = again.get_input_embeddings(), again.get_output_embeddings()
    assert outputs is not None
    assert (inputs.weight is outputs.weight) == tied


@every_method_and_the_rest
def test_the_plan_alone_rebuilds_the_shapes(family: str, name: str, tmp_path) -> None:
    model, plan = pruned(family, name)
    plan.save(tmp_path / "plan.safetensors")
    other = tiny(family, seed=5)
    surgery.apply(other, PruningPlan.load(tmp_path / "plan.safetensors"))
    assert shapes(other) == shapes(model)
    assert logits(other).isfinite().all()


@every_method
def test_a_pruned_model_can_be_pruned_again_and_saved(family: str, name: str, tmp_path) -> None:
    model, first = pruned(family, name)
    save_pruned(model, tmp_path / "first")
    model = load_pruned(tmp_path / "first")
    second = prune(model, method("FASP kv_heads", 0.15), list(windows().split(2)))
    assert second.previous is not None
    assert second.previous.digest == first.digest
    assert sum(second.before) == sum(first.after)
    save_pruned(model, tmp_path / "second")
    assert torch.equal(logits(load_pruned(tmp_path / "second")), logits(model))


@every_family
def test_value_channels_can_leave_twice_and_heads_after_them(family: str, tmp_path) -> None:
    model = tiny(family)
    for name in ("FASP value_channels", "FASP value_channels", "FLAP AL-AM"):
        prune(model, method(name, 0.15), [windows()])
    save_pruned(model, tmp_path / "out")
    assert torch.equal(logits(load_pruned(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("name", NOT_OF_MIXTURES)
def test_methods_that_count_channels_alike_are_refused_for_mixtures(family: str, name: str) -> None:
    with pytest.raises(ValueError, match="counts all channels alike, and one of experts weighs more: set `structure`"):
        prune(tiny(family), method(name), [windows()])


@every_method_and_the_rest
def test_the_budget_is_met_within_one_unit(family: str, name: str) -> None:
    unit = {group.kind: cost for group, cost in units(tiny(family))}
    unit["ffn"] = max(unit.get("ffn", 0), STEP * unit.get("expert_channel", 0))
    model, plan = pruned(family, name)
    off = sum(plan.before) - sum(plan.after) - SPARSITY * sum(plan.before)
    blocks = len(plan.before)
    if "UL-UM" in name and family not in MIXTURES:  # rounds down by up to a head and a channel in every block
        assert -blocks * (unit["attention"] + unit["ffn"]) <= off <= 0
    elif "UL-MM" in name:  # a given number of heads, and the same number of channels everywhere, rounded down
        assert -blocks * unit["ffn"] <= off <= 0
    elif name.startswith(("FLAP", "CFSP", "LearnedGates")):  # widths are free: one unit in all
        bound = "attention" if "AL-AM" in name or name in ("FLAP restore", "FLAP experts") else "ffn"
        assert abs(off) <= unit[bound]
    elif name == "REAP":  # the same number of experts everywhere
        assert abs(off) <= blocks * unit["expert"] * 0.51
    else:  # the same width everywhere: half a channel in every block
        assert abs(off) <= blocks * unit["ffn"] * 0.51 + blocks
    assert sum(plan.after) == sum(b.parameters() for b in blocks_of(model))


@every_method
def test_no_block_loses_its_last_unit(family: str, name: str) -> None:
    model, plan = pruned(family, name, 0.3 if "UL" in name or "MM" in name else 0.5)
    how = plan.origin["best"]["method"] if name == "BestOf" else plan.method
    for group, keep in plan.keep.items():
        assert len(keep) or (how == "TwoSSP" and group.endswith("attention"))
        assert (keep.diff() > 0).all()
        assert keep.shape[-1] <= plan.sizes[group]
    assert logits(model).isfinite().all()


@every_method
def test_sparsity_0_is_the_identity(family: str, name: str) -> None:
    if "MM" in name:
        pytest.skip("removes a given number of heads")
    model, plan = pruned(family, name, 0.0)
    assert plan.reached == 0
    assert torch.equal(logits(model), logits(tiny(family)))


@every_method
def test_the_same_text_gives_the_same_plan_whatever_the_batch_size(family: str, name: str) -> None:
    _, twos = pruned(family, name)
    again, ones, fours = (prune(tiny(family), method(name, 0.25), list(windows().split(n))) for n in (2, 1, 4))
    for plan in (ones, fours):
        assert plan.keep.keys() == twos.keep.keys()
        assert all(torch.equal(plan.keep[g], twos.keep[g]) for g in plan.keep)
        torch.testing.assert_close(plan.importance, twos.importance)
    assert again.digest == twos.digest


@every_method
def test_importance_is_one_positive_number_a_block(family: str, name: str) -> None:
    _, plan = pruned(family, name)
    assert plan.importance.shape == (len(plan.before),)
    assert (plan.importance > 0).all()


@every_method
def test_permuting_the_units_permutes_the_plan_and_not_the_function(family: str, name: str) -> None:
    model, plan = pruned(family, name)
    other, orders = tiny(family), {}
    for block in blocks_of(other):
        for group in [*block.groups(), *([block.expert_units()] if block.expert_count else [])]:
            orders[group.name] = permute(block, group)
    torch.testing.assert_close(logits(other), logits(tiny(family)), rtol=1e-4, atol=1e-4)
    moved = prune(other, method(name, 0.25), list(windows().split(2)))
    for group, order in orders.items():
        if group in plan.keep:
            found = order[moved.keep[group]].sort().values
            if group.endswith("_channel"):
                experts = group.removesuffix("_channel")
                found = found[orders[experts][moved.keep.get(experts, slice(None))].argsort()]
            assert torch.equal(found, plan.keep[group])
    assert perplexity(other, [windows()]) == pytest.approx(perplexity(model, [windows()]), rel=1e-3)


def decoded(model: PreTrainedModel, ids: Tensor, cache: Any, steps: list[int]) -> Tensor:  # [b, s, vocabulary]
    """The logits of a sequence that is read in steps of these lengths, through a cache."""
    with torch.no_grad():
        return torch.cat([model(input_ids=x, past_key_values=cache).logits for x in ids.split(steps, dim=1)], 1)


def permute(block: Block, group: UnitGroup) -> Tensor:
    """Shuffles the units of a group within a dense block: unit i is then what unit order[i] was."""
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(len(group)))
    parts = (*group.producers, *([group.consumer] if group.kind.startswith("expert") else []))
    stacked = [(part, held(block.module, part.path)) for part in parts]
    for part, tensor in stacked:
        if tensor is not None:
            rows, moved = part.index.flatten(), part.index[order].flatten()
            tensor.data.index_copy_(part.axis, rows, tensor.data.index_select(part.axis, moved))
    if parts != group.producers:
        return order
    for part in (part for part, tensor in stacked if tensor is None):
        linear = block.part(part.path)
        bias = getattr(innermost(linear), "bias", None)
        for tensor in (matrix(linear).data, *([] if bias is None else [bias.data])):
            tensor[part.index.flatten()] = tensor[part.index[order].flatten()]
    weight, columns = matrix(block.part(group.consumer.path)).data, group.consumer.index
    weight[:, columns.flatten()] = weight[:, columns[order].flatten()]
    return order


def units(model: PreTrainedModel) -> list[tuple[UnitGroup, int]]:
    return [(group, block.cost(group)) for block in blocks_of(model)[:1] for group in block.all_groups]


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
