"""Commands with `--device cuda`, writing with a cache, exports and packed weights there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from plprune import load_pruned, prune, save_pruned
from plprune.checkpoint.load import load_model
from plprune.cli import main
from plprune.evaluation.standalone import greedy_tokens
from tests.builders import logits, method, numbers, tokenizer, windows
from tests.gpu.models import TEXT, model, save

pytestmark = pytest.mark.gpu

LONG = {"max_position_embeddings": 512}
WINDOWS = ("--text=text.txt", "--seq_len=32", "--max_windows=8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save(tmp_path / "model", **LONG)
    numbers(tmp_path / "text.txt", stop=1200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune_by(name: str, device: str, output: str, *more: str) -> None:
    sizes = ("--text=text.txt", "--seq_len=32", "--num_samples=16", f"--output={output}", f"--device={device}")
    main(["prune", "model", f"--method={name}", *sizes, *more])


def test_evaluate_measures_speed_and_memory_there(here: Path, device: torch.device) -> None:
    prune_by("CFSP", device.type, "pruned")
    main(["evaluate", "pruned", *WINDOWS, "--speed", f"--device={device.type}", "--output=there.json"])
    main(["evaluate", "pruned", *WINDOWS, "--output=cpu.json"])
    there, cpu = (json.loads((here / f"{name}.json").read_text()) for name in ("there", "cpu"))
    assert there["stages"].keys() == cpu["stages"].keys() == {"dense", "pruned"}
    for stage, found in there["stages"].items():
        assert found["perplexity"] == pytest.approx(cpu["stages"][stage]["perplexity"], rel=1e-4)
    for speed in there["speed"].values():
        assert speed["writing"]["median"] > 0
        assert speed["saturated"]["median"] >= speed["writing"]["median"]
        if device.type == "cuda":
            assert speed["peak_of"] == "memory allocated on the device"
            assert speed["device"] == torch.cuda.get_device_name(device)
            assert speed["weights"] < speed["peak"] <= speed["saturated_peak"]
    assert there["speed"]["pruned"]["weights"] < there["speed"]["dense"]["weights"]


def test_sensitivity_is_that_of_the_cpu(here: Path, device: torch.device) -> None:
    for name in {device.type, "cpu"}:
        main(["sensitivity", "model", *WINDOWS, "--num_samples=4", f"--output={name}.out", f"--device={name}"])
    found, expected = (
        json.loads((here / f"{name}.out" / "sensitivity.json").read_text()) for name in (device.type, "cpu")
    )
    assert found["dense"] == pytest.approx(expected["dense"], rel=1e-4)
    for ours, theirs in zip(found["cells"], expected["cells"], strict=True):
        assert ours == {k: pytest.approx(v, rel=1e-3) if isinstance(v, float) else v for k, v in theirs.items()}


def test_compare_prunes_measures_and_recovers_there(here: Path, device: torch.device, capsys: Any) -> None:
    numbers(here / "other.txt", 2000, 3200)
    methods = "[{class_path: FLAP}, {class_path: FASP}, {class_path: LearnedGates}]"
    sizes = ["--num_samples=4", "--calibration_seq_len=32", "--seq_len=32", "--max_windows=4", "--max_batch=2"]
    recover = "{text: other.txt, steps: 3, seq_len: 32, batch_size: 4}"
    command = ["compare", "--models=[model]", f"--methods={methods}", "--sparsities=[0.25]", "--text=text.txt", *sizes]
    main([*command, "--calibration=other.txt", f"--recover={recover}", "--output=out", f"--device={device.type}"])
    cells = json.loads((here / "out" / "report.json").read_text())["cells"]
    assert len(cells) >= 4
    assert not [cell for cell in cells if cell.get("error")], capsys.readouterr().out


def test_plan_measures_the_device(here: Path, device: torch.device, capsys: Any) -> None:
    main(["plan", "model", "--method=FASP", f"--device={device.type}"])
    printed = capsys.readouterr().out
    assert device.type in printed or torch.cuda.get_device_name(device) in printed


@pytest.mark.parametrize("name", ["FASP value_channels", "TwoSSP", "CFSP activation"])
@torch.no_grad()
def test_a_pruned_model_writes_with_a_cache_what_it_writes_without(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    network = model()
    prune(network, method(name, 0.3), TEXT)
    save_pruned(network, tmp_path / "out", tokenizer())
    there, ids = load_pruned(tmp_path / "out").to(device), windows(2, 12).to(device)  # type: ignore[arg-type]
    torch.testing.assert_close(logits(there, ids).cpu(), logits(network, ids.cpu()), rtol=1e-4, atol=1e-4)
    written = there.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=True)[:, 12:]  # type: ignore[operator]
    without = there.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)[:, 12:]  # type: ignore[operator]
    assert torch.equal(written, without)
    greedily = torch.cat(list(greedy_tokens(there, ids, 8)), 1)  # this does not ban the end of the text
    ended = (greedily == network.config.eos_token_id).any(1)
    assert torch.equal(greedily[~ended], written[~ended])


@pytest.mark.parametrize("name", ["FASP", "TwoSSP"])
def test_an_export_computes_there_what_the_model_does(name: str, here: Path, device: torch.device) -> None:
    prune_by(name, device.type, "pruned", "--method.sparsity=0.3")
    main(["export", "pruned", "--to=hf", "--output=out", "--text=text.txt", "--seq_len=32"])
    exported = AutoModelForCausalLM.from_pretrained(
        here / "out" / "hf", trust_remote_code=True, dtype=torch.float32, device_map={"": device}
    )
    ids = windows(2, 32)
    found = logits(exported, ids.to(device)).cpu()
    torch.testing.assert_close(found, logits(load_pruned(here / "pruned"), ids), rtol=1e-4, atol=1e-4)


def test_fp8_is_read_as_plain_weights(tmp_path: Path, device: torch.device) -> None:
    """On a GPU that can compute in it transformers would leave it packed."""
    folder, dense = Path(save(tmp_path / "model", tie_word_embeddings=False)), model(tie_word_embeddings=False)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        blocks = state[name].unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2)
        scale = blocks.abs().amax((2, 3)) / 448
        packed = (blocks / scale[..., None, None]).transpose(1, 2).flatten(2).flatten(0, 1)
        state[name], state[f"{name}_scale_inv"] = packed.to(torch.float8_e4m3fn).contiguous(), scale.contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    packed_as = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": packed_as}))
    found = load_model(str(folder))
    assert {(p.dtype, p.device.type) for p in found.parameters()} == {(torch.float32, "cpu")}
    for (name, ours), theirs in zip(found.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.07, atol=1e-3, msg=name)
    prune(found.to(device), method("FASP value_channels"), TEXT)  # type: ignore[arg-type]
    assert all(torch.isfinite(p).all() for p in found.parameters())
