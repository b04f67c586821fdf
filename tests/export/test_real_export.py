"""Real models, pruned and recovered, in transformers, in llama.cpp and in lm-eval."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from plprune.cli import main
from tests.shared import SMOLLM2, gemma, needs_smollm2, shared

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="no llama.cpp: pip install xllamacpp")


def rows_of(out: Path) -> dict[str, Any]:
    return {row["format"].split()[0]: row for row in json.loads((out / "parity.json").read_text())["rows"]}


@needs_smollm2
@needs_llama_cpp
def test_a_recovered_model_is_the_same_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.callbacks.method", "FLAP"]
    fit += ["--trainer.callbacks.method.sparsity", "0.25", "--trainer.callbacks.serve_on", "[llama.cpp]"]
    fit += ["--trainer.max_steps", "2", "--trainer.logger", "false"]
    fit += ["--data.num_samples", "8", "--data.seq_len", "128", "--data.max_windows", "4"]
    monkeypatch.chdir(tmp_path)
    main([*fit, "--trainer.accelerator", "cpu"])
    main(["export", "runs/quickstart/model", "--output", "out", "--seq_len", "128", "--max_windows", "2"])
    rows = rows_of(tmp_path / "out")
    assert (rows["hf"]["difference"], rows["hf"]["same_text"]) == (0, True)
    assert rows["gguf"]["difference"] < 0.01
    assert rows["gguf"]["same_text"]
    card = (tmp_path / "out/README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| recovered |" in card
    assert f"gguf f32 | {rows['gguf']['program']}" in card


@needs_smollm2
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="no lm-eval: pip install 'plprune[eval]'")
def test_lm_eval_judges_a_folder_without_plprune(tmp_path: Path) -> None:
    tasks = shared("data/benchmarks/hf")
    prune = ["prune", SMOLLM2, "--method", "CFSP", "--num_samples", "4", "--seq_len", "128"]
    main([*prune, "--output", str(tmp_path / "out")])
    command = "import sys; sys.modules['plprune'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = f"pretrained={tmp_path / 'out'},trust_remote_code=True,dtype=float32"
    options = ["--model", "hf", "--model_args", arguments, "--tasks", "arc_easy", "--limit", "8", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", command, *options, "--output_path", str(tmp_path / "results")],
        **{"cwd": tasks, "env": os.environ | offline, "capture_output": True, "text": True, "timeout": 900},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "results").rglob("*.json")
    found = json.loads(results.read_text())["results"]["arc_easy"]
    assert 0 <= found["acc,none"] <= 1


@needs_llama_cpp
def test_a_second_family_is_the_same_everywhere(tmp_path: Path) -> None:
    prune = ["prune", gemma(tmp_path), "--method", "FASP", "--num_samples", "4", "--seq_len", "128"]
    prune += ["--method.attention", "none", "--method.bias", "false", "--serve_on", "[llama.cpp]"]
    main([*prune, "--method.sparsity", "0.2", "--output", str(tmp_path / "model")])
    main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "out")])
    rows = rows_of(tmp_path / "out")
    assert (rows["hf"]["difference"], rows["hf"]["same_text"]) == (0, True)
    assert rows["gguf"]["difference"] < 0.01
    assert rows["gguf"]["same_text"]
