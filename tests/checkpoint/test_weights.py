"""What is saved is what was judged: heads that are not the embedding, values that are not finite, damaged files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from plprune import CFSP, FASP, FLAP, PruningMethod, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modules import tied
from plprune.checkpoint.load import load_model, load_skeleton, rebuild
from plprune.checkpoint.stored import weight_files
from plprune.checkpoint.weights import INDEX, SINGLE, align, check_saved, listed_files, without_tied
from plprune.export import decilm, gguf
from plprune.methods import Request
from plprune.pruning.calibration import Calibration
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import merged_state
from plprune.streaming import open_streamed, prune_streamed
from tests.builders import logits, save_tiny, tiny, tokenizer, windows

BATCHES = Calibration([windows()])
FAMILIES = {"llama": "lm_head", "gpt2": "lm_head", "gpt_neox": "embed_out", "gemma2": "lm_head"}


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


@pytest.fixture(params=FAMILIES)
def denied(request: Any, tmp_path: Path) -> Path:
    """A folder whose configuration ties the head, and whose weights have another, as merging a tuned head leaves it."""
    folder = Path(save_tiny(tmp_path / "source", request.param, tie_word_embeddings=True))
    model = tiny(request.param, tie_word_embeddings=False, seed=1)
    head = cast_weight(model.get_output_embeddings())
    rewrite(folder / SINGLE, lambda state: state.update({f"{FAMILIES[request.param]}.weight": head.contiguous()}))
    return folder


def cast_weight(module: Any) -> Tensor:
    return module.weight.detach()


def assert_loads(folder: Path, expected: Tensor) -> None:
    """Everyone who reads a folder gets the same logits, and reads that the head is its own."""
    for again in (
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        load_model(str(folder)),
        *([load_pruned(folder)] if (folder / FILE).exists() else []),
    ):
        assert torch.equal(logits(again), expected)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert not tied(load_skeleton(str(folder)))


METHODS: list[Any] = [pytest.param(CFSP(0.0), id="nothing"), pytest.param(FLAP(0.3), id="own code")]


@pytest.mark.parametrize("method", METHODS)
def test_a_head_of_its_own_stays_its_own(denied: Path, method: PruningMethod) -> None:
    before = logits(AutoModelForCausalLM.from_pretrained(denied))
    model = load_model(str(denied))
    assert torch.equal(logits(model), before)
    count = sum(p.numel() for p in load_skeleton(str(denied)).parameters())
    assert count == sum(p.numel() for p in model.parameters())
    plan = prune(model, method, BATCHES, 3)
    assert plan.config["tie_word_embeddings"] is False
    expected = logits(model)
    save_pruned(model, denied.with_name("memory"))
    assert_loads(denied.with_name("memory"), expected)
    prune_streamed(open_streamed(str(denied)), Request(method), BATCHES, denied.with_name("stream"), seed=3)
    assert_loads(denied.with_name("stream"), expected)
    assert PruningPlan.load(denied.with_name("stream")).digest == plan.digest
    save_pruned(rebuild(model, dict(merged_state(model, lambda p: p.detach()))), denied.with_name("fit"))
    assert_loads(denied.with_name("fit"), expected)


def test_a_dense_model_with_a_head_of_its_own_is_saved_so(denied: Path) -> None:
    model = load_model(str(denied))
    expected = logits(model)
    save_pruned(rebuild(model, dict(model.named_parameters())), denied.with_name("again"))
    assert_loads(denied.with_name("again"), expected)


def test_a_pruned_folder_whose_plan_denies_the_head(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    prune(model, FLAP(0.3), BATCHES)
    save_pruned(model, tmp_path)
    head = torch.randn(300, 32)
    rewrite(tmp_path / SINGLE, lambda state: state.update({"lm_head.weight": head}))
    (tmp_path / INDEX).unlink()
    again = load_pruned(tmp_path)
    assert torch.equal(again.lm_head.weight, head)  # type: ignore[union-attr]
    save_pruned(again, tmp_path / "again")
    assert_loads(tmp_path / "again", logits(again))


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_was_made_by_hand_counts_by_its_parameters(
    says: bool, method: PruningMethod, tmp_path: Path
) -> None:
    model: Any = tiny(tie_word_embeddings=says)
    other = nn.Parameter(torch.randn(300, 32)) if says else model.model.embed_tokens.weight
    model.lm_head.weight = other
    plan = prune(model, method, BATCHES)
    save_pruned(rebuild(model, dict(model.named_parameters())), tmp_path / "fit")
    save_pruned(model, tmp_path / "memory")
    assert PruningPlan.load(tmp_path / "memory").digest == plan.digest
    for folder in (tmp_path / "fit", tmp_path / "memory"):
        for again in (load_pruned(folder), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
            assert torch.equal(logits(again), logits(model))
            assert tied(again) is not says


def test_a_head_that_is_neither_tied_nor_there_is_missed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", tie_word_embeddings=False)
    rewrite(tmp_path / "dense" / SINGLE, lambda state: state.pop("lm_head.weight"))
    for load in (load_model, open_streamed):
        with pytest.raises(ValueError, match=r"lm_head\.weight is absent"):
            load(folder)


def test_formats_of_other_programs_go_by_the_parameters(tmp_path: Path) -> None:
    model: Any = tiny(tie_word_embeddings=True, intermediate_size=256)
    model.lm_head.weight = nn.Parameter(torch.randn(300, 32))
    gguf.write(model, tokenizer(), tmp_path / "own.gguf", "f32")
    values = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "own.gguf").tensors}
    assert torch.equal(torch.tensor(values["output.weight"]), model.lm_head.weight)
    decilm.write(model, None, tmp_path / "decilm")
    assert json.loads((tmp_path / "decilm/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(tmp_path / "decilm" / SINGLE)["lm_head.weight"], model.lm_head.weight)


# ---- nothing that is not finite, and nothing that is not as in memory


@pytest.fixture
def pruned() -> PreTrainedModel:
    model = tiny()
    prune(model, FLAP(0.3), BATCHES)
    return model


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_not_saved(pruned: Any, value: float, tmp_path: Path) -> None:
    save_pruned(pruned, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pruned.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    pruned.config.use_cache = False  # anything that would be written anew
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
        save_pruned(pruned, tmp_path / "out", overwrite=True)
    with pytest.raises(ValueError, match=r"is not finite"):
        gguf.write(pruned, tokenizer(), tmp_path / "out.gguf", "f32")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_finite_is_not_saved_by_streaming(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    rewrite(tmp_path / "model" / SINGLE, lambda state: state["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite"):
        prune_streamed(open_streamed(folder), Request(CFSP(0.0)), BATCHES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_f16_does_not_hold(pruned: Any, tmp_path: Path) -> None:
    pruned.lm_head.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"above 65504.* export with --gguf bf16 or f32"):
        gguf.write(pruned, tokenizer(), tmp_path / "out.gguf", "f16")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state["lm_head.weight"].add_(1e-6), "lm_head.weight differs between the disk and memory"),
        (lambda state: state.pop("model.norm.weight"), "model.norm.weight is .* in the weights"),
        (lambda state: state.update({"more.weight": torch.ones(1)}), "no place for more.weight"),
        (lambda state: state.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight is .* in the weights"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused(
    change: Callable[[dict[str, Tensor]], object], reason: str, pruned: PreTrainedModel, tmp_path: Path
) -> None:
    save_pruned(pruned, tmp_path)
    rewrite(tmp_path / SINGLE, change)
    (tmp_path / INDEX).unlink()
    with pytest.raises((OSError, ValueError), match=reason):
        check_saved(tmp_path, pruned, without_tied(pruned, pruned.state_dict()).items())


def test_descriptions_that_are_not_of_the_model_are_refused(pruned: PreTrainedModel, tmp_path: Path) -> None:
    save_pruned(pruned, tmp_path)
    state = without_tied(pruned, pruned.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 299}))
    with pytest.raises(ValueError, match=r"by config\.json and .*: nothing was saved"):
        check_saved(tmp_path, pruned, state.items())
    (tmp_path / "config.json").write_text(json.dumps(config))
    other = tiny()
    plan = prune(other, FLAP(0.4), BATCHES)
    plan.save(tmp_path / FILE, overwrite=True)
    with pytest.raises(ValueError, match=r"by plan\.safetensors and .*: nothing was saved"):
        check_saved(tmp_path, pruned, state.items())


def test_a_writer_that_loses_a_weight_leaves_nothing(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pruned(pruned, tmp_path / "first")
    again, save = load_pruned(tmp_path / "first"), PreTrainedModel.save_pretrained

    def lose(self: Any, folder: Any, *args: Any, state_dict: dict[str, Tensor], **options: Any) -> None:
        save(self, folder, *args, state_dict={k: v for k, v in state_dict.items() if "norm" not in k}, **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lose)
    with pytest.raises(ValueError, match=r"norm\.weight is .* nothing was saved"):
        save_pruned(again, tmp_path / "second")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_adapters_that_are_not_merged_are_not_saved(pruned: PreTrainedModel, tmp_path: Path) -> None:
    blocks_of(pruned)[0].module.register_parameter("lora_A", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"fits no model .*lora_A.* merge the adapters first"):
        save_pruned(pruned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- programs that take all safetensors for weights


def taken(folder: Path) -> Iterator[str]:
    """The files from which vLLM loads weights: those that match, unless there is an index that lacks them."""
    index = folder / INDEX
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else None
    for path in sorted(folder.glob("*.safetensors")):
        if named is None or path.name in named:
            yield path.name


@pytest.mark.parametrize("method", [FASP(0.2, attention="none", bias=False), FLAP(0.3)], ids=["stock", "own code"])
def test_the_plan_is_not_taken_for_weights(method: PruningMethod, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    model = load_model(folder)
    prune(model, method, BATCHES)
    save_pruned(model, tmp_path / "whole")
    save_pruned(model, tmp_path / "sharded", max_shard_size="20KB")
    prune_streamed(open_streamed(folder), Request(method), BATCHES, tmp_path / "streamed")
    for out in (tmp_path / "whole", tmp_path / "sharded", tmp_path / "streamed"):
        files = list(taken(out))
        assert FILE not in files
        assert set(files) == {path.name for path in out.glob("model*.safetensors")}
        names = [name for file in files for name in load_file(out / file)]
        assert sorted(names) == sorted(json.loads((out / INDEX).read_text())["weight_map"])
        again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert torch.equal(logits(again), logits(load_pruned(out)))
    assert plan_of(model)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    assert listed_files(tmp_path) == weight_files(tmp_path) == []
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    assert listed_files(tmp_path) == weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    (tmp_path / SINGLE).touch()
    assert listed_files(tmp_path) == weight_files(tmp_path) == [tmp_path / SINGLE]


def test_tensors_lie_at_multiples_of_64_bytes_and_odd_ones_last(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3), "b": torch.randn(4, 16), "c": torch.randn(5).bfloat16(), "d": torch.randn(32)}
    save_file(tensors, file, metadata={"format": "pt"})
    align(file)
    read = load_file(file)
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    head = file.read_bytes()
    size = int.from_bytes(head[:8], "little")
    places = {
        name: entry["data_offsets"][0] for name, entry in json.loads(head[8 : 8 + size]).items() if name in "abcd"
    }
    assert (8 + size) % 64 == 0
    assert (places["b"] % 64, places["d"] % 64) == (0, 0)
    assert min(places["a"], places["c"]) > max(places["b"], places["d"])
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
