"""A folder is read by vLLM, in an environment of its own; here a program that answers in its place."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from plprune import CFSP, FASP, FLAP, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.evaluation import standalone
from plprune.export.formats import Options, export, format_refusals
from plprune.export.parity import Row, parity_table
from plprune.pruning.constraints import device_counts
from tests.builders import tiny, tokenizer, windows

SIZES: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
FAKE = """#!{python}
import os, sys
os.execv(sys.executable, [sys.executable, "-I", {program!r}, *sys.argv[4:]])
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


def test_devices_that_cannot_share_a_model_are_refused(tmp_path: Path) -> None:
    model = tiny()
    prune(model, CFSP(0.3, multiple_of=4), [windows()])
    assert device_counts(blocks_of(model)) == [1, 2, 4]
    said = (
        "3 devices cannot share its widths and heads, but 1, 2, 4 can: prune the dense model with `tensor_parallel: 3`"
    )
    for devices, reasons in {2: [], 3: [said]}.items():
        how = Options(vllm="no-python", tensor_parallel=devices)
        rows = export("it", lambda: model, tokenizer(), tmp_path / f"{devices}", ["hf", "vllm"], windows(2, 16), how)
        assert [row.refused for row in rows] == [[], reasons]
    prune(ragged := tiny(), FASP(0.2), [windows()])
    assert device_counts(blocks_of(ragged)) == [1]


needs_vllm = pytest.mark.skipif(
    "PLPRUNE_VLLM" not in os.environ, reason="PLPRUNE_VLLM names no Python of an environment with vLLM"
)


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vllm_computes_the_same(family: str, tmp_path: Path) -> None:
    model = tiny(family, intermediate_size=512, **SIZES)
    prune(model, CFSP(0.3), [windows()])
    how = Options(vllm=os.environ["PLPRUNE_VLLM"])
    check(export("it", lambda: model, tokenizer(), tmp_path / "out", ["vllm"], windows(2, 32), how))


@pytest.mark.slow
@needs_vllm
def test_two_devices_share_a_model_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model = tiny(intermediate_size=512, **SIZES)
    prune(model, FLAP(0.3), [windows()], tensor_parallel=2)
    how = Options(vllm=os.environ["PLPRUNE_VLLM"], tensor_parallel=2)
    check(export("it", lambda: model, tokenizer(), tmp_path / "out", ["vllm"], windows(2, 32), how))


def check(rows: list[Row]) -> None:
    (row,) = rows
    assert row.program is not None, row.note
    assert row.difference is not None
    assert row.difference < 1e-4
    assert row.same_text


SERVER = "vllm.entrypoints.openai.api_server"  # as `vllm serve`, which the package for CPUs lacks


@pytest.mark.slow
@needs_vllm
def test_a_server_of_vllm_answers_a_batch_with_a_common_prefix(tmp_path: Path) -> None:
    model: Any = tiny("llama", intermediate_size=512, tie_word_embeddings=True, max_position_embeddings=256, **SIZES)
    prune(model, FLAP(0.3), [windows()])
    save_pruned(model, folder := tmp_path / "out", tokenizer(), max_shard_size="1MB")
    prompts = windows(3, 150)
    prompts[:, :-4] = prompts[0, :-4]  # vLLM keeps prefixes in units of 128
    how: dict[str, Any] = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    written: Any = model.generate(prompts, max_new_tokens=8, eos_token_id=None, pad_token_id=0, **how)
    expected = torch.stack([torch.log_softmax(step, -1).amax(-1) for step in written.scores], 1)
    asked = {"model": str(folder), "prompt": prompts.tolist(), "max_tokens": 8, "logprobs": 1, "temperature": 0}
    with serving(folder, tmp_path / "log") as ask:
        answers = [ask(asked | {"ignore_eos": True}) for _ in range(2)]
    for answer in answers:
        found = torch.tensor([choice["logprobs"]["token_logprobs"] for choice in answer["choices"]])
        assert (found - expected).abs().max() < 1e-4
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 128


@contextlib.contextmanager
def serving(folder: Path, log: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Runs a server of vLLM, and asks it once it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--enable-prompt-tokens-details"]
    command = [os.environ["PLPRUNE_VLLM"], "-m", SERVER, "--model", str(folder), "--port", str(port), *options]
    settings = {"HF_MODULES_CACHE": f"{log}-modules", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

    def ask(asked: dict[str, Any]) -> dict[str, Any]:
        url, head = f"http://127.0.0.1:{port}/v1/completions", {"Content-Type": "application/json"}
        while True:
            assert server.poll() is None, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(urllib.request.Request(url, json.dumps(asked).encode(), head)) as answer:
                    return json.load(answer)
            except urllib.error.URLError:
                time.sleep(1)

    with log.open("w") as said:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=said, stderr=said, cwd=log.parent)
        try:
            yield ask
        finally:
            server.terminate()
            server.wait()
