"""The blocks one by one against the whole model at once."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from plprune import prune
from plprune.architecture.blocks import Block, blocks_of
from plprune.pruning.calibration import Calibration, Observations
from plprune.pruning.forward import checksums, evaluating, logits_from, record_inputs, run_block, same_values
from plprune.pruning.observations import load, save, survey
from plprune.pruning.statistics import BlockInfluence, Gram, Moments, Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import drop_attention
from tests.builders import DEFAULTS, FAMILIES, METHODS, REPAIRED, logits, method, tiny, windows
from tests.zoo import build

every_family = pytest.mark.parametrize("family", FAMILIES)


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What enters each block, and what leaves the last one, of a forward pass of the whole model."""
    entering: list[Tensor] = []
    layers = [block.module for block in blocks_of(model)]

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entering.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        entering.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    leaving = layers[-1].register_forward_hook(leave)
    model(input_ids=ids, use_cache=False)
    for hook in [*hooks, leaving]:
        hook.remove()
    return entering


def streamed(model: PreTrainedModel, batches: list[Tensor]) -> list[list[Tensor]]:
    """What enters each block, by batch."""
    return [list(inputs.hidden) for _, inputs in stream(model, batches)]


def counting(model: PreTrainedModel) -> list[int]:
    """Counts how often each block is run."""
    counts = [0] * 3

    def count(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[index] += 1

        return hook

    for block in blocks_of(model):
        block.part(block.ffn.consumer.path).register_forward_hook(count(block.index))
    return counts


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_block_sees_what_the_model_gives_it(family: str, attention: str) -> None:
    model = tiny(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("the family has no such attention")
    model.set_attn_implementation(attention)
    batches = [windows(2), windows(3, 11, seed=2)]
    seen = streamed(model, batches)
    for i, ids in enumerate(batches):
        for block, expected in zip(seen, hidden_states(model, ids), strict=False):
            assert torch.equal(block[i], expected)


@every_family
def test_what_is_observed_is_what_hooks_on_the_whole_model_see(family: str) -> None:
    model, batches = tiny(family), [windows(2), windows(3, 11, seed=2)]
    inputs: dict[str, list[Tensor]] = {}

    def keep_in(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0].flatten(0, -2))

    hooks = [
        block.part(group.consumer.path).register_forward_pre_hook(keep_in(group.name))
        for block in blocks_of(model)
        for group in block.groups()
    ]
    states = [hidden_states(model, ids) for ids in batches]
    for hook in hooks:
        hook.remove()
    for block, entering in stream(model, batches):
        for group, moments in observe(block, entering, Moments):
            x = torch.cat(inputs[group.name]).double()
            torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(moments.variance, x.var(0), rtol=1e-5, atol=1e-12)
        influence = BlockInfluence()
        for state in states:
            influence.update(state[block.index], state[block.index + 1])
        assert entering.influence.distance("angular") == pytest.approx(influence.distance("angular"), rel=1e-6)


@every_family
def test_samples_are_told_apart_where_the_family_flattens_them(family: str) -> None:
    together, alone = [], []
    for results, batches in ((together, [windows(4)]), (alone, list(windows(4).split(1)))):
        for block, inputs in stream(tiny(family), batches):
            results += [norms.mean for _, norms in observe(block, inputs, Norms)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def zero_in_place(block: Block) -> None:
    with torch.no_grad():
        cast(Any, block.part("mlp.down_proj")).weight.zero_()


def zero_through_data(block: Block) -> None:
    cast(Any, block.part("mlp.down_proj")).weight.data[:, :24] = 0


def replace_parameter(block: Block) -> None:
    cast(Any, block.part("mlp.down_proj")).weight = nn.Parameter(torch.zeros(32, 48))


def add_bias(block: Block) -> None:
    cast(Any, block.part("mlp.down_proj")).bias = nn.Parameter(torch.ones(32))


@pytest.mark.parametrize("change", [zero_in_place, zero_through_data, replace_parameter, add_bias, drop_attention])
@pytest.mark.parametrize("observing", [True, False])
def test_a_change_is_seen_by_all_that_follows(change: Callable[[Block], None], observing: bool) -> None:
    model, ids, seen = tiny(), windows(2), []
    before = hidden_states(model, ids)
    for block, inputs in stream(model, [ids]):
        seen.append(inputs.hidden[0])
        if observing:
            observe(block, inputs, Norms)
        if block.index == 0:
            change(block)
    after = hidden_states(model, ids)
    assert not torch.allclose(before[1], after[1])
    assert all(torch.equal(a, b) for a, b in zip(seen, after, strict=False))


@pytest.mark.parametrize("observing", [True, False])
def test_a_block_is_run_once_and_again_only_if_it_was_changed(observing: bool) -> None:
    for change, runs in ((lambda _: None, [1, 1, 1]), (zero_in_place, [2, 2, 1])):
        model = tiny()
        counts = counting(model)
        for block, inputs in stream(model, [windows(2)]):
            if observing:
                observe(block, inputs, Norms)
            change(block)
        assert counts == (runs if observing else [1, 1, 0])


def test_observing_again_sees_the_changed_block() -> None:
    model = tiny()
    block, inputs = next(iter(stream(model, [windows(2)])))
    ((_, _), (_, before)) = observe(block, inputs, Norms)
    cast(Any, block.part("mlp.up_proj")).weight.data.mul_(2)
    ((_, _), (_, after)) = observe(block, inputs, Norms)
    torch.testing.assert_close(after.pooled, 2 * before.pooled)


@pytest.mark.slow
def test_several_hidden_states_of_a_token_are_no_samples() -> None:
    model, ids = build("deepseek_v4"), windows(4, 6)
    seen: dict[int, Any] = {}

    def note(index: int) -> Any:
        return lambda _, args: seen.update({index: args[0]})

    parts = {block.index: block.part(block.ffn.consumer.path) for block in blocks_of(model)}
    handles = [part.register_forward_pre_hook(note(index)) for index, part in parts.items()]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    for block, inputs in stream(model, list(ids.split(2))):
        (group, found), *_ = observe(block, inputs, Moments)
        x = seen[block.index].reshape(24, -1).double()
        assert (group.kind, found.count) == ("ffn", 24)
        torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.variance, x.var(0), rtol=1e-3, atol=1e-9)


@every_family
def test_finish_gives_the_models_logits(family: str) -> None:
    model, ids = tiny(family), windows(2)
    hidden, calls = record_inputs(model, ids)
    with torch.no_grad():
        for block in blocks_of(model):
            hidden = run_block(block, hidden, calls[block.index])
        assert torch.equal(logits_from(model, ids, hidden), model(input_ids=ids).logits)


@every_family
def test_nothing_of_calibration_asks_for_gradients(family: str) -> None:
    model = tiny(family)
    for block, inputs in stream(model, [windows(2)]):
        observe(block, inputs, Gram)
        assert not any(x.requires_grad for x in [*inputs.hidden, *inputs.outputs()])


def traces(model: PreTrainedModel) -> list[tuple[Any, ...]]:
    return [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"))
        for m in model.modules()
    ]


def to_the_end(model: PreTrainedModel) -> None:
    for block, inputs in stream(model, [windows(2)]):
        observe(block, inputs, Norms)


def early_break(model: PreTrainedModel) -> None:
    for block, inputs in stream(model, [windows(2)]):
        observe(block, inputs, Norms)
        break


def error_in_the_loop(model: PreTrainedModel) -> None:
    for _ in stream(model, [windows(2)]):
        raise RuntimeError("in the loop")


def error_in_a_statistic(model: PreTrainedModel) -> None:
    class Broken(Norms):
        def update(self, x: Tensor) -> None:
            raise RuntimeError("in a statistic")

    for block, inputs in stream(model, [windows(2)]):
        observe(block, inputs, Broken)


def error_in_the_model(model: PreTrainedModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the model")

    handle = model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        for _ in stream(model, [windows(2)]):
            pass
    finally:
        handle.remove()


def error_while_finishing(model: PreTrainedModel) -> None:
    logits_from(model, windows(2), torch.zeros(2, 16, 5))


@pytest.mark.parametrize(
    ("walk", "outcome"),
    [
        (to_the_end, contextlib.nullcontext()),
        (early_break, contextlib.nullcontext()),
        (error_in_the_loop, pytest.raises(RuntimeError, match="in the loop")),
        (error_in_a_statistic, pytest.raises(RuntimeError, match="in a statistic")),
        (error_in_the_model, pytest.raises(RuntimeError, match="in the model")),
        (error_while_finishing, pytest.raises(RuntimeError)),
    ],
)
def test_the_model_is_left_as_it_was(walk: Callable[[PreTrainedModel], None], outcome: Any) -> None:
    model = tiny().train()
    model.get_submodule("model.layers.1.mlp").eval()
    layer = cast(Any, blocks_of(model)[1].module)
    layer.forward = layer.forward  # one that somebody else has put there
    before = traces(model)
    with outcome:
        walk(model)
    assert traces(model) == before


def test_dropout_is_off_during_calibration() -> None:
    model = tiny("opt", dropout=0.5).train()
    for seen, expected in zip(streamed(model, [windows(2)]), streamed(model.eval(), [windows(2)]), strict=True):
        assert torch.equal(seen[0], expected[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_name_the_block(value: float) -> None:
    model = tiny()
    cast(Any, blocks_of(model)[1].part("mlp.down_proj")).weight.data[3, 4] = value
    with pytest.raises(ValueError, match="NaN or infinity in the activations of block 1: load the model in float32"):
        to_the_end(model)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no calibration text"),
        (iter(()), "no calibration text"),
        ([torch.zeros(2, 8)], "integer tensors"),
        ([torch.zeros(8, dtype=torch.long)], "integer tensors"),
        ([windows(2), torch.zeros(1, 2, 8, dtype=torch.long)], "integer tensors"),
        ([{"input_ids": windows(2)}], "integer tensors"),
        (windows(2), "integer tensors"),
    ],
)
def test_what_is_no_calibration_text_is_refused(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(iter(stream(tiny(), batches)))


def test_batches_may_be_any_iterable() -> None:
    def generator() -> Iterator[Tensor]:
        yield from windows(3).split(1)

    assert len(Calibration.of(generator()).batches) == 3
    calibration = Calibration([windows(2)])
    assert Calibration.of(calibration) is calibration
    assert [ids.shape for ids in calibration] == [(2, 16)]


def test_windows_are_the_first_rows_whatever_the_batches() -> None:
    ids = windows(6)
    for size in (1, 4, 6):
        found = Calibration(list(ids.split(size))).windows(5)
        assert torch.equal(torch.cat(found), ids[:5])
        assert [w.shape for w in found] == [(1, 16)] * 5
    assert len(Calibration([ids]).windows(99)) == 6


def test_waiting_on_the_cpu_changes_nothing() -> None:
    results = []
    for offload in (None, "cpu"):
        calibration = Calibration([windows(2), windows(2, seed=5)], torch.device("cpu"), offload)
        model = tiny()
        for block, inputs in stream(model, calibration):
            results += [gram.covariance() for _, gram in observe(block, inputs, Gram)]
            zero_in_place(block)
    half = len(results) // 2
    assert all(torch.equal(a, b) for a, b in zip(results[:half], results[half:], strict=True))


def test_evaluating_is_for_the_time_of_the_context() -> None:
    model = tiny().train()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 16), (7, 5), (6,)])
def test_checksums_see_every_change_of_values(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    module = nn.ParameterDict({"a": torch.randn(shape).to(dtype), "b": torch.zeros(4, 4).to(dtype)})
    before = checksums(module)
    assert same_values(checksums(module), before)
    values = module["a"].data
    changes = [lambda: values.mul_(2), lambda: values.copy_(values.flip(0)), lambda: values[-1:].neg_()]
    for change in changes:
        change()
        assert not same_values(checksums(module), before)
        before = checksums(module)
    module["a"] = nn.Parameter(values[:-1])
    assert not same_values(checksums(module), before)
    del module["b"]
    assert checksums(module).keys() == {"a"}


def test_checksums_are_small() -> None:
    (sums,) = checksums(nn.Linear(512, 512, bias=False)).values()
    assert sums.numel() <= 1024


# ---- what was observed before


def surveyed(family: str = "llama") -> tuple[PreTrainedModel, Calibration, Observations]:
    model, calibration = tiny(family), Calibration([windows(4), windows(2, seed=3)])
    return model, calibration, survey(model, calibration)


KNOWN = [(family, name) for family in ("llama", "phi3", "gpt2") for name in [*METHODS, *REPAIRED]]


@pytest.mark.parametrize(("family", "name"), [*KNOWN, ("qwen2_moe", "CFSP relative"), ("qwen2_moe", "FLAP restore")])
def test_what_is_known_decides_as_what_is_observed(name: str, family: str, tmp_path: Path) -> None:
    _, calibration, known = surveyed(family)
    save(known, tmp_path / "known.safetensors")
    known = load(tmp_path / "known.safetensors", torch.device("cpu"))
    one, other = (tiny(family) for _ in range(2))
    plan = prune(one, method(name), calibration)
    assert prune(other, method(name), replace_known(calibration, known)).digest == plan.digest
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize("name", [name for name in DEFAULTS if name != "LearnedGates"])  # it trains
def test_what_is_known_needs_no_forward_pass(name: str) -> None:
    model, calibration, known = surveyed()
    counts = counting(model)
    prune(model, dataclasses.replace(method(name), **STAGE_ONE.get(name, {})), replace_known(calibration, known))
    fasp = [2 * 2, 2 * 2, 2]  # needs what the pruned prefix gives: observed, and run again once it is pruned
    assert counts == (fasp if name.startswith("FASP") else [0, 0, 0])


def test_what_is_not_known_is_observed_from_there_on() -> None:
    model, calibration, known = surveyed()
    counts, seen = counting(model), []
    for block, inputs in stream(model, replace_known(calibration, known)):
        kind = Moments if block.index == 0 else Gram
        seen += [statistic.mean for _, statistic in observe(block, inputs, kind)]
    assert counts == [2, 2, 2]
    plain = [s.mean for block, inputs in stream(tiny(), calibration) for _, s in observe(block, inputs, Moments)]
    for one, other in zip(seen, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_a_change_is_seen_by_all_that_follows_what_is_known() -> None:
    model, calibration, known = surveyed()
    seen = []
    for block, inputs in stream(model, replace_known(calibration, known)):
        seen.append(observe(block, inputs, Norms)[1][1].mean)
        if block.index == 0:
            zero_in_place(block)
    changed = tiny()
    zero_in_place(blocks_of(changed)[0])
    plain = [observe(block, inputs, Norms)[1][1].mean for block, inputs in stream(changed, calibration)]
    assert torch.equal(seen[1], plain[1])
    assert torch.equal(seen[2], plain[2])


@pytest.mark.parametrize("other", ["model", "text"])
def test_what_is_known_of_something_else_is_not_used(other: str) -> None:
    model, calibration, known = surveyed()
    if other == "model":
        model = tiny(seed=5)
    else:
        calibration = Calibration([windows(4, seed=9)])
    counts = counting(model)
    for block, inputs in stream(model, replace_known(calibration, known)):
        observe(block, inputs, Norms)
    assert min(counts) > 0


def test_a_block_that_was_changed_is_observed_again() -> None:
    model, calibration, known = surveyed()
    block, inputs = next(iter(stream(model, replace_known(calibration, known))))
    ((_, _), (_, before)) = observe(block, inputs, Norms)
    cast(Any, block.part("mlp.up_proj")).weight.data.mul_(2)
    ((_, _), (_, after)) = observe(block, inputs, Norms)
    torch.testing.assert_close(after.pooled, 2 * before.pooled)


def test_a_statistic_of_the_same_name_is_another() -> None:
    own = type("Norms", (Norms,), {})
    model, calibration, known = surveyed()
    block, inputs = next(iter(stream(model, replace_known(calibration, known))))
    assert all(type(statistic) is own for _, statistic in observe(block, inputs, own))


STAGE_ONE = {"TwoSSP": {"drop_attentions": 0}}


def replace_known(calibration: Calibration, known: Observations) -> Calibration:
    return dataclasses.replace(calibration, known=known)
