"""Pruning for a place to serve: what the result looks like, and what is refused before any weight is loaded."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, BloomConfig, PreTrainedModel

from plprune import CFSP, FASP, FLAP, Calibration, PruningMethod, PruningPlan, Target, TwoSSP, load_pruned, prune
from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.config_keys import size_keys
from plprune.architecture.modeling_plprune import Gather, Scatter
from plprune.architecture.modules import matrix
from plprune.checkpoint import stock_config
from plprune.checkpoint.load import load_tokenizer
from plprune.cli import main
from plprune.export import decilm, gguf
from plprune.methods import Request
from plprune.planning import serving
from plprune.planning.serving import Runtime
from plprune.pruning.constraints import Constraint
from plprune.pruning.surgery import plan_of
from plprune.streaming import open_streamed, prune_streamed
from tests.builders import FAMILIES, numbers, save_tiny, tiny, windows
from tests.ranks import in_ranks
from tests.wrappers import build as seeing

SPARSITY = 0.3
ALIKE: dict[str, Any] = {  # what leaves all blocks alike, their heads and biases as they were
    "FLAP": (FLAP, {"structure": "UL-MM", "repair": "none"}),
    "FASP": (FASP, {"attention": "none", "bias": False}),
    "CFSP": (CFSP, {"distance": "uniform"}),
    "TwoSSP": (TwoSSP, {"drop_attentions": 0}),
}
RAGGED: dict[str, Any] = {
    "FLAP AL-AM": (FLAP, {}),
    "FLAP AL-MM": (FLAP, {"structure": "AL-MM", "remove_heads": 3}),
    "FLAP UL-MM": (FLAP, {"structure": "UL-MM", "remove_heads": 3}),
    "FLAP UL-UM": (FLAP, {"structure": "UL-UM"}),
    "FASP": (FASP, {"attention": "kv_heads"}),
    "CFSP": (CFSP, {"a": 40.0}),
    "TwoSSP": (TwoSSP, {"drop_attentions": 1}),
}
QUICK = ("llama", "opt", "gpt2", "gemma2")
BY_BLOCK = ("llama", "mistral", "qwen2", "granite")  # which llama.cpp holds with a size of its own for each block


def wide(family: str = "llama", width: int = 1024, **settings: Any) -> PreTrainedModel:
    """A tiny model whose FFN is wide enough for multiples."""
    return tiny(family, **{size_keys(tiny(family))["width"]: width}, **settings)


def pruned(model: PreTrainedModel, which: tuple[Any, dict[str, Any]], *places: Runtime, **more: Any) -> PruningPlan:
    method, settings = which
    return prune(model, method(SPARSITY, **settings), [windows()], serve_on=places, **more)


def sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """The FFN's width and the kv heads of each block, read off the weights."""
    found = []
    for block in blocks_of(model):
        columns = matrix(block.part(block.attention.consumer.path)).shape[1] if block.has_attention else 0
        per_head = block.queries_per_head * block.head_dim if block.has_attention else 1
        found.append((matrix(block.part(block.ffn.consumer.path)).shape[1], columns // per_head))
    return found


def biases(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


def assert_near(plan: PruningPlan, model: PreTrainedModel, multiple: int) -> None:
    """Within half a step of the widths: of one block's, or of all where they are alike."""
    block = blocks_of(model)[0]
    step = multiple * block.cost(block.groups("none")[0])
    alike = len({width for width, _ in sizes(model)}) == 1
    assert abs(plan.reached - SPARSITY) * sum(plan.before) <= step / 2 * (len(plan.before) if alike else 1) + 1
    assert plan.reached > 0


# ---- what the result looks like


@pytest.mark.parametrize("family", BY_BLOCK)
@pytest.mark.parametrize("which", RAGGED)
def test_what_llama_cpp_holds_by_block(which: str, family: str) -> None:
    model = wide(family)
    plan = pruned(model, RAGGED[which], "llama.cpp")
    found = sizes(model)
    assert all(width and width % 32 == 0 for width, _ in found)
    assert found[0][1] > 0
    assert not any(isinstance(module, Gather | Scatter) for module in model.modules())
    assert sum(not kv for _, kv in found) == (which == "TwoSSP")
    assert_near(plan, model, 32)
    assert gguf.refusals(model) == []


@pytest.mark.parametrize("place", ["llama.cpp", "decilm"])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
@pytest.mark.parametrize("which", ALIKE)
def test_what_has_one_size_for_all_blocks(which: str, family: str, place: Runtime) -> None:
    if (family, place) == ("opt", "llama.cpp"):
        with pytest.raises(ValueError, match=r"llama\.cpp has no architecture for 'opt': remove llama.cpp from"):
            pruned(wide(family), ALIKE[which], place)
        return
    model, dense = wide(family), wide(family)
    plan = pruned(model, ALIKE[which], place)
    assert len(set(sizes(model))) == 1
    assert sizes(model)[0][0] % (32 if place == "llama.cpp" else 1) == 0
    assert sizes(model)[0][1] == sizes(dense)[0][1]
    assert biases(model) == biases(dense)
    assert_near(plan, model, 32)
    assert stock_config.stock_config(model) is not None
    if place == "llama.cpp":
        assert set(gguf.refusals(model)) <= set(gguf.refusals(dense))


@pytest.mark.parametrize(
    "which",
    [(FLAP, {"repair": "none"}), (FLAP, {"repair": "none", "sparsity_of": "linears"}), RAGGED["CFSP"],
     RAGGED["TwoSSP"], (CFSP, {"a": 40.0, "multiple_of": 96})],
)  # fmt: skip
def test_what_decilm_holds(which: Any) -> None:
    model = wide(width=4096)
    plan = pruned(model, which, "decilm")
    found = sizes(model)
    assert all(width and width % (768 if "multiple_of" in which[1] else 256) == 0 for width, _ in found)
    assert found[0][1] == 4
    assert {kv for _, kv in found} == ({0, 4} if which[0] is TwoSSP else {4})
    assert not biases(model)
    if "sparsity_of" not in which[1]:
        assert_near(plan, model, 768 if "multiple_of" in which[1] else 256)
    assert decilm.refusals(model) == []


@pytest.mark.parametrize("which", [RAGGED["CFSP"], (FLAP, {"repair": "none"})])
def test_a_family_with_norms_of_queries_has_sizes_by_block_too(which: Any) -> None:
    model = wide("qwen3", tie_word_embeddings=True)
    plan = pruned(model, which, "llama.cpp")
    assert len(set(sizes(model))) > 1
    assert all(width % 32 == 0 for width, _ in sizes(model))
    assert_near(plan, model, 32)
    assert gguf.arch_of(model) == "openelm"


@pytest.mark.parametrize("which", [(FLAP, {"structure": "UL-UM"}), (FASP, {"attention": "kv_heads"})])
def test_heads_of_a_stock_checkpoint_are_as_its_config_allows(which: Any) -> None:
    for family, allowed in {"llama": {8, 4, 2}, "granite": {8, 6, 4, 2}}.items():
        model = wide(family, width=64, hidden_size=64)
        prune(model, which[0](0.45, **which[1]), [windows()], serve_on=["decilm"])
        ((_, kv),) = set(sizes(model))
        assert 2 * kv in allowed - {8}
        assert stock_config.stock_config(model) is not None  # with biases, for which these families have flags


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("which", [RAGGED["FLAP AL-AM"], RAGGED["FASP"]])
def test_devices_share_widths_and_heads(which: Any, devices: int) -> None:
    model = wide(num_attention_heads=12, num_key_value_heads=6, hidden_size=48)
    pruned(model, which, tensor_parallel=devices)
    for width, kv in sizes(model):
        assert width % devices == 0
        assert 2 * kv % devices == 0
        assert kv % devices == 0 or devices % kv == 0


def test_several_places_ask_together() -> None:
    model = wide(width=4096)
    pruned(model, RAGGED["TwoSSP"], "llama.cpp", "decilm", tensor_parallel=2)
    assert all(width % 256 == 0 for width, _ in sizes(model))
    both = Constraint(width_multiple=32, uniform=True) & Constraint(width_multiple=48, first_attention=True)
    assert both == Constraint(width_multiple=96, uniform=True, first_attention=True)
    assert both & Constraint() == Constraint() & both == both


@pytest.mark.parametrize("which", [*RAGGED.values(), (FASP, {}), (CFSP, {"multiple_of": 8})])
def test_transformers_asks_nothing(which: Any) -> None:
    asked: list[list[Runtime]] = [[], ["transformers"]]
    plans = [pruned(tiny(), which, *places) for places in asked]
    assert all(torch.equal(keep, plans[1].keep[name]) for name, keep in plans[0].keep.items())
    assert plans[0].settings | {"serve_on": ["transformers"]} == plans[1].settings


# ---- what is refused


@pytest.mark.parametrize(
    ("method", "place", "said"),
    [
        (FASP(), {"serve_on": ["llama.cpp"]}, "as deci, heads must stay whole: set `attention` to kv_heads$"),
        (FASP(), {"serve_on": ["decilm"]}, "as a stock checkpoint, heads must stay whole: set `attention` to kv_heads"),
        (FASP(), {"tensor_parallel": 2}, "2 devices could not share the result: heads must stay whole: set"),
        (FLAP(), {"serve_on": ["decilm"]}, "set `structure` to UL-UM; as DeciLM, no bias may be added: set `repair`"),
        (FLAP(structure="AL-MM", remove_heads=3, repair="none"), {"serve_on": ["decilm"]},
         "set `structure` to UL-UM; as DeciLM, no head may leave: set `remove_heads` to 0"),
        (CFSP(), {"serve_on": ["ollama"]}, "unknown runtime 'ollama' in `serve_on`: use llama.cpp, vllm, decilm"),
        (CFSP(), {"tensor_parallel": 0}, "tensor_parallel is 0, but must be a number of devices"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_served(method: PruningMethod, place: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request(method, **place)


@pytest.mark.parametrize(
    ("family", "method", "place", "said"),
    [
        ("gemma2", FLAP(structure="UL-UM"), "llama.cpp", "no bias may be added: set `repair` to none"),
        ("qwen3", TwoSSP(drop_attentions=1), "llama.cpp", "no attention may leave: set `drop_attentions`"),
        ("mistral", CFSP(), "decilm", "all blocks must have one width: set `distance` to uniform"),
        ("phi3", FASP(attention="kv_heads", bias=False), "llama.cpp", "set `attention` to none"),
        ("llama", CFSP(), 3, "block 0 has 4 kv heads, but 3 devices can share only 3: change"),
        ("llama", FLAP(), 5, "no number of kv heads of block 0.* suits 5 devices: change `tensor"),
        ("llama", TwoSSP(0.5, drop_attentions=3), "llama.cpp", "the model has 3, of which the first block"),
    ],
)
def test_models_that_cannot_be_served_are_refused_without_weights(
    family: str, method: PruningMethod, place: Any, said: str
) -> None:
    asked = Request(method, tensor_parallel=place) if isinstance(place, int) else Request(method, serve_on=[place])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(wide(family).config)
    with pytest.raises(ValueError, match=said):
        asked.predict_sizes(model)


@pytest.mark.parametrize("method", [CFSP, TwoSSP, FASP])
@pytest.mark.parametrize(
    ("width", "sparsity", "said"),
    [
        (200, 0.25, "width 200 cannot be a multiple of 256, as .*: change them, or pad"),
        (300, 0.0, "sparsity 0.0 is out of reach with .* the nearest is 0.1"),
        (520, 0.25, "sparsity 0.25 is out of reach with .* the nearest is 0.4"),
        (1024, 0.02, "sparsity 0.02 is out of reach with .* the nearest is 0.000; ask for that"),
    ],
)
def test_multiples_that_are_too_coarse(
    method: Any, width: int, sparsity: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(serving.LOAD_PATHS, "decilm", (serving.LoadPath("it", frozenset({"llama"}), Constraint(256)),))
    settings: dict[Any, Any] = {TwoSSP: {"drop_attentions": 0}, FASP: {"attention": "none"}}
    how = method(sparsity, **settings.get(method, {}))
    with pytest.raises(ValueError, match=said):
        Request(how, serve_on=["decilm"]).predict_sizes(wide(width=width, num_hidden_layers=1))


@pytest.mark.parametrize("method", [FASP(0.25), FLAP(0.25)])
def test_vllm_takes_every_size(method: PruningMethod) -> None:
    free, served = wide(), wide()
    prune(free, method, [windows()])
    prune(served, method, [windows()], serve_on=["vllm"])
    assert torch.equal(free(windows()).logits, served(windows()).logits)


def test_llama_cpp_reads_the_text_decoder_of_a_model_that_sees() -> None:
    def conflicts(_: Constraint) -> list[str]:
        return []

    for kind, decoder in (("gemma3", "gemma3_text"), ("gemma4", "gemma4_text"), ("llava", "llama")):
        configs = [seeing(kind).config, CONFIG_MAPPING[decoder]()]
        assert len({serving.constraint(["llama.cpp"], 1, conflicts, config) for config in configs}) == 1
    with pytest.raises(ValueError, match="has no architecture for 'qwen3_vl'"):
        serving.constraint(["llama.cpp"], 1, conflicts, seeing("qwen3_vl").config)


def test_vllm_needs_a_family_whose_attention_can_be_replaced() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="vllm has no architecture for 'bloom': remove vllm from `serve_on`"):
        Request(CFSP(0.2), serve_on=["vllm"]).constraint(model)


def test_a_model_that_was_pruned_for_elsewhere_is_refused() -> None:
    for before, said in {
        TwoSSP(0.5, drop_attentions=3): "its first block has no attention",
        FASP(0.2): "it lacks single value channels",
    }.items():
        model = wide()
        prune(model, before, [windows()])
        with pytest.raises(ValueError, match=f"as {said}: prune the dense model"):
            Request(CFSP(0.2), serve_on=["llama.cpp"]).constraint(model)
    for before, said in {
        FLAP(0.2): "it lacks heads",
        FASP(0.2, attention="none"): "it has biases that its family does not have",
    }.items():
        model = wide()
        prune(model, before, [windows()])
        with pytest.raises(ValueError, match=f"as {said}: prune the dense model"):
            Request(CFSP(0.2), serve_on=["decilm"]).constraint(model)
    model = wide("gemma2")
    prune(model, CFSP(0.2, a=40.0), [windows()])
    with pytest.raises(ValueError, match="as its blocks have different sizes: prune the dense model"):
        Request(CFSP(0.2, distance="uniform"), serve_on=["decilm"]).constraint(model)


@dataclasses.dataclass(frozen=True)
class Nothing(PruningMethod):
    """A method that has not heard of places."""

    sparsity: float = 0.0

    def prune(self, model: PreTrainedModel, batches: Calibration | Iterable[Tensor]) -> PruningPlan:
        raise NotImplementedError


class Free(Nothing):
    """One that can do whatever a place asks."""

    def conflicts(self, constraint: Constraint, blocks: Sequence[Block] | None = None) -> list[str]:
        return []


def test_a_method_that_has_not_heard_of_places_refuses_them() -> None:
    assert Request(Nothing(), serve_on=["transformers"]).constraint(wide()) == Constraint()
    cases: list[dict[str, Any]] = [{"serve_on": ["decilm"]}, {"tensor_parallel": 2}]
    for place in cases:
        with pytest.raises(ValueError, match="Nothing does not know how: leave out `serve_on` and"):
            Request(Nothing(), **place)


def test_what_was_asked_is_the_same_after_a_plan_was_read(tmp_path: Path) -> None:
    request = Request(CFSP(0.2), serve_on=("llama.cpp",), tensor_parallel=2)
    request.prune(wide(), [windows()]).save(tmp_path / "plan.safetensors")
    assert PruningPlan.load(tmp_path / "plan.safetensors").settings == request.settings


def test_settings_are_kept_in_the_form_of_all_plans_so_far() -> None:
    asked = {"target_parameters": None, "target_memory": "8GiB", "target_batch": 1, "target_context": 64}
    asked |= {"sparsity": 0.0, "serve_on": ["decilm"], "tensor_parallel": 1}
    request = Request(Free(), Target(memory="8GiB", context=64), ["decilm"])
    assert json.dumps(request.settings, sort_keys=True) == json.dumps(asked, sort_keys=True)


# ---- from the command line, from disk, by several processes


def test_the_command_line_and_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wide().save_pretrained("model")
    load_tokenizer(save_tiny(tmp_path / "tiny")).save_pretrained("model")
    text = numbers(tmp_path / "text.txt")
    options = ["--serve_on=[llama.cpp,decilm]", "--tensor_parallel=2", "--num_samples=4", "--seq_len=16"]
    main(["prune", "model", "--method=TwoSSP", "--output=out", f"--text={text}", *options])
    method = {"class_path": "TwoSSP"}
    config = {"method": method, "serve_on": ["llama.cpp", "decilm"], "tensor_parallel": 2}
    Path("prune.yaml").write_text(yaml.safe_dump(config))
    main(["prune", "model", "--config=prune.yaml", "--output=yaml", f"--text={text}", *options[2:]])
    for folder in ("out", "yaml"):
        plan = plan_of(load_pruned(folder))
        assert plan is not None
        assert (plan.settings["serve_on"], plan.settings["tensor_parallel"]) == (["llama.cpp", "decilm"], 2)
        assert all(len(keep) % 2 == 0 for keep in plan.keep.values())


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_the_help_tells_of_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for option in ("--target.parameters", "--target.memory", "--serve_on", "--tensor_parallel"):
        assert option in said
    assert "Programs that must load the result: llama.cpp, vllm, decilm (mlx-lm," in said
    assert "Number of devices that will share the result" in said


@pytest.mark.parametrize("method", ["FLAP", "FASP", "CFSP", "TwoSSP", "LearnedGates"])
def test_the_help_of_a_method_tells_of_what_it_has_in_common(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prune", f"--method.help={method}"])
    assert "Regularisation of a restoration" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("which", RAGGED)
def test_a_streamed_model_gives_the_same_plan(which: str, tmp_path: Path) -> None:
    model = wide()
    model.save_pretrained(tmp_path / "model")
    plan = pruned(model, RAGGED[which], "llama.cpp")
    request = Request(RAGGED[which][0](SPARSITY, **RAGGED[which][1]), serve_on=["llama.cpp"])
    streamed = open_streamed(str(tmp_path / "model"))
    again = prune_streamed(streamed, request, Calibration([windows()]), tmp_path / "out")
    assert again.keep.keys() == plan.keep.keys()
    assert all(torch.equal(keep, again.keep[name]) for name, keep in plan.keep.items())


def dropped(places: list[Runtime], count: int = 3) -> list[str]:
    group = dist.group.WORLD if dist.is_initialized() else None
    calibration = Calibration([windows()], group=group)
    plan = prune(wide(num_hidden_layers=4), TwoSSP(0.5, drop_attentions=count), calibration, serve_on=places)
    return [name for name, keep in plan.keep.items() if not len(keep)]


def test_the_first_attention_is_no_candidate() -> None:
    assert "blocks.0.attention" in dropped([])
    assert sorted(dropped(["llama.cpp"])) == ["blocks.1.attention", "blocks.2.attention", "blocks.3.attention"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_processes_share_the_other_candidates() -> None:
    alone = dropped(["llama.cpp"], 2)
    assert in_ranks(dropped, ["llama.cpp"], 2) == [alone, alone]
