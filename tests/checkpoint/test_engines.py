"""What programs that serve look at in a folder, read without them: vLLM 0.32 and mlx-lm 0.30."""

import ast
import inspect
import json
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from plprune import CFSP, FASP, FLAP, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture import modeling_plprune
from plprune.architecture.blocks import blocks_of
from plprune.architecture.modeling_plprune import NoAttention
from plprune.export import decilm
from tests.builders import tiny, windows

METHODS = {
    "per block": (CFSP(0.25), "TransformersForCausalLM"),
    "heads and biases": (FLAP(0.25), "TransformersForCausalLM"),
    "gathered": (FASP(0.25), "TransformersForCausalLM"),
    "no attention": (TwoSSP(0.4, drop_attentions=1), "TransformersForCausalLM"),
    "no FFN": (TwoSSP(0.4, drop_ffns=1), "TransformersForCausalLM"),
    "uniform": (TwoSSP(0.2, drop_attentions=0), "LlamaForCausalLM"),
}


def saved(method: Any, folder: Path) -> Any:
    model = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    prune(model, method, list(windows().split(2)))
    save_pruned(model, folder)
    return model


@pytest.mark.parametrize("name", METHODS)
def test_a_folder_names_what_vllm_reads(name: str, tmp_path: Path) -> None:
    method, architecture = METHODS[name]
    saved(method, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [architecture]
    assert ("AutoModel" in config.get("auto_map", {})) == (architecture == "TransformersForCausalLM")
    assert config["rope_theta"] == 5e4  # mlx-lm knows no `rope_parameters`
    files = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"].values()
    assert set(files) == {"model.safetensors"}  # else vLLM takes the plan for weights


def test_the_source_of_a_removed_attention_has_one_call_of_the_interface() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(NoAttention.forward)))
    found = [n.targets[0] for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Subscript)]
    names = [target.id for target in found if isinstance(target, ast.Name)]
    calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert names == ["attend"]
    assert calls.count("attend") == 1


def test_a_removed_attention_has_the_config_of_the_model(tmp_path: Path) -> None:
    model = saved(TwoSSP(0.4, drop_attentions=1), tmp_path / "out")
    (gone,) = [b.part(b.anatomy.mixer) for b in blocks_of(model) if not b.has_attention]
    assert gone.config is model.config


def test_the_config_of_a_decilm_folder_is_read_without_plprune(tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=64, intermediate_size=1024, num_attention_heads=4, num_key_value_heads=2)
    prune(model, CFSP(0.4, multiple_of=256, a=20.0), list(windows().split(2)))
    decilm.write(model, None, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(config).__name__ == "DeciLMConfig"
    widths = [decilm.width_of(block.ffn.ffn_mult, 64) for block in config.block_configs]
    assert widths == [block.channels for block in blocks_of(model)]
    assert [block.attention.no_op for block in config.block_configs] == [False] * 3
    again = type(config).from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_a_folder_of_an_earlier_plprune_loads_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = saved(CFSP(0.25), folder := tmp_path / "out")
    assert torch.equal(load_pruned(folder)(windows()).logits, model(windows()).logits)
    assert not caplog.records
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PrunedForCausalLM"]}))
    (folder / "model.safetensors.index.json").unlink()
    old = folder.rename(tmp_path / "old")
    for _ in range(2):
        assert torch.equal(load_pruned(old)(windows()).logits, model(windows()).logits)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"{old} is of an earlier plprune, and vLLM does not load it: `plprune export {old} --to hf --output OUT` "
        "writes one that it loads"
    )


def test_the_code_of_a_folder_names_the_oldest_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.12.1")
    said = (
        "this pruned model needs transformers 5.13 or newer, and 5.12.1 is installed: pip install 'transformers>=5.13'"
    )
    with pytest.raises(ImportError, match=re.escape(said)):
        runpy.run_path(modeling_plprune.__file__)
