"""2SSP: the paper's numbers, and the second stage against a plain loop over perplexities."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from plprune import CFSP, FLAP, PruningPlan, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import innermost, passing, replaced_forwards
from plprune.commands.plan import predicted
from plprune.methods import Request
from plprune.methods.two_ssp import attentions_to_drop, channels_to_keep
from plprune.planning.sizes import Ledger, pruned_skeleton, structure
from plprune.pruning.surgery import drop_attention, shrink
from plprune.recovery.consumers import consumers
from plprune.report.records import of_plan
from tests.builders import FAMILIES, MIXTURES, logits, tiny, windows
from tests.methods import best, inside_experts, plain_loop, traced
from tests.zoo import build

MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {"blocks": 32, "d": 4096, "kv": 4096, "n": 11008},
    "Mistral-7B": {"blocks": 32, "d": 4096, "kv": 1024, "n": 14336},
    "Qwen2.5-7B": {"blocks": 28, "d": 3584, "kv": 512, "n": 18944, "biased": True},
    "SmolLM2-135M": {"blocks": 30, "d": 576, "kv": 192, "n": 1536},
}
VALUES = [
    ("Llama-2-7B", 0.25, 5, 7744),
    ("Llama-2-7B", 0.375, 9, 6368),
    ("Llama-2-7B", 0.5, 13, 4992),
    ("Mistral-7B", 0.25, 1, 10005),
    ("Mistral-7B", 0.375, 2, 7893),
    ("Mistral-7B", 0.5, 5, 5994),
    ("Qwen2.5-7B", 0.25, 0, 13525),
    ("Qwen2.5-7B", 0.375, 0, 10816),
    ("Qwen2.5-7B", 0.5, 1, 8204),
    ("SmolLM2-135M", 0.25, 2, 1058),
    ("SmolLM2-135M", 0.375, 4, 836),
    ("SmolLM2-135M", 0.5, 8, 648),
]


@pytest.mark.parametrize(("name", "sparsity", "drop", "keep"), VALUES)
def test_the_balance_of_the_stages_is_the_authors(name: str, sparsity: float, drop: int, keep: int) -> None:
    blocks, d, kv, n = (MODELS[name][key] for key in ("blocks", "d", "kv", "n"))
    attention = 2 * d * d + 2 * d * kv + (d + 2 * kv if "biased" in MODELS[name] else 0)
    ffn, total = 3 * d * n, blocks * (attention + 3 * d * n + 2 * d)
    assert attentions_to_drop(sparsity, blocks, attention, ffn) == drop
    assert channels_to_keep(sparsity, blocks, total, attention, ffn, n, drop) == keep


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "SmolLM2-135M"])
def test_the_parameters_that_are_counted_are_those_of_the_real_model(name: str) -> None:
    blocks, d, kv, n = (MODELS[name][key] for key in ("blocks", "d", "kv", "n"))
    hd = 128 if d > 1000 else 64
    sizes = {"hidden_size": d, "intermediate_size": n, "num_hidden_layers": blocks}
    heads = {"num_attention_heads": d // hd, "num_key_value_heads": kv // hd}
    config = CONFIG_MAPPING["qwen2" if "Qwen" in name else "llama"](**sizes, **heads)
    with torch.device("meta"):
        found = blocks_of(AutoModelForCausalLM.from_config(config))
    for _, sparsity, drop, keep in (row for row in VALUES if row[0] == name):
        assert (TwoSSP(sparsity)._attentions(found), TwoSSP(sparsity)._share(found)) == (drop, keep / n)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_stages_together_remove_what_was_asked(family: str) -> None:
    for drop in (0, 1, 2):
        plan = prune(tiny(family), TwoSSP(0.45, drop_attentions=drop), [windows()])
        assert sum(not len(keep) for keep in plan.keep.values()) == drop
        assert plan.reached == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.995}, "out of reach for 2SSP"),
        ({"sparsity": 0.1, "drop_attentions": 3}, "with 3 attentions dropped, each block would keep 72 of 48"),
        ({"sparsity": 0.7, "drop_attentions": 0}, "with 0 attentions dropped, each block would keep -"),
        ({"sparsity": 0.5, "drop_attentions": 4}, "would drop 4 attentions, but the model has 3"),
        ({"sparsity": 0.5, "drop_attentions": -1}, "would drop -1 attentions"),
    ],
)
def test_what_is_out_of_reach_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prune(tiny(), TwoSSP(**settings), [windows()])


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": -1.0}, {"stage2_samples": 0}])
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive `alpha`, and at least one window"):
        TwoSSP(**settings)


def test_a_larger_alpha_drops_more_attention() -> None:
    drops = [attentions_to_drop(0.25, 32, 1.0, 2.0, alpha) for alpha in (0.5, 1.0, 1.5, 3.0, 9.0)]
    assert drops == sorted(drops)
    assert drops[0] < drops[-1]
    assert attentions_to_drop(0.0, 32, 1.0, 2.0) == 0


@pytest.mark.parametrize("sizes", [(6,), (1,) * 6, (4, 2)])
def test_the_channels_with_the_largest_mean_norm_of_a_sample_stay(sizes: tuple[int, ...]) -> None:
    model, ids = tiny(), windows()
    inputs, _ = traced(model, ids)
    for name, keep in prune(model, TwoSSP(0.3, drop_attentions=0), list(ids.split(sizes))).keep.items():
        score = sum(sample.norm(dim=0) for sample in inputs[name]) / 6  # not the norm of all samples together
        assert keep.tolist() == best(torch.as_tensor(score), len(keep))


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "opt"])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_second_stage_drops_what_a_plain_loop_drops(family: str, samples: int) -> None:
    model, ids = tiny(family, num_hidden_layers=6), windows()
    plan = prune(model, TwoSSP(0.5, drop_attentions=4, stage2_samples=samples), list(ids.split(2)))
    first = tiny(family, num_hidden_layers=6)
    for block in blocks_of(first):
        group = block.groups("none")[0]
        gone = list(set(range(len(group))) - set(plan.keep[group.name].tolist()))
        innermost(block.part(group.consumer.path)).weight.data[:, gone] = 0
    dropped = {int(name.split(".")[1]) for name, keep in plan.keep.items() if not len(keep)}
    assert dropped == set(plain_loop(first, ids[:samples], 4))


def test_attentions_that_are_gone_already_are_no_candidates() -> None:
    model = tiny()
    drop_attention(blocks_of(model)[1])
    plan = prune(model, TwoSSP(0.3, drop_attentions=2), [windows()])
    assert [name for name, keep in plan.keep.items() if not len(keep)] != []
    assert not any(block.has_attention for block in blocks_of(model))
    with pytest.raises(ValueError, match="would drop 1 attentions, but the model has 0"):
        prune(model, TwoSSP(0.3, drop_attentions=1), [windows()])


def deep(family: str = "llama") -> Any:
    own = {"n_layer": 5} if family == "gpt2" else {}
    return tiny(family, num_hidden_layers=5, **own)


def perplexity_without(model: Any, gone: list[int], ids: torch.Tensor) -> float:
    """The loss of a model whose blocks `gone` return their input."""
    blocks = [block.module for block in blocks_of(model)]
    forwards = [passing(blocks_of(model)[i].anatomy.returned) for i in gone]
    with replaced_forwards([blocks[i] for i in gone], forwards), torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def by_a_plain_loop(model: Any, plan: PruningPlan, loss: Callable[..., float], ids: torch.Tensor) -> list[int]:
    """The two of five blocks whose absence raises a loss least, one after the other, where FFNs are cut by a plan."""
    for block in blocks_of(model):
        shrink(block, block.groups("none")[0], plan.keep[f"blocks.{block.index}.ffn"])
    gone: list[int] = []
    for _ in range(2):
        rest = [i for i in range(5) if i not in gone]
        gone.append(min(rest, key=lambda i: loss(model, [*gone, i], ids)))
    return gone


def test_blocks_are_dropped_as_a_plain_loop_would() -> None:
    ids, expected = windows(1, 24), deep()
    plan = prune(deep(), TwoSSP(sparsity=0.4, drop_blocks=2), [ids])
    gone = by_a_plain_loop(expected, plan, perplexity_without, ids)
    assert plan.dropped == sorted(gone)


def test_blocks_of_least_influence_are_dropped() -> None:
    ids, model = windows(2, 24), deep()
    model.requires_grad_(False)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
    last: list[torch.Tensor] = []
    handle = blocks_of(model)[-1].module.register_forward_hook(lambda *a: last.append(a[2]))
    model(input_ids=ids)
    handle.remove()
    hidden = [*states, last[0]]
    influence = [float((1 - torch.cosine_similarity(x, y, dim=-1)).mean()) for x, y in itertools.pairwise(hidden)]
    plan = prune(model, TwoSSP(sparsity=0.4, drop_blocks=2, blocks_by="influence"), [ids])
    assert plan.dropped == sorted(sorted(range(5), key=lambda i: influence[i])[:2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_shallower_model_is_stock_and_loads(family: str, tmp_path: Path) -> None:
    model, ids = deep(family), windows(4, 12)
    plan = prune(model, TwoSSP(sparsity=0.5, drop_blocks=2, blocks_by="influence"), list(ids.split(2)))
    assert plan.reached == pytest.approx(0.5, abs=0.01)
    assert [after > 0 for after in plan.after] == [i in plan.remaining for i in range(5)]
    save_pruned(model, tmp_path / "model")
    assert torch.equal(logits(load_pruned(tmp_path / "model")), logits(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(stock) is type(deep(family))
    assert stock.config.num_hidden_layers == 3
    assert torch.equal(logits(stock), logits(model))
    texts = [
        stock.generate(windows(2, 5), max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)  # type: ignore[operator]
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| {plan.dropped[0]} | 0 of" in card


def test_a_shallower_model_is_pruned_again(tmp_path: Path) -> None:
    model, ids = deep(), list(windows(4, 12).split(2))
    first = prune(model, TwoSSP(sparsity=0.45, drop_blocks=2, blocks_by="influence"), ids)
    second = prune(model, FLAP(sparsity=0.2), ids)
    assert len(second.before) == 3
    assert sum(second.before) == sum(first.after)
    save_pruned(model, tmp_path / "model")
    assert torch.equal(logits(load_pruned(tmp_path / "model")), logits(model))
    parts = of_plan(second)["blocks"]
    assert [block["parameters"][1] == 0 for block in parts] == [i in first.dropped for i in range(5)]
    assert [b["kept"]["ffn"][0] for i, b in enumerate(parts) if i in first.remaining] == [
        b.channels for b in blocks_of(model)
    ]


def test_restored_biases_follow_their_blocks(tmp_path: Path) -> None:
    model, ids = deep(), list(windows(4, 24).split(2))
    method = TwoSSP(sparsity=0.5, drop_blocks=1, blocks_by="influence", repair="compensate")
    plan = prune(model, method, ids)
    biases = [name for name, _ in model.named_parameters() if name.endswith("down_proj.bias")]
    assert plan.repaired == biases
    assert len(biases) == 4
    assert [len(consumers(block, plan)) for block in blocks_of(model)] == [1] * 4
    save_pruned(model, tmp_path / "model")
    assert torch.equal(logits(load_pruned(tmp_path / "model")), logits(model))


@pytest.mark.parametrize("by", ["perplexity", "influence"])
def test_sizes_without_blocks_are_predicted(by: Any) -> None:
    method, model = TwoSSP(sparsity=0.5, drop_blocks=2, blocks_by=by, drop_attentions=0), deep()
    cases = method.predict_sizes(model)
    ledger = Ledger(model)
    sizes = [ledger.parameters(case) for case in cases]
    assert sizes == [sum(p.numel() for p in pruned_skeleton(model, case).parameters()) for case in cases]
    prune(model, method, [windows(2, 24)])
    assert sum(p.numel() for p in model.parameters()) in sizes


@pytest.mark.parametrize("by", ["perplexity", "influence"])
def test_the_last_block_with_a_cache_of_keys_stays(by: Any) -> None:
    """Of this hybrid only the third block attends to all earlier tokens; generation counts tokens by its cache."""
    model: Any = build("lfm2_moe")
    assert [block.has_kv_cache for block in blocks_of(model)] == [False, False, True, False]
    plan = prune(model, TwoSSP(0.8, drop_blocks=3, blocks_by=by), [windows(2)])
    assert plan.remaining == [2]
    texts = [model.generate(windows(2, 5), max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)]
    assert torch.equal(*texts)


def test_blocks_that_cannot_leave_are_said() -> None:
    with pytest.raises(ValueError, match="2SSP would drop 5 blocks, but the model has 5"):
        prune(deep(), TwoSSP(sparsity=0.5, drop_blocks=5), [windows()])
    with pytest.raises(ValueError, match="change `sparsity`, `drop_blocks` or `drop_ffns`"):
        prune(deep(), TwoSSP(sparsity=0.2, drop_blocks=2), [windows()])
    with pytest.raises(ValueError, match="`blocks_by` is perplexity or influence"):
        TwoSSP(blocks_by="magnitude")  # type: ignore[arg-type]


def loss_without_ffns(model: Any, gone: list[int], ids: torch.Tensor) -> float:
    """The loss of a model whose FFNs `gone` end in zeros."""
    silent = [block.part("mlp.down_proj") for block in blocks_of(model) if block.index in gone]
    zeros = [lambda x: x.new_zeros(*x.shape[:-1], 32)] * len(silent)
    with replaced_forwards(silent, zeros), torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_whole_ffns_are_dropped_as_a_plain_loop_would() -> None:
    ids, model, expected = windows(1, 24), deep(), deep()
    plan = prune(model, TwoSSP(sparsity=0.45, drop_ffns=2), [ids])
    gone = by_a_plain_loop(expected, plan, loss_without_ffns, ids)
    assert [name for name, keep in plan.keep.items() if not len(keep)] == [f"blocks.{i}.whole_ffn" for i in gone]
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(loss_without_ffns(expected, gone, ids))
    assert plan.reached == pytest.approx(0.45, abs=0.01)
    assert [block.channels for block in blocks_of(model)].count(0) == 2


UNLIKE = ["llama", "gpt2", "phi", "gemma2", "qwen2_moe", "gpt_oss"]  # parallel; norms behind; shared; returns a tuple


@pytest.mark.parametrize("family", UNLIKE)
def test_a_model_without_some_ffns_is_the_same_everywhere(family: str, tmp_path: Path) -> None:
    model, ids = tiny(family), list(windows(4, 24).split(2))
    plan = prune(model, TwoSSP(sparsity=0.4, drop_attentions=1, drop_ffns=1), ids)
    assert plan.reached == pytest.approx(0.4, abs=0.05 if family in MIXTURES else 0.01)  # in steps of 8 channels
    (bare,) = [block.index for block in blocks_of(model) if not block.has_ffn]
    assert plan.after[bare] == sum(p.numel() for p in blocks_of(model)[bare].module.parameters())
    save_pruned(model, tmp_path / "model")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True).eval()
    for again in (load_pruned(tmp_path / "model"), stock):
        assert torch.equal(logits(again), logits(model))
    texts = [
        stock.generate(windows(2, 5), max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    rows = [row for row in (tmp_path / "model" / "README.md").read_text().splitlines() if row.startswith(f"| {bare} ")]
    assert rows[0].endswith("0 of 1 whole FFNs |")
    assert "channels" not in rows[0]
    kept = of_plan(plan)["blocks"][bare]["kept"]
    assert {kept[kind][0] for kind in kept if kind not in ("attention", "value")} == {0}
    again = load_pruned(tmp_path / "model")
    second = prune(again, TwoSSP(sparsity=0.2, drop_attentions=0), ids)
    assert not any(name.startswith(f"blocks.{bare}.") for name in second.keep)
    save_pruned(again, tmp_path / "second")
    assert torch.equal(logits(load_pruned(tmp_path / "second")), logits(again))


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_sizes_without_ffns_are_predicted(family: str) -> None:
    model, method = tiny(family), TwoSSP(sparsity=0.4, drop_ffns=1, drop_attentions=1, repair="compensate")
    ledger, cases = Ledger(model, biased=True), method.predict_sizes(model)
    skeletons = [pruned_skeleton(model, case, biased=True) for case in cases]
    sizes = [ledger.parameters(case) for case in cases]
    assert sizes == [sum(p.numel() for p in each.parameters()) for each in skeletons]
    active = [structure(each, 16).active_parameters for each in skeletons]
    assert [ledger.active_parameters(case) for case in cases] == active
    request = Request(method)
    assert predicted(model, request, request, 16)[0]["without_ffn"] == {"typical": 1, "least": 1, "most": 1}
    prune(model, method, list(windows(4, 24).split(2)))
    assert sum(p.numel() for p in model.parameters()) in sizes


def unequal() -> Any:
    """A model whose blocks have FFNs of unequal widths."""
    model = deep()
    prune(model, CFSP(0.2, a=4.0), [windows(4, 24)])
    assert max(widths := [block.channels for block in blocks_of(model)]) > 1.3 * min(widths)
    return model


@pytest.mark.parametrize(
    "drops",
    [
        {"drop_ffns": 1},
        {"drop_ffns": 1, "drop_attentions": 1},
        {"drop_blocks": 1},
        {"drop_blocks": 1, "blocks_by": "influence"},
        {"drop_blocks": 1, "drop_attentions": 1, "blocks_by": "influence"},
    ],
)
def test_the_sparsity_is_met_whatever_the_sizes_of_what_leaves(drops: dict[str, Any], tmp_path: Path) -> None:
    model, ids, method = unequal(), [windows(4, 24)], TwoSSP(0.35, **drops)
    cases = method.predict_sizes(model)
    parameters = [sum(p.numel() for p in pruned_skeleton(model, case).parameters()) for case in cases]
    plan = prune(model, method, ids)
    half = sum(96 * block.has_ffn for block in blocks_of(model)) / 2 / sum(plan.before)  # of a channel in each FFN
    assert plan.reached == pytest.approx(0.35, abs=half)
    assert max(parameters) - min(parameters) <= 2 * half * sum(plan.before)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    save_pruned(model, tmp_path / "out")
    again = load_pruned(tmp_path / "out")
    assert {name: p.shape for name, p in again.named_parameters()} == shapes
    assert torch.equal(logits(again), logits(model))


def test_channels_that_leave_at_last_are_those_of_the_lowest_scores() -> None:
    model, ids = unequal(), windows(4, 24)
    inputs, _ = traced(model, ids)
    plan = prune(model, TwoSSP(0.35, drop_ffns=1), [ids])
    gone = next(name for name, keep in plan.keep.items() if not len(keep)).split(".")[1]
    for name, keep in plan.keep.items():
        if name.endswith(".ffn") and name.split(".")[1] != gone:
            score = sum(sample.norm(dim=0) for sample in inputs[name])
            assert keep.tolist() == best(torch.as_tensor(score), len(keep))


def test_ffns_that_cannot_leave_are_said() -> None:
    with pytest.raises(ValueError, match="2SSP would drop 3 FFNs, but of the 3 that can leave one must stay"):
        prune(tiny(), TwoSSP(sparsity=0.9, drop_ffns=3), [windows()])
    with pytest.raises(ValueError, match="no FFN of this model is a module of its own"):
        prune(tiny("opt"), TwoSSP(sparsity=0.4, drop_ffns=1), [windows()])
    with pytest.raises(ValueError, match="`drop_ffns` is -1"):
        TwoSSP(drop_ffns=-1)
    with pytest.raises(ValueError, match="no FFN may leave: set `drop_ffns` to 0"):
        prune(tiny(), TwoSSP(sparsity=0.4, drop_ffns=1, drop_attentions=0), [windows()], serve_on=["llama.cpp"])


def test_all_experts_of_a_model_keep_as_many_channels() -> None:
    model, ids = build("mixtral"), windows(4, 64)
    inner = inside_experts(model, ids)
    plan = prune(model, TwoSSP(0.25, drop_attentions=0), list(ids.split(2)))
    assert {tuple(keep.shape) for keep in plan.keep.values()} == {(8, 72)}
    keep = plan.keep["blocks.1.expert_channel"]
    norms = torch.zeros(96, dtype=torch.float64)
    model = build("mixtral")
    for ids_of_one in ids.split(1):  # the norm of each sample
        norms += inside_experts(model, ids_of_one)["blocks.1.expert_channel"][3].norm(dim=0)
    assert keep[3].tolist() == best(norms, 72)
    assert len(inner["blocks.1.expert_channel"][3]) >= 8


def test_a_sparsity_between_the_steps_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="their channels leave in steps of 8: the nearest is"):
        prune(build("mixtral"), TwoSSP(0.04, drop_attentions=0), [windows()])
