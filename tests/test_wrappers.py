"""Text decoders of models that see: the decoder is pruned, all else stays, and images and text still run."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from plprune import FASP, FLAP, REAP, LoRA, PruningMethod, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_tokenizer, rebuild
from plprune.cli import main
from plprune.planning.sizes import structure
from plprune.recovery.lora import adapters, inject, merged, merged_state
from tests.builders import logits, numbers, tokenizer, windows
from tests.wrappers import IMAGE, build, image_and_text

QUICK = ("gemma3", "qwen2_5_vl", "llava")
SLOW = (
    "aya_vision",
    "exaone4_5",
    "idefics3",
    "internvl",
    "llava_onevision",
    "mistral3",
    "ovis2",
    "qwen3_5",
    "qwen3_vl",
)
SLOW += ("smolvlm", "gemma4", "got_ocr2", "paligemma", "qwen3_5_moe", "qwen3_vl_moe")
FILES = {"preprocessor_config.json": '{"do_resize": false }\n', "chat_template.jinja": "{{ messages }}"}


def folder_of(kind: str, folder: Path) -> Path:
    """A model in a folder with its tokenizer, its processor's configuration and its generation config."""
    model = build(kind)
    model.generation_config = GenerationConfig(max_new_tokens=7, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@torch.no_grad()
def seen(model: PreTrainedModel) -> Tensor:
    return model(**image_and_text(model)).logits


def outside(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that is not in the decoder's blocks."""
    parts = ("language_model.layers.", "text_model.layers.")
    return {n: t.clone() for n, t in model.state_dict().items() if not any(part in n for part in parts)}


@pytest.mark.parametrize("kind", [*QUICK, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_a_text_decoder_is_pruned_and_the_model_still_sees(kind: str, tmp_path: Path) -> None:
    dense = load_model(str(folder_of(kind, tmp_path / "dense")))
    towers, whole = outside(dense), sum(p.numel() for p in dense.parameters())
    in_blocks = whole - sum(p.numel() for n, p in dense.named_parameters() if n in towers)
    mixture = any(block.expert_count for block in blocks_of(dense))
    alike = REAP(0.25, sparsity_of="experts") if mixture else FASP(sparsity=0.25, attention="none", bias=False)
    uniform: PruningMethod = alike
    for method in (FLAP(sparsity=0.25), TwoSSP(sparsity=0.25, drop_attentions=1), uniform):
        model, out = load_model(str(tmp_path / "dense")), tmp_path / type(method).__name__
        plan = prune(model, method, list(windows(4, 12).split(2)))
        left = in_blocks - whole + sum(p.numel() for p in model.parameters())
        assert sum(plan.before) == in_blocks
        assert plan.reached == pytest.approx(1 - left / in_blocks)
        assert isinstance(method, REAP) or plan.reached == pytest.approx(0.25, abs=0.03)
        assert all(torch.equal(value, towers[name]) for name, value in outside(model).items())
        assert not torch.allclose(seen(model), seen(dense))
        save_pruned(model, out, load_tokenizer(str(tmp_path / "dense")))
        assert (out / "modeling_plprune.py").exists() == (method is not uniform)
        load_pruned(out).save_pretrained(tmp_path / f"{out.name} again")
        loaded: list[Any] = [load_pruned(out)]
        for folder in (out, tmp_path / f"{out.name} again"):
            loaded.append(AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True))
        for again in loaded:
            for parameter in again.parameters():  # kernels of experts round otherwise where weights lie otherwise
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            assert torch.equal(logits(again), logits(model))
            assert torch.equal(seen(again), seen(model))
        for given in (image_and_text(model), {"input_ids": windows(2, 5)}):
            how = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
            texts = [loaded[1].generate(**given, **how, use_cache=cached) for cached in (True, False)]
            assert torch.equal(*texts)
        assert all((out / name).read_text() == text for name, text in FILES.items())
        assert loaded[0].generation_config.max_new_tokens == 7
        assert "image-text-to-text" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "kind", ["gemma3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava", "qwen3_5"))]
)
def test_a_text_decoder_with_fewer_blocks_still_sees(kind: str, tmp_path: Path) -> None:
    model = load_model(str(folder_of(kind, tmp_path / "dense")))
    towers, depth = outside(model), len(blocks_of(model))
    plan = prune(model, TwoSSP(sparsity=0.4, drop_blocks=1), list(windows(4, 12).split(2)))
    assert len(plan.remaining) == len(blocks_of(model)) == depth - 1
    assert all(torch.equal(value, towers[name]) for name, value in outside(model).items())
    save_pruned(model, tmp_path / "out", load_tokenizer(str(tmp_path / "dense")))
    assert not (tmp_path / "out" / "modeling_plprune.py").exists()
    stock: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert stock.config.text_config.num_hidden_layers == depth - 1
    for again in (stock, load_pruned(tmp_path / "out")):
        assert torch.equal(logits(again), logits(model))
        assert torch.equal(seen(again), seen(model))
    how = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    texts = [stock.generate(**image_and_text(model), **how, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", QUICK[:1])
def test_a_decoder_is_recovered_and_saved_with_its_towers(kind: str, tmp_path: Path) -> None:
    model = load_model(str(folder_of(kind, tmp_path / "dense")))
    plan, towers = prune(model, FLAP(sparsity=0.25), [windows()]), outside(model)
    inject(model, LoRA(rank=2), plan)
    assert all(name.startswith(blocks_of(model)[0].path.rpartition(".")[0]) for name, _ in adapters(model))
    for parameter in model.parameters():
        parameter.data += 0.01 * parameter.requires_grad
    again = rebuild(model, dict(merged_state(model, lambda p: p.detach().cpu())))
    save_pruned(again, tmp_path / "out")
    with merged(model):
        assert torch.equal(seen(load_pruned(tmp_path / "out")), seen(model))
    assert all(torch.equal(value, towers[name]) for name, value in outside(again).items())
    assert all((tmp_path / "out" / name).read_text() == text for name, text in FILES.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", QUICK[-1:])
def test_commands_prune_plan_and_export_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(kind, Path("dense"))
    numbers(Path("text.txt"))
    text = ["--text=text.txt", "--num_samples=4", "--seq_len=16"]
    assert not main(["prune", "dense", "--method=FLAP", *text, "--output=out"])
    assert not main(["prune", "dense", "--method=FLAP", *text, "--output=streamed", "--stream"])
    model = load_pruned("out")
    assert torch.equal(seen(load_pruned("streamed")), seen(model))
    assert not main(["export", "out", "--to=hf,gguf,decilm", "--output=exported", "--seq_len=16", "--max_windows=2"])
    rows = {row["format"].split()[0]: row for row in json.loads(Path("exported/parity.json").read_text())["rows"]}
    assert rows["hf"]["difference"] == 0.0
    assert len(rows["decilm"]["refused"]) == 1
    assert kind in rows["decilm"]["refused"][0]
    assert not rows["gguf"]["refused"]
    assert find_spec("xllamacpp") is None or rows["gguf"]["difference"] < 1e-4
    assert not main(["plan", "dense", "--method=FLAP"])
    assert "4 blocks of: 4 kv heads" in capsys.readouterr().out


def test_towers_take_no_operations_of_a_text() -> None:
    model = build("llava")
    decoder = [*blocks_of(model)[0].module.named_parameters()]
    each = sum(p.numel() for _, p in decoder if p.ndim == 2)
    head = model.get_output_embeddings().weight.numel()  # type: ignore[union-attr,operator]
    config: Any = model.config.text_config
    attended = 4 * config.num_hidden_layers * config.hidden_size * (8 + 1) / 2
    assert structure(model, 8).reading_flops == 2 * (config.num_hidden_layers * each + head) + attended
