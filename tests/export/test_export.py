"""`plprune export`: every format, the proof of each, the reasons against, and the model card."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from plprune import CFSP, FASP, FLAP, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.model_card import card
from plprune.checkpoint.save import licence_of
from plprune.cli import main
from plprune.export import decilm, parity
from plprune.export.parity import Reading, Row
from plprune.pruning.surgery import apply, pad, plan_of, widen
from tests.builders import FAMILIES, logits, tiny, tokenizer, windows
from tests.wrappers import build as seeing

HERE = find_spec("xllamacpp") is not None


def saved(folder: Path, method: Any, family: str = "llama", **settings: Any) -> PreTrainedModel:
    model = tiny(family, **settings)
    prune(model, method, list(windows().split(2)))
    save_pruned(model, folder, tokenizer())
    return model


def exported(folder: Path, *options: str) -> dict[str, Any]:
    """The rows of `parity.json`, by format."""
    out = folder.with_name("exported")
    assert not main(["export", str(folder), "--output", str(out), "--seq_len", "32", "--max_windows", "2", *options])
    return {row["format"].split()[0]: row for row in json.loads((out / "parity.json").read_text())["rows"]}


# ---- the command


def test_the_text_decoder_of_a_model_that_sees_is_said_to_be_alone(tmp_path: Path) -> None:
    model = seeing("llava")
    prune(model, FASP(0.25, attention="none", bias=False), list(windows(4, 12).split(2)))
    save_pruned(model, tmp_path / "model", tokenizer())
    row = exported(tmp_path / "model", "--to", "gguf")["gguf"]
    assert not row["refused"]
    assert row["note"].startswith("the text decoder alone: what sees or hears is not written")
    assert not HERE or row["difference"] < 1e-4


@pytest.mark.parametrize(
    "method",
    [FLAP(0.25), pytest.param(FASP(0.25, attention="kv_heads"), marks=pytest.mark.slow)],
    ids=lambda m: type(m).__name__,
)
def test_what_is_written_is_loaded_again_and_compared(method: Any, tmp_path: Path, capsys: Any) -> None:
    saved(tmp_path / "model", method)
    rows = exported(tmp_path / "model")
    assert rows["hf"]["difference"] == 0
    assert rows["hf"]["same_text"]
    assert rows["hf"]["program"].startswith("transformers ")
    assert rows["decilm"]["refused"]
    printed, told = capsys.readouterr().out, (tmp_path / "exported/README.md").read_text()
    for line in parity.parity_table([Row(**row) for row in rows.values()]).splitlines():
        assert line in printed
        assert line in told
    assert (tmp_path / "exported/hf/README.md").read_text() == told
    if HERE:
        assert rows["gguf"]["difference"] < 0.01
        assert rows["gguf"]["same_text"]
        assert rows["gguf"]["bytes"] == (tmp_path / "exported/model-f32.gguf").stat().st_size


def test_what_could_not_be_checked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model", CFSP(0.25))
    monkeypatch.setattr(
        "plprune.export.formats.importlib.util.find_spec", lambda name: None if name == "xllamacpp" else 1
    )
    row = exported(tmp_path / "model", "--to", "gguf")["gguf"]
    assert row["program"] is None
    assert "not on this machine" in row["note"]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "model", CFSP(0.25))
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/kept.txt").write_text("an earlier export")
    before = {p: p.read_bytes() for p in (tmp_path / "exported").rglob("*") if p.is_file()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "by_transformers", interrupt)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "exported"), "--to", "hf", "--overwrite"])
    assert before == {p: p.read_bytes() for p in (tmp_path / "exported").rglob("*") if p.is_file()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "unknown format ['onnx']: give some of hf, gguf, decilm"),
        (["--to", "hf", "--pad_to", "0"], "pad_to is 0"),
        (["--to", "hf", "--text", "absent.txt"], "absent.txt"),
    ],
)
def test_bad_options_are_refused(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    saved(tmp_path / "model", CFSP(0.25))
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out"), *options])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_if_no_format_can_hold_the_model(tmp_path: Path, capsys: Any) -> None:
    model = tiny()
    prune(model, TwoSSP(0.8, drop_attentions=3), [windows()])
    save_pruned(model, tmp_path / "model", tokenizer())
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), "--to", "gguf,decilm", "--output", str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert "gguf f32: block 0 has no attention" in told
    assert "serve_on" in told
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_is_refused_with_the_remedy(tmp_path: Path, capsys: Any) -> None:
    save_pruned(tiny(), tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    assert "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dense_model_can_be_exported(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = exported(tmp_path / "model", "--to", "hf")
    assert rows["hf"]["difference"] == 0
    assert not (tmp_path / "exported/README.md").exists()


def test_a_dense_model_is_not_padded(tmp_path: Path, capsys: Any) -> None:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), "--pad_to", "64", "--output", str(tmp_path / "out")])
    assert "neither widened nor padded" in capsys.readouterr().err


def test_a_program_that_does_not_load_a_file_is_quoted() -> None:
    def fail() -> Reading:
        raise ValueError("no such tensor")

    row = parity.compare(Row("hf", "hf"), fail, Reading(torch.zeros(1, 1), torch.zeros(1), "plprune", 1.0))
    assert row.program is None
    assert row.note == "not loaded: no such tensor"


def test_a_difference_is_seen() -> None:
    own = Reading(torch.zeros(2, 3), torch.tensor([1, 2, 3]), "plprune", 1.0)
    other = Reading(torch.tensor([[0, 0.5, 0], [0, 0, -2.0]]), torch.tensor([1, 2]), "another", 1.0)
    row = parity.compare(Row("hf", "hf"), lambda: other, own)
    assert (row.difference, row.same_text) == (2.0, True)
    other.greedy[1] = 7
    assert parity.compare(Row("hf", "hf"), lambda: other, own).same_text is False


# ---- reshaping


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("multiple", [16, 64])
def test_padding_keeps_the_function(family: str, multiple: int) -> None:
    model = tiny(family)
    prune(model, FLAP(0.25), list(windows().split(2)))
    before = logits(model)
    pad(model, multiple)
    assert all(len(block.groups("none")[0]) % multiple == 0 for block in blocks_of(model))
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_are_padded_beyond_the_dense_width(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", CFSP(0.25))
    widths = [block.channels for block in blocks_of(model)]
    assert max(widths) <= 48  # as the dense ones
    row = exported(tmp_path / "model", "--to", "hf", "--pad_to", "32")["hf"]
    assert (row["difference"], row["same_text"]) == (0, True)
    found = load_file(tmp_path / "exported" / "hf" / "model.safetensors")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(len(widths))]
    assert [found[name].shape[1] for name in names] == [-(-width // 32) * 32 for width in widths]
    assert max(widths) > 32


@pytest.mark.parametrize("family", FAMILIES)
def test_widening_keeps_the_function(family: str) -> None:
    model = tiny(family)
    dense = {name: p.shape for name, p in model.named_parameters() if "attn" in name or "attention" in name}
    prune(model, FASP(0.25, bias=False), list(windows().split(2)))
    before = logits(model)
    widen(model)
    assert {name: p.shape for name, p in model.named_parameters() if name in dense} == dense
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_widened_export_loads_as_a_stock_checkpoint(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", FASP(0.25, bias=False), "mistral")
    rows = exported(tmp_path / "model", "--to", "hf", "--widen")
    assert rows["hf"]["difference"] < 1e-5
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "exported/hf")
    assert type(stock).__name__ == "MistralForCausalLM"
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-6)
    assert sorted(os.listdir(tmp_path / "exported/hf"))[:2] == ["README.md", "config.json"]
    assert not (tmp_path / "exported/hf/plan.safetensors").exists()


# ---- DeciLM

WIDE = {"hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}


def wide(method: Any) -> PreTrainedModel:
    model = tiny("llama", **WIDE)
    prune(model, method, list(windows().split(2)))
    return model


def test_decilm_is_written_by_its_rule(tmp_path: Path) -> None:
    model = wide(CFSP(0.4, multiple_of=256, a=20.0))
    widths = [len(block.groups("none")[0]) for block in blocks_of(model)]
    assert len(set(widths)) > 1
    assert decilm.refusals(model) == []
    decilm.write(model, tokenizer(), tmp_path / "out")
    decilm.check(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    for block, width in zip(config["block_configs"], widths, strict=True):
        multiple = block["ffn"]["ffn_mult"]
        assert -(-int(2 * multiple * 64 / 3) // 256) * 256 == width
        assert -(-int(2 * round(multiple, 6) * 64 / 3) // 256) * 256 == width  # mlx-lm rounds
        assert block["attention"] == {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2}


@pytest.mark.parametrize("hidden", [64, 576, 4096, 5120, 8192])
def test_the_width_comes_back_from_the_multiple(hidden: int) -> None:
    for width in range(256, 30 * 256, 256):
        assert decilm.width_of(3 * width / (2 * hidden), hidden) == width


def test_decilm_with_attention_and_ffn_removed(tmp_path: Path) -> None:
    model, dropped = wide(CFSP(0.4, multiple_of=256)), tiny("llama", **WIDE)
    plan = plan_of(model)
    assert plan is not None
    for name, size in (("blocks.1.attention", 2), ("blocks.2.whole_ffn", 1)):
        plan.keep[name], plan.sizes[name] = torch.zeros(0, dtype=torch.long), size
    apply(dropped, plan)
    decilm.write(dropped, tokenizer(), tmp_path / "out")
    decilm.check(tmp_path / "out")
    blocks = json.loads((tmp_path / "out/config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True]
    assert blocks[2]["ffn"]["ffn_mult"] is None
    names = load_file(tmp_path / "out/model.safetensors")
    assert not any(name.startswith(("model.layers.2.mlp", "model.layers.2.post_attention")) for name in names)


@pytest.mark.parametrize(
    ("method", "reasons"),
    [
        (CFSP(0.25), ["FFN widths"]),
        (FLAP(0.25), ["there are biases", "FFN widths"]),
        (FASP(0.25, bias=False), ["value channels are ragged", "FFN widths"]),
        (TwoSSP(0.5, drop_attentions=3), ["block 0 has no attention", "FFN widths"]),
    ],
    ids=lambda each: type(each).__name__,
)
def test_decilm_says_every_reason_against(method: Any, reasons: list[str], tmp_path: Path) -> None:
    model = wide(method)
    found = decilm.refusals(model)
    assert len(found) == len(reasons)
    assert all(reason in each for reason, each in zip(reasons, found, strict=True))
    with pytest.raises(ValueError, match="DeciLM cannot hold this model"):
        decilm.write(model, tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_decilm_needs_all_query_heads() -> None:
    model = tiny()
    prune(model, FLAP(0.4, repair="none"), [windows()])
    assert "query heads were removed" in decilm.refusals(model)[0]


def test_decilm_is_for_blocks_like_llamas() -> None:
    (reason,) = decilm.refusals(tiny("gpt2"))
    assert "this is gpt2" in reason


# ---- the card


def test_the_card_says_what_was_removed_and_how_to_load_the_rest(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", FLAP(0.25))
    plan = plan_of(load_pruned(tmp_path / "model"))
    assert plan is not None
    text = (tmp_path / "model/README.md").read_text()
    for block in blocks_of(model):
        i = block.index
        assert f"| {i} | {plan.after[i]:,} of {plan.before[i]:,} | {block.kv_heads} of 4 kv heads" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in text
    for said in ("By FLAP", "`sparsity: 0.25`", "load_pruned", "trust_remote_code=True", plan.digest, "96 tokens"):
        assert said in text


def test_the_licence_is_the_base_models(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\n")
    assert licence_of(str(tmp_path)) == "mit"
    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert licence_of(str(tmp_path / "model.gguf")) == "apache-2.0"
    assert licence_of(str(tmp_path / "absent")) is None


def test_the_card_tells_of_perplexities_training_and_licence() -> None:
    model = tiny()
    record = {"perplexity": {"dense": 10.0, "pruned": 20.5}, "text": {"train": "a.txt"}, "training": {"steps": 7}}
    text = card(prune(model, CFSP(0.25), [windows()]), record | {"licence": "apache-2.0"})
    assert "| pruned | 20.50 |" in text
    assert "steps 7" in text
    assert "a.txt" in text
    assert text.startswith("---\nlicense: apache-2.0\n")
