"""Adapters: where, how large, how strong, and merged for a while."""

import contextlib
import math
import re
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from plprune import FASP, FLAP, LoRA, TwoSSP, prune
from plprune.architecture.blocks import anatomy_of, blocks_of
from plprune.architecture.modules import saved_buffers
from plprune.checkpoint.weights import without_tied
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import adapters, allocate_ranks, base_parameters, inject, merged, merged_state, rank_weights
from tests.builders import FAMILIES, logits, tiny, windows
from tests.zoo import build

every_family = pytest.mark.parametrize("family", FAMILIES)


def adapted(family: str = "llama", lora: LoRA | None = None, *methods: Any) -> PreTrainedModel:
    """A pruned model with adapters that are not zero."""
    model = tiny(family)
    for method in methods or (FASP(0.2),):
        prune(model, method, [windows()])
    inject(model, lora or LoRA(rank=4), plan_of(model))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + noise) if parameter.ndim == 1 else noise  # magnitudes are positive
    return model


def plan(importance: list[float], after: list[int] | None = None) -> PruningPlan:
    count = len(importance)
    return PruningPlan({}, {}, torch.tensor(importance), [100] * count, after or [50] * count, 0, 0.5, "FLAP", {})


@every_family
@pytest.mark.parametrize("by", ["importance", "damage", "uniform"])
def test_the_scale_is_alpha_by_rank_everywhere(family: str, by: Any) -> None:
    model = adapted(family, LoRA(rank=5, alpha=7.0, by=by))
    scales = [scale for _, layer in adapters(model) for scale in layer.scaling.values()]
    assert scales == pytest.approx([7.0 / 5] * len(adapters(model)), rel=1e-12)


@pytest.mark.parametrize("by", ["importance", "uniform"])
def test_the_scale_of_rank_stabilised_adapters_is_alpha_by_the_root_of_the_mean_rank_everywhere(by: Any) -> None:
    model = adapted("llama", LoRA(rank=5, alpha=7.0, by=by, rslora=True))
    scales = [scale for _, layer in adapters(model) for scale in layer.scaling.values()]
    assert scales == pytest.approx([7.0 / math.sqrt(5)] * len(adapters(model)), rel=1e-12)


@every_family
def test_ranks_follow_importance_and_sum_to_the_budget(family: str) -> None:
    model = tiny(family)
    prune(model, FLAP(0.2), [windows()])
    by_block = inject(model, LoRA(rank=6), plan([1.0, 2.0, 6.0]))
    assert by_block == [2, 4, 12]
    for block, rank in zip(blocks_of(model), by_block, strict=True):
        found = {layer.r["default"] for _, layer in adapters(block.module)}
        assert found == {rank}


def test_blocks_beyond_the_ninth_have_their_own_ranks() -> None:
    model = tiny(num_hidden_layers=12)
    by_block = inject(model, LoRA(rank=6), plan([float(i) for i in range(1, 13)]))
    assert len(set(by_block)) > 6
    for block, rank in zip(blocks_of(model), by_block, strict=True):
        assert {layer.r["default"] for _, layer in adapters(block.module)} == {rank}


def test_what_ranks_are_proportional_to() -> None:
    pruned = plan([1.0, 3.0], after=[90, 110])
    assert rank_weights(LoRA(by="importance"), pruned, 2).tolist() == [1.0, 3.0]
    assert rank_weights(LoRA(by="damage"), pruned, 2).tolist() == pytest.approx([0.1, 0.0])
    assert rank_weights(LoRA(by="uniform"), pruned, 2).tolist() == [1.0, 1.0]
    assert rank_weights(LoRA(by="importance"), None, 2).tolist() == [1.0, 1.0]


def test_every_block_has_at_least_rank_1_and_damage_to_none_is_equal_ranks() -> None:
    assert allocate_ranks([1e-9, 1.0, 1.0], 2) == [1, 3, 2]
    assert allocate_ranks([0.0, 0.0, 0.0], 4) == [4, 4, 4]


@every_family
def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(family: str) -> None:
    model = tiny(family)
    blocks = anatomy_of(model).blocks
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n.startswith(blocks)}
    inject(model, LoRA(rank=2), None)
    assert {name for name, _ in adapters(model)} == linears


@every_family
def test_only_adapters_are_trained_in_full_precision(family: str) -> None:
    model = tiny(family).bfloat16()  # type: ignore[operator]
    plan = prune(model, FASP(0.2), [windows()])
    inject(model, LoRA(rank=2), plan)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_autocast_alone_rounds_what_enters_adapters_and_nothing_differs() -> None:
    found = []
    for as_peft in (False, True):
        torch.manual_seed(0)
        model, entered = tiny().bfloat16(), set()
        inject(model, LoRA(rank=2), None)
        for module in model.modules() if as_peft else ():
            module._forward_pre_hooks.clear()
        for _, layer in adapters(model):
            nn.init.normal_(cast(nn.Linear, layer.lora_B["default"]).weight)
            layer.lora_A["default"].register_forward_pre_hook(lambda _, args: entered.add(args[0].dtype))  # noqa: B023
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(windows(2)).logits
        logits.float().square().mean().backward()
        assert entered == {torch.float32 if as_peft else torch.bfloat16}
        found.append([logits] + [p.grad for p in model.parameters() if p.requires_grad])
        assert model(windows(2)).logits.dtype == torch.bfloat16  # without autocast inputs are made float32 as before
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_targets_choose_by_last_name_inside_wrappers_too() -> None:
    model = adapted("llama", LoRA(rank=2, targets=["v_proj", "down_proj"]))
    names = [re.sub(r".*layers\.\d\.", "", name) for name, _ in adapters(model)]
    assert set(names) == {"self_attn.v_proj.linear", "mlp.down_proj"}
    assert len(names) == 6


def test_targets_choose_projections_that_are_stored_transposed() -> None:
    model = adapted("gpt2", LoRA(rank=2, targets=["c_attn"]))
    assert [name for name, _ in adapters(model)] == [f"transformer.h.{i}.attn.c_attn.linear" for i in range(3)]


@every_family
def test_injecting_warns_of_nothing(family: str, recwarn: pytest.WarningsRecorder) -> None:
    adapted(family)
    assert not [str(warning.message) for warning in recwarn if "fan_in" in str(warning.message)]


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"named query or key: see lora\.targets"):
        inject(tiny(), LoRA(targets=["query", "key"]), None)


def test_a_rank_below_1_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 0"):
        LoRA(rank=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_untrained_adapters_change_nothing(dora: bool, dtype: torch.dtype) -> None:
    model = tiny().to(dtype)  # type: ignore[arg-type]
    before = logits(model)
    inject(model, LoRA(rank=4, dora=dora), None)
    assert torch.equal(logits(model), before)


def test_magnitudes_of_rows_of_zeros_are_refused() -> None:
    model = tiny()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[3] = 0.0  # type: ignore[index,operator]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has rows of zeros"):
        inject(model, LoRA(rank=4, dora=True), None)


PEFT = {"dora": LoRA(rank=4, dora=True), "rslora": LoRA(rank=4, rslora=True), "both": LoRA(4, dora=True, rslora=True)}


@pytest.mark.parametrize("name", PEFT)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores its weights transposed
def test_magnitudes_and_other_scales_are_merged_as_peft_does(family: str, name: str) -> None:
    model = adapted(family, PEFT[name])
    expected = logits(model)
    state = dict(merged_state(model, lambda p: p.detach()))
    with merged(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(state[name], value) for name, value in model.named_parameters())
    assert torch.equal(logits(model), expected)
    for path, layer in adapters(model):
        cast(Any, layer).merge()
        torch.testing.assert_close(cast(Any, layer).get_base_layer().weight.detach(), state[f"{path}.weight"])


@every_family
@pytest.mark.parametrize("method", [FASP(0.3), FLAP(0.3), TwoSSP(0.3, drop_attentions=2)])
def test_merged_layers_are_plain_and_give_the_same_logits(family: str, method: Any) -> None:
    model = adapted(family, None, method)
    expected = logits(model)
    base = tiny(family)
    prune(base, method, [windows()])
    assert not torch.allclose(expected, logits(base), atol=1e-3)
    with merged(model):
        assert not adapters(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert {name: p.shape for name, p in model.named_parameters()} == {
            name: p.shape for name, p in base.named_parameters()
        }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_merging_everything_is_as_before_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    layers = dict(adapters(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with contextlib.suppress(KeyboardInterrupt), merged(model):
        assert len(dict(model.named_parameters())) < len(before)
        raise KeyboardInterrupt
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in after)
    assert all(dict(adapters(model))[name] is layer for name, layer in layers.items())
    assert all(p.requires_grad == (".lora_" in name) for name, p in after.items())


@pytest.mark.parametrize("method", [FASP(0.3), FLAP(0.3), TwoSSP(0.3, drop_attentions=2)])
@every_family
def test_merged_state_is_that_of_the_merged_model(family: str, method: Any) -> None:
    model = adapted(family, None, method)
    asked = []
    state = dict(merged_state(model, lambda p: asked.append(p) or p.detach()))
    assert len(asked) == len(list(model.parameters()))  # each once, as all processes must take part
    with merged(model):
        expected = without_tied(model, model.state_dict())
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_base_parameters_are_all_but_the_adapters() -> None:
    model = adapted()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert [name for name, _ in base_parameters(model)] == frozen


def test_a_model_without_adapters_is_merged_already() -> None:
    model = tiny()
    before = logits(model)
    with merged(model):
        assert torch.equal(logits(model), before)


@every_family
def test_gradients_reach_the_adapters_through_gathers_and_scatters(family: str) -> None:
    model = adapted(family, None, FASP(0.3))
    cast(Any, model(input_ids=windows(2), labels=windows(2))).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora_" in name), name


STACKED = {  # gate and up joined; transposed, interleaved and with biases; without a gate
    "mixtral": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "nemotron_h": ["mixer.experts.up_proj", "mixer.experts.down_proj"],
}


def with_experts(family: str, lora: LoRA, implementation: str = "grouped_mm") -> PreTrainedModel:
    """A mixture with adapters that are not zero."""
    model = build(family)
    model.set_experts_implementation(implementation)
    inject(model, lora, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("family", STACKED)
def test_experts_have_adapters_of_their_own(family: str, recwarn: pytest.WarningsRecorder) -> None:
    model, plain = with_experts(family, LoRA(rank=3, alpha=6.0, experts=True, targets=[])), build(family)
    assert not [str(warning.message) for warning in recwarn if "pattern" in str(warning.message)]
    weights = [f"{b.path}.{name}" for b in blocks_of(plain) if b.expert_count for name in STACKED[family]]
    expected = dict(plain.state_dict())
    for name in weights:
        module, _, last = name.rpartition(".")
        (layer,) = [
            each for path, each in adapters(model) if path.startswith(module) and cast(Any, each).parameter_name == last
        ]
        a, b = (cast(nn.Linear, factor["default"]).weight for factor in (layer.lora_A, layer.lora_B))
        for e in range(8):  # rows of A by expert, columns of B by rank
            change = 6.0 / 3 * b[:, e::8].detach() @ a[3 * e : 3 * e + 3].detach()
            expected[name][e] += change.T if family == "gpt_oss" else change
    assert len(adapters(model)) == len(weights)
    state = dict(merged_state(model, lambda p: p.detach()))
    assert state.keys() == {**dict(plain.named_parameters()), **saved_buffers(plain)}.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0 if name not in weights else 1e-6)
    before = logits(model)
    with merged(model):
        assert all(torch.equal(state[name], value) for name, value in model.named_parameters())
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)
    assert torch.equal(logits(model), before)


def test_adapted_experts_compute_alike_in_every_way_and_all_are_trained() -> None:
    gradients = []
    for implementation, checkpointing in (("eager", False), ("grouped_mm", False), ("grouped_mm", True)):
        model = with_experts("mixtral", LoRA(rank=2, experts=True), implementation).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=windows(4), labels=windows(4), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert all(gradient is not None and gradient.any() for gradient in gradients[-1].values())
    assert len(gradients[0]) == 2 * 4 * (4 + 2)  # A and B of attention's layers and of the experts'
    torch.testing.assert_close(gradients[0], gradients[1])
    assert all(torch.equal(gradient, gradients[2][name]) for name, gradient in gradients[1].items())


def test_experts_have_the_rank_of_their_block() -> None:
    model = build("mixtral")
    by_block = inject(model, LoRA(rank=3, experts=True), plan([1.0, 2.0, 2.0, 1.0]))
    assert by_block == [2, 4, 4, 2]
    for block, rank in zip(blocks_of(model), by_block, strict=True):
        assert [layer.r["default"] for _, layer in adapters(block.module)] == [rank] * 6
        assert {layer.scaling["default"] for _, layer in adapters(block.module)} == {32 / 3}


def test_experts_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^dropout is not possible on experts: leave out dropout, or experts$"):
        LoRA(dropout=0.1, experts=True)
    with pytest.raises(ValueError, match=r"^dora is not possible on experts"):
        LoRA(dora=True, experts=True)
    with pytest.raises(ValueError, match=r"no experts to adapt: leave out lora\.experts$"):
        inject(tiny(), LoRA(experts=True), None)


@pytest.mark.parametrize(
    "setting",
    [{"rank": 0}, {"rank": 2**40}, {"alpha": 0.0}, {"alpha": math.nan}, {"dropout": 1.0}, {"targets": []}],
)
def test_settings_that_cannot_be(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} is "):
        LoRA(**setting)
