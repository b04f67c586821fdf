"""A folder is read by vLLM, in an environment of its own; here a program that answers in its place."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from plprune import CFSP, prune
from plprune.evaluation import standalone
from plprune.export.formats import Options, export, format_refusals
from plprune.export.parity import Row, parity_table
from tests.builders import tiny, tokenizer, windows

FAKE = """#!{python}
import os, sys
os.execv(sys.executable, [sys.executable, "-I", {program!r}, *sys.argv[3:]])
"""


def program(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def rows_of(folder: Path, formats: list[str], python: str) -> list[Row]:
    model = tiny()
    prune(model, CFSP(0.3), [windows()])
    return export("it", lambda: model, tokenizer(), folder / "out", formats, windows(2, 16), Options(vllm=python))


def test_the_folder_for_transformers_is_read_by_vllm_too(tmp_path: Path) -> None:
    python = program(tmp_path, FAKE.format(python=sys.executable, program=standalone.__file__))
    hf, vllm = rows_of(tmp_path, ["hf", "vllm"], python)
    assert (hf.file, vllm.file, hf.bytes) == ("hf", "hf", vllm.bytes)
    assert vllm.same_text
    assert vllm.difference is not None
    assert vllm.difference < 1e-5
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["README.md", "hf", "parity.json"]
    assert "| vllm |" in (tmp_path / "out" / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho 'ModuleNotFoundError: No module named vllm' >&2; echo bye >&2; exit 1\n", "named vllm"),
        ("#!/bin/sh\nexit 3\n", "it ended with code 3"),
        (None, "no-python does not run: No such file or directory"),
    ],
)
def test_why_vllm_does_not_read_it(text: str | None, said: str, tmp_path: Path) -> None:
    python = program(tmp_path, text) if text else "no-python"
    (row,) = rows_of(tmp_path, ["vllm"], python)
    assert row.note.startswith("not loaded: ")
    assert said in parity_table([row])
    assert row.difference is None


def test_families_that_vllm_does_not_take_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    assert format_refusals(model)["vllm"] == ["its backend for transformers does not take this family"]
    assert format_refusals(tiny())["vllm"] == []


@pytest.mark.slow
@pytest.mark.skipif("PLPRUNE_VLLM" not in os.environ, reason="PLPRUNE_VLLM names no Python of an environment with vLLM")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vllm_computes_the_same(family: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = tiny(family, intermediate_size=512, **sizes)
    prune(model, CFSP(0.3), [windows()])
    how = Options(vllm=os.environ["PLPRUNE_VLLM"])
    (row,) = export("it", lambda: model, tokenizer(), tmp_path / "out", ["vllm"], windows(2, 32), how)
    assert row.program is not None, row.note
    assert row.difference is not None
    assert row.difference < 1e-4
    assert row.same_text
