"""What plprune saves, transformers loads: with plprune, and without it."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from plprune import load_pruned, prune, save_pruned
from plprune.architecture.modeling_plprune import PrunedModelMixin
from plprune.checkpoint.load import load_model
from plprune.checkpoint.stock_config import stock_config
from tests.builders import FAMILIES, UNLIKE, logits, method, tiny, tokenizer, windows

FOUR = {"FLAP": "FLAP AL-AM", "FASP": "FASP value_channels", "CFSP": "CFSP activation", "TwoSSP": "TwoSSP"}
QUICK = [(family, list(FOUR.values())[i % 4]) for i, family in enumerate(FAMILIES)]  # the slow test below has them all
FOUR_NAMES = pytest.mark.parametrize("name", FOUR.values(), ids=FOUR)


def pruned(family: str, name: str, **settings: Any) -> PreTrainedModel:
    model = tiny(family, **settings)
    prune(model, method(name, 0.25), list(windows().split(2)))
    return model


def strangers(tmp_path: Path, jobs: list[tuple[Path, str]]) -> list[dict[str, Any]]:
    """What another process makes of folders, in which plprune cannot be imported."""
    (tmp_path / "jobs.json").write_text(json.dumps([(str(folder), dtype) for folder, dtype in jobs]))
    script, out = Path(__file__).parents[1] / "stranger.py", tmp_path / "out.pt"
    command = [sys.executable, "-I", str(script), str(tmp_path / "jobs.json"), str(out)]
    alone = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[PreTrainedModel, Path, Any]]:
    """Every family pruned by one of the methods, the folder it was saved to, and what a stranger makes of that."""
    room = tmp_path_factory.mktemp("everything")
    models, folders = [pruned(*case) for case in QUICK], [room / str(i) for i in range(len(QUICK))]
    for model, folder in zip(models, folders, strict=True):
        save_pruned(model, folder, tokenizer())
    read = strangers(room, [(folder, "float32") for folder in folders])
    return dict(zip(QUICK, zip(models, folders, read, strict=True), strict=True))


@pytest.mark.parametrize("case", QUICK, ids=" ".join)
def test_every_result_loads_where_plprune_is_not_installed(case: tuple[str, str], everything: Any) -> None:
    model, folder, found = everything[case]
    text = model.generate(windows(2, 12, seed=7)[:, :5], max_new_tokens=12, do_sample=False)
    assert torch.equal(found["logits"], logits(model))
    assert torch.equal(found["text"], text)
    custom = (folder / "modeling_plprune.py").exists()
    assert found["refused unasked"] == custom == (stock_config(model) is None)
    assert found["class"] == ("Pruned" if custom else "") + type(model).__name__


SHARDED = [*((each, "float32") for each in FAMILIES), *((each, "bfloat16") for each in UNLIKE)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]]:
    """Logits of every family pruned by each method, of the model that is loaded again, and of a stranger's."""
    room, logits_of, jobs = tmp_path_factory.mktemp("sharded"), [], []
    for (family, dtype), name in itertools.product(SHARDED, FOUR.values()):
        model, folder = pruned(family, name, tie_word_embeddings=False), room / str(len(jobs))
        for parameter in model.parameters():  # buffers stay as loading leaves them
            parameter.data = parameter.data.to(getattr(torch, dtype))
        save_pruned(model, folder, tokenizer(), max_shard_size="30KB")
        assert len(list(folder.glob("model*.safetensors"))) > 1
        logits_of.append((logits(model), logits(load_pruned(folder))))
        jobs.append((folder, dtype))
    read = [(*ours, found["logits"]) for ours, found in zip(logits_of, strangers(room, jobs), strict=True)]
    return {case: read[i * len(FOUR) :][: len(FOUR)] for i, case in enumerate(SHARDED)}


@pytest.mark.slow
@pytest.mark.parametrize("case", SHARDED, ids=" ".join)
def test_every_method_loads_in_shards_and_in_bfloat16(case: tuple[str, str], sharded: Any) -> None:
    for ours, again, theirs in sharded[case]:
        assert torch.equal(again, ours)
        assert torch.equal(theirs, ours)


@FOUR_NAMES
@pytest.mark.parametrize("family", ["llama", "opt", "phi3"])
def test_transformers_loads_it_once_plprune_is_imported(family: str, name: str, tmp_path: Path) -> None:
    model = pruned(family, name)
    save_pruned(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    inner = AutoModel.from_pretrained(tmp_path / "out")
    hidden = inner(input_ids=windows(2, 12, seed=7)).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), logits(model))  # type: ignore[operator]


def loaded(tmp_path: Path, name: str = "FLAP AL-AM", family: str = "llama") -> list[PreTrainedModel]:
    """The same model, loaded in two ways."""
    save_pruned(pruned(family, name), tmp_path / "out")
    return [load_pruned(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")]


@FOUR_NAMES
def test_what_was_loaded_can_be_saved_again(name: str, tmp_path: Path) -> None:
    for i, model in enumerate(loaded(tmp_path, name)):
        model.save_pretrained(tmp_path / str(i))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(i))
        assert torch.equal(logits(again), logits(model))


@FOUR_NAMES
def test_what_was_loaded_generates_in_every_way(name: str, tmp_path: Path) -> None:
    for model in loaded(tmp_path, name):
        generate: Any = model.generate
        ids = windows(3, 6)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0  # padded on the left
        ids[0, :3] = 0
        sampled = generate(ids, max_new_tokens=6, do_sample=True)
        beams = generate(ids, max_new_tokens=6, num_beams=3)
        assert sampled.shape[0] == beams.shape[0] == 3
        padded = generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=-1)
        alone = generate(ids[:1, 3:], max_new_tokens=6, do_sample=False, eos_token_id=-1)
        assert torch.equal(padded[0, 6:], alone[0, 3:])
        static = generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
        assert torch.equal(static, generate(ids, max_new_tokens=6, do_sample=False))


@FOUR_NAMES
def test_what_was_loaded_can_be_halved(name: str, tmp_path: Path) -> None:
    for model in loaded(tmp_path, name):
        assert logits(model.half()).dtype == torch.float16
        assert logits(model).isfinite().all()


@pytest.mark.slow
@FOUR_NAMES
def test_what_was_loaded_can_be_compiled(name: str, tmp_path: Path) -> None:
    for model in loaded(tmp_path, name):
        compiled: Any = torch.compile(model)
        torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_a_pruned_model_without_its_plan_is_not_pruned_again(tmp_path: Path) -> None:
    save_pruned(pruned("llama", "FLAP AL-AM"), tmp_path / "out")
    (tmp_path / "out" / "plan.safetensors").unlink()
    model = load_model(str(tmp_path / "out"))
    assert isinstance(model, PrunedModelMixin)
    with pytest.raises(ValueError, match="lacks its plan"):
        prune(model, method("CFSP activation"), [windows()])


def test_a_stock_result_has_zero_biases_only_where_its_class_asks_for_them(tmp_path: Path) -> None:
    model = pruned("llama", "FASP none")
    save_pruned(model, tmp_path / "out")
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is type(model)
    layer, own = stock.model.layers[0], load_pruned(tmp_path / "out").model.layers[0]  # type: ignore[union-attr,index]
    assert not layer.mlp.gate_proj.bias.any()
    assert layer.mlp.down_proj.bias.any()
    assert own.mlp.gate_proj.bias is None  # type: ignore[union-attr]
    assert torch.equal(logits(stock), logits(model))
