"""The benchmark for GPUs, on the CPU, and what those of families, of quantised and of served models have recorded."""

import json
from pathlib import Path

import pytest

from plprune import load_pruned
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.cli import main as plprune
from plprune.evaluation.perplexity import Protocol, judge, passage
from plprune.training import recipes
from tests.benchmarks import curve, families, quantised, serving
from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.running import SECTIONS
from tests.builders import numbers, save_tiny

SMALL = {"hidden_size": 16, "word_embed_proj_dim": 16, "intermediate_size": 32, "ffn_dim": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300}


@pytest.mark.slow
def test_every_section_measures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--windows=2", "--length=64", "--steps=3", f"--small={json.dumps(SMALL)}", "--gates=2", "--tokens=512"]
    texts = {name: numbers(tmp_path / f"{name}.txt", stop=500 + 50 * i) for i, name in enumerate(["wikitext", "books"])}
    texts |= {"model": save_tiny(tmp_path / "model"), "train": numbers(tmp_path / "train.txt", 600, 2000)}
    command = [f"--output={tmp_path / 'out'}", *sizes, *(f"--{name}={value}" for name, value in texts.items())]
    main(["decode", "--limit=0.1", *command])
    assert "decode was cut after 0.1 seconds" in capsys.readouterr().out
    main(["plan", "--limit=100", *command])
    assert "plan: ValueError: nothing was measured yet" in capsys.readouterr().out
    main(["--limit=0", *command])
    file, printed = tmp_path / "out" / "gpu.json", capsys.readouterr().out
    record = json.loads(written := file.read_text())
    assert record.keys() == SECTIONS.keys()
    table = printed[printed.rindex("\n\nrecovery, cpu") :]
    for section in record.values():
        assert section["device"] == "cpu"
        assert section["cells"]
        assert not {name: cell for name, cell in section["cells"].items() if "missing" in cell}
    assert not [name for part in ("recovery", "decode") for name in record[part]["cells"] if f"\n{name}  " not in table]
    assert record["pruning"]["cells"]["OPT-125M: FASP"]["over a bare pass"] > 1
    assert record["plan"]["cells"]["OPT-125M: FASP"]["foretold"] > 0
    main(["--limit=0", *command])  # all is there
    assert file.read_text() == written


@pytest.mark.slow
def test_a_curve_goes_on_and_is_what_recipes_foretell_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, model, out = numbers(tmp_path / "text.txt", stop=800), save_tiny(tmp_path / "model"), tmp_path / "out"
    fit = ["--recipe", "fast", model, "--data", text, "--sparsity=0.3", "--data.seq_len=16", "--data.batch_size=2"]
    fit += [
        "--data.num_samples=4",
        "--data.calibration_seq_len=16",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.callbacks.method=CFSP",
    ]
    asked = [
        str(out),
        "--text",
        text,
        "--counts",
        "64",
        "96",
        "--windows=2",
        "--length=32",
        "--names",
        "tiny",
        "numbers",
    ]
    curve.main([*asked, "--", *fit])
    written = (out / "points.jsonl").read_text()
    found = curve.read(out / "points.jsonl")
    assert [(point.tokens, point.run) for point in found] == [(0, 96), (64, 96), (96, 96)]
    assert len({point.ratio for point in found}) == 3
    assert (found[0].model, found[0].text, found[0].method) == ("tiny", "numbers", "CFSP")
    curve.main([*asked, "--", *fit])  # all is there
    assert (out / "points.jsonl").read_text() == written
    start = [
        "--method=CFSP",
        "--method.sparsity=0.3",
        "--method.repair=restore",
        "--method.bias=false",
        f"--text={text}",
        "--num_samples=4",
        "--seq_len=16",
    ]
    plprune(["prune", model, *start, f"--output={tmp_path / 'pruned'}"])
    fit[2] = str(tmp_path / "pruned")
    curve.main([str(tmp_path / "again"), *asked[1:], "--", *fit])
    again = curve.read(tmp_path / "again" / "points.jsonl")
    assert [curve.settings(point) for point in again] == [curve.settings(point) for point in found]
    judged = passage(text, load_tokenizer(model), Protocol(32, max_windows=2), "\n\n")
    pruned, dense = (
        judge(load(folder), judged).perplexity for load, folder in ((load_pruned, fit[2]), (load_model, model))
    )
    assert again[0].ratio == pytest.approx(pruned / dense, abs=1e-4)
    with pytest.raises(SystemExit):
        curve.main([str(tmp_path / "other"), *asked[1:], "--", *fit, "--data.num_samples=5"])
    assert "give --data.num_samples and --data.calibration_seq_len of the pruning" in capsys.readouterr().err
    monkeypatch.setattr(recipes, "folder", lambda: tmp_path)
    monkeypatch.setattr(curve, "folder", lambda: tmp_path)
    for _ in range(2):
        curve.main([str(out), "--write"])
        assert recipes.points() == found


def test_the_list_of_families_is_the_recorded_one() -> None:
    results = json.loads(families.RESULTS.read_text())
    assert families.page(results) in families.PAGE.read_text()
    pruned = [kind for kind, each in results.items() if kind != "transformers" and each["methods"]]
    assert {"llama", "qwen3_moe", "gpt_oss", "mamba2"} <= set(pruned)


def test_the_page_has_the_recorded_tables_of_quantised_and_of_served_models() -> None:
    page = (Path(__file__).parents[1] / "plprune" / "export" / "README.md").read_text(encoding="utf-8")
    assert quantised.table(json.loads(quantised.RESULTS.read_text())) in page
    assert serving.speed_table(json.loads(serving.SPEED.read_text())) in page
