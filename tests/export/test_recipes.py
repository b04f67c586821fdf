"""The page's recipes for quantisation, run by the programs in an environment of their own."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plprune import CFSP, FASP, TwoSSP, prune, save_pruned
from plprune.export import formats
from tests.builders import tokenizer, windows
from tests.zoo import build

PAGE = Path(formats.__file__).with_name("README.md")
RECIPES = re.findall(r"```py\n(.*?)```", PAGE.read_text(), re.S)
IN_4_BITS = [recipe.replace("W8A8", "W4A16") for recipe in RECIPES if "W8A8" in recipe]
READ = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(input_ids=load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits.float()}, sys.argv[3])
"""
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
METHODS = {
    "a width per block": CFSP(0.25, multiple_of=32),
    "gathered": FASP(0.25),
    "no attention": TwoSSP(0.4, drop_attentions=1),
    "multiples of 128": CFSP(0.35, multiple_of=128),
}


def run(program: str, *arguments: object, room: Path) -> None:
    command = [os.environ["PLPRUNE_QUANTISERS"], "-I", "-c", program, *map(str, arguments)]
    own = {"HF_MODULES_CACHE": f"{room}/modules", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | own, cwd=room, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) == 4


@pytest.mark.slow
@pytest.mark.skipif("PLPRUNE_QUANTISERS" not in os.environ, reason="PLPRUNE_QUANTISERS names no Python")
@pytest.mark.parametrize("recipe", [*RECIPES, *IN_4_BITS])
@pytest.mark.parametrize("name", METHODS)
def test_a_pruned_model_is_quantised_like_any_other(name: str, recipe: str, tmp_path: Path) -> None:
    if ("W4A16" in recipe) != (name == "multiples of 128"):
        pytest.skip("these widths are for groups of 128 alone")
    if "PerGroup" in recipe and name != "a width per block":
        pytest.skip("its widths are no multiples of 32")
    model = build("llama", **SIZES | ({"head_dim": 32} if "W4A16" in recipe else {}))
    for i in range(4) if "W4A16" in recipe else ():  # blocks get widths of their own
        model.get_parameter(f"model.layers.{i}.mlp.down_proj.weight").data *= 1 + 2 * i
    prune(model, METHODS[name], list(windows(8, 32).split(2)))
    save_pruned(model, folder := tmp_path / "pruned", tokenizer())
    (tmp_path / "calibration.txt").write_text("\n\n".join(str(list(range(i, i + 64))) for i in range(8)))
    quantised, request, answer = tmp_path / "quantised", tmp_path / "ids", tmp_path / "answer"
    run(recipe.replace("FOLDER", str(folder)).replace("QUANTISED", str(quantised)), room=tmp_path)
    save_file({"ids": windows(2, 24)}, request)
    run(READ, quantised, request, answer, room=tmp_path)
    with torch.no_grad():
        expected = model(input_ids=windows(2, 24)).logits
    error = (load_file(answer)["logits"] - expected).norm() / expected.norm()
    bound = 0.5 if "W4A16" in recipe else 0.25  # 4 bits by groups of 128
    assert 0 < error < bound
    assert size(quantised) < 0.5 * size(folder)
