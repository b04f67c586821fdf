"""Models of families that transformers lacks, whose code comes with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama import modeling_llama

from plprune import CFSP, FASP, PruningMethod, allow_remote_code, load_pruned, prune, save_pruned
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from tests.builders import tiny, tokenizer, windows

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    kept = torch.load(folder + ".pt")
    assert torch.equal(model(kept["ids"]).logits, kept["logits"]), folder
    model.save_pretrained(sys.argv[1] + "/again")
    again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/again", trust_remote_code=True)
    assert torch.equal(again(kept["ids"]).logits, kept["logits"]), folder
    assert "plprune" not in sys.modules
"""


def folder_of(kind: str, folder: Path) -> Path:
    """A model whose code is transformers' own for Llama, under another name; it leaves a mark when it is run."""
    tiny("llama").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    source = Path(str(modeling_llama.__file__)).parent
    for name in ("configuration", "modeling"):
        text = (source / f"{name}_llama.py").read_text().replace("from ...", "from transformers.")
        text = text.replace("configuration_llama", f"configuration_{kind}").replace("Llama", "Own")
        mark = f"\n\nopen({str(folder / 'mark')!r}, 'w').close()\n"
        text = text.replace('model_type = "llama"', f'model_type = "{kind}"')
        (folder / f"{name}_{kind}.py").write_text(text + mark)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    config["auto_map"] = {
        "AutoConfig": f"configuration_{kind}.OwnConfig",
        "AutoModelForCausalLM": f"modeling_{kind}.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_that_comes_with_a_model_does_not_run_unasked(tmp_path: Path) -> None:
    folder = str(folder_of("own_refused", tmp_path / "dense"))
    for load in (load_model, load_skeleton):
        with pytest.raises(ValueError, match=r"comes with code of its own.*--trust_remote_code.*allow_remote_code\('"):
            load(folder)
    assert not (tmp_path / "dense" / "mark").exists()


@pytest.mark.parametrize(
    ("method", "stock"), [(CFSP(0.3), False), (FASP(0.25, attention="none", bias=False), True)], ids=["CFSP", "FASP"]
)
def test_a_family_that_comes_with_its_model_is_pruned_and_loads_anywhere(
    method: PruningMethod, stock: bool, tmp_path: Path
) -> None:
    kind = f"own_{type(method).__name__.lower()}"
    dense = str(folder_of(kind, tmp_path / "dense"))
    allow_remote_code(dense)
    assert (tmp_path / "dense" / "mark").exists()
    model = load_model(dense)
    plan = prune(model, method, [windows()])
    assert 0.2 < plan.reached < 0.35
    save_pruned(model, tmp_path / "out", load_tokenizer(dense))
    assert (tmp_path / "out" / "modeling_plprune.py").exists() == (not stock)
    again = load_pruned(tmp_path / "out")
    file = f"modeling_{kind}.py"
    ids, logits = windows(seed=2), model(windows(seed=2)).logits
    assert torch.equal(again(ids).logits, logits)
    again.save_pretrained(tmp_path / "saved")
    for name in ("out", "saved"):
        assert (tmp_path / name / file).read_bytes() == (tmp_path / "dense" / file).read_bytes()
        torch.save({"ids": ids, "logits": logits}, tmp_path / f"{name}.pt")
    run = [sys.executable, "-c", ALONE, str(tmp_path), str(tmp_path / "out"), str(tmp_path / "saved")]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_family_that_transformers_has_needs_no_leave(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path / "dense")
    allow_remote_code(str(folder))
    assert type(load_model(str(folder))) is modeling_llama.LlamaForCausalLM
    assert not (folder / "mark").exists()


def test_leave_for_code_that_is_not_there(tmp_path: Path) -> None:
    folder = folder_of("own_absent", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "configuration_own.A"}}))
    with pytest.raises(ValueError, match="has no code of its own for AutoModelForCausalLM"):
        allow_remote_code(str(folder))


@pytest.mark.slow
def test_a_pruned_folder_asks_for_leave_too(tmp_path: Path) -> None:
    """In a process that has not allowed it, neither plprune nor transformers' classes run the code of the folder."""
    dense = str(folder_of("own_pruned", tmp_path / "dense"))
    allow_remote_code(dense)
    model = load_model(dense)
    prune(model, CFSP(0.3), [windows()])
    save_pruned(model, tmp_path / "out", tokenizer())
    program = (
        "import sys, plprune\nfrom transformers import AutoModelForCausalLM\n"
        "other = lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "for load in (plprune.load_pruned, other):\n"
        "    try:\n        load(sys.argv[1])\n    except ValueError as error:\n        print('refused:', error)\n"
        "plprune.allow_remote_code(sys.argv[1])\nprint(type(plprune.load_pruned(sys.argv[1])).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.stdout.count("refused:") == done.stdout.count("plprune.allow_remote_code(") == 2, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "PrunedOwnForCausalLM"


@pytest.mark.slow
def test_commands_ask_for_leave(tmp_path: Path) -> None:
    folder = folder_of("own_command", tmp_path / "dense")
    run = [sys.executable, "-m", "plprune", "plan", str(folder), "--method", "CFSP", "--device", "T4"]
    asked = subprocess.run(run, capture_output=True, text=True)
    given = subprocess.run([*run, "--trust_remote_code"], capture_output=True, text=True)
    assert (asked.returncode, asked.stderr.count("\n")) == (1, 1)
    assert "--trust_remote_code" in asked.stderr
    assert given.returncode == 0, given.stderr
