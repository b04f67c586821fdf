"""Mixtures in the names and tensors of published checkpoints, which programs that serve read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from plprune import CFSP, REAP, load_pruned, prune, save_pruned
from plprune.checkpoint.load import load_model, stored_weights
from plprune.checkpoint.published import published, sources
from plprune.checkpoint.stock_config import skeleton
from plprune.checkpoint.stored import ModelWeights
from tests.builders import logits, windows
from tests.checkpoint.test_stored import configure, in_fp8, rewrite
from tests.zoo import build

HALF = REAP(0.5, sparsity_of="experts")
NAMES = {  # of the gate, up and down projection of an expert, and of the router, as on the hub
    "mixtral": ("block_sparse_moe.experts.{}.{}.weight", ("w1", "w3", "w2"), "block_sparse_moe.gate.weight"),
    "qwen3_moe": ("mlp.experts.{}.{}.weight", ("gate_proj", "up_proj", "down_proj"), "mlp.gate.weight"),
}


def pruned(kind: str, folder: Path, method: object = HALF) -> PreTrainedModel:
    model = build(kind)
    prune(model, method, [windows(4, 12)])  # type: ignore[arg-type]
    save_pruned(model, folder)
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_a_stock_folder_has_the_names_and_tensors_of_the_hub(kind: str, tmp_path: Path) -> None:
    model: Any = pruned(kind, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    template, parts, router = NAMES[kind]
    layers: list[dict[str, Tensor]] = [{} for _ in range(4)]
    for name, tensor in stored.items():
        if name.startswith("model.layers."):
            index, _, rest = name.removeprefix("model.layers.").partition(".")
            layers[int(index)][rest] = tensor
    for found, layer in zip(layers, model.model.layers, strict=True):
        mlp = layer.mlp
        assert torch.equal(found[router], mlp.gate.weight)
        for expert in range(4):
            gate, up, down = (found[template.format(expert, part)] for part in parts)
            assert torch.equal(torch.cat([gate, up]), mlp.experts.gate_up_proj[expert])
            assert torch.equal(down, mlp.experts.down_proj[expert])
        assert sum("experts" in name for name in found) == 12
    for again in (load_pruned(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()):
        assert torch.equal(logits(again), logits(model))


def test_the_number_of_experts_is_there_by_the_name_of_the_hub(tmp_path: Path) -> None:
    pruned("qwen3_moe", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_experts"] == 4


def test_a_folder_with_code_of_its_own_has_the_names_of_the_model(tmp_path: Path) -> None:
    model = pruned("qwen3_moe", tmp_path / "out", CFSP(0.3, a=30.0))
    assert (tmp_path / "out/modeling_plprune.py").exists()
    assert load_file(tmp_path / "out/model.safetensors").keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "lfm2_moe", "deepseek_v3"])
def test_there_and_back_is_the_same(kind: str) -> None:
    model = build(kind)
    state = model.state_dict()
    stored = published(skeleton(model.config), state)
    found = sources(model, {name: tuple(tensor.shape) for name, tensor in stored.items()})
    assert found.keys() == state.keys()
    for name, source in found.items():
        made = source.make(stored.__getitem__)
        assert torch.equal(made, state[name])
        assert source.shape == tuple(made.shape)


def test_experts_in_fp8_are_multiplied_out(tmp_path: Path) -> None:
    save_pruned(build("qwen3_moe"), tmp_path / "in")
    wanted = in_fp8(tmp_path / "in", 20, 20)
    configure(
        tmp_path / "in", quantization_config={"quant_method": "fp8", "weight_block_size": [20, 20]}, dtype="float32"
    )
    model = load_model(str(tmp_path / "in"), "float32")
    state = published(skeleton(model.config), model.state_dict())
    assert state.keys() == wanted.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=0)


def test_a_missing_expert_is_told(tmp_path: Path) -> None:
    pruned("mixtral", tmp_path / "out")

    def without(state: dict[str, Tensor]) -> None:
        del state["model.layers.1.block_sparse_moe.experts.3.w1.weight"]

    rewrite(tmp_path / "out", without)
    with pytest.raises(ValueError, match=r"experts.0.w1.weight is \(96, 64\) on disk and absent by the plan; save"):
        load_pruned(tmp_path / "out")
    model, stored = build("mixtral", num_local_experts=4), stored_weights(str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj is absent in the files"):
        ModelWeights(stored, model, torch.float32)


def test_an_expert_that_differs_on_disk_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(structure: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
        made = published(structure, state)
        return made | {name: 2 * tensor for name, tensor in made.items() if "experts.2.w2" in name}

    monkeypatch.setattr("plprune.checkpoint.save.published", wrong)
    with pytest.raises(OSError, match=r"mlp.experts.down_proj differs between the disk and memory"):
        pruned("mixtral", tmp_path / "out")
    assert not (tmp_path / "out").exists()
