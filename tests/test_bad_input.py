"""What goes wrong outside of plprune ends in one line that says what, in an exit code, and in nothing half-written."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from plprune.checkpoint.load import load_model, load_pruned, load_skeleton, load_tokenizer
from plprune.cli import main
from plprune.streaming import open_streamed
from tests.builders import logits, save_tiny

CALIBRATION = ["--num_samples=4", "--seq_len=16"]
METHODS = ("CFSP", "FASP", "FLAP", "LearnedGates", "TwoSSP")
Complain = Callable[..., str]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def pruned(model: Path) -> Path:
    text = model.parent / "text.txt"
    text.write_text("So it goes. " * 100)
    folder = model.parent / "pruned"
    main(["prune", str(model), "--method=CFSP", f"--output={folder}", f"--text={text}", *CALIBRATION])
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, but for a text that is long enough."""
    (tmp_path / "text.txt").write_text("So it goes. " * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def complain(here: Path, capsys: pytest.CaptureFixture[str]) -> Complain:
    """Runs a command that must fail as it should, and gives the line it says."""

    def run(*args: str | Path) -> str:
        before = tree(here)
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("plprune: error: ")]
        assert stopped.value.code not in (None, 0)
        assert len(lines) == 1
        assert "unexpected error" not in lines[0]
        assert captured.err.rstrip().endswith(lines[0])  # nothing follows on it
        assert "Traceback" not in captured.err + captured.out
        assert {path for path in tree(here) if not path.startswith("run")} == before  # a fit keeps its plan in run
        return lines[0].removeprefix("plprune: error: ")

    return run


@pytest.fixture
def complain_of_pruning(complain: Complain, model: Path) -> Complain:
    def run(*args: str, model: Path | str = model) -> str:
        defaults = {"--method": "CFSP", "--text": "text.txt", "--output": "out"}
        given = defaults | dict(arg.split("=", 1) for arg in args)
        return complain("prune", model, *CALIBRATION, *(f"{name}={value}" for name, value in given.items()))

    return run


def fit_config(folder: Path, model: Path | str, *more_callbacks: str, **changes: Any) -> str:
    """A configuration of a short fit, written to `folder`; a change is named SECTION__KEY or CALLBACK__KEY."""
    method = {"class_path": "CFSP", "init_args": {"sparsity": 0.2}}
    callbacks = {"plprune.Prune": {"method": method}, "plprune.Export": {"output": "out"}}
    callbacks |= {name: {} for name in more_callbacks}
    trainer = {"accelerator": "cpu", "max_steps": 2, "limit_val_batches": 0, "default_root_dir": str(folder / "run")}
    trainer |= dict.fromkeys(["logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"], False)
    config: dict[str, Any] = {
        "trainer": trainer,
        "model": {"name_or_path": str(model), "lora": {"rank": 2}},
        "data": {"train": "text.txt", "seq_len": 16, "num_samples": 4, "batch_size": 2},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (callbacks.setdefault(section, {}) if "." in section else config[section])[key] = value
    config["trainer"]["callbacks"] = [{"class_path": name, "init_args": args} for name, args in callbacks.items()]
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "fit.yaml")


# ---- settings


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["1", "1.5", "-0.1"])
def test_sparsity_out_of_range(complain_of_pruning: Complain, method: str, sparsity: str) -> None:
    said = complain_of_pruning(f"--method={method}", f"--method.sparsity={sparsity}")
    assert said.startswith(f"sparsity is {float(sparsity)}, but it is a fraction in [0, 1)")


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_out_of_reach(complain_of_pruning: Complain, method: str) -> None:
    said = complain_of_pruning(f"--method={method}", "--method.sparsity=0.999")
    assert said.startswith("sparsity 0.999 is out of reach")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "--method=CFP",
            "no method 'CFP'; known methods: BestOf, CFSP, FASP, FLAP, LearnedGates, REAP, TwoSSP; did you mean CFSP?",
        ),
        (
            "--method=flap",
            "no method 'flap'; known methods: BestOf, CFSP, FASP, FLAP, LearnedGates, REAP, TwoSSP; did you mean FLAP?",
        ),
        ("--method=no.such.Method", "no.such.Method: No module named 'no'"),
        ("--method=plprune.FLOP", "no attribute 'FLOP'; did you mean FLAP?"),
        (
            "--method=[CFSP]",
            "method: expected the name of a PruningMethod, or class_path and init_args. Got value: ['CFSP']",
        ),
        ("--method={class_path: CFSP, init_args: null}", "CFSP: init_args must map names to values"),
        ("--config=text.txt", "a configuration must map options to values, but this one is 'So it goes"),
        ("--method.sparsty=0.1", "no option 'sparsty'; did you mean sparsity?"),
        ("--method.sparsity=many", "sparsity: expected float. Got value: many"),
        ("--method.sparsity=nan", "sparsity: expected float. Got value: nan"),
        ("--method.serve_on=[vllm]", "serve_on is not a setting of a method: give `serve_on` beside `method`"),
        (
            "--method.target_memory=1G",
            "target_memory is not a setting of a method: give `target.memory` beside",
        ),
        ("--target=1G", "target is 1G, but must be given by its settings: target.memory"),
        ("--target.memry=1G", "unrecognized arguments: --target.memry=1G; did you mean --target.memory?"),
        ("--serve_on=[olama]", "serve_on: expected 'llama.cpp', 'vllm', 'decilm', 'transformers'. Got value: olama"),
        ("--tensor_parallel=0", "tensor_parallel is 0, but must be a number of devices: 1 or more"),
        ("--tensor_parallel=3", "block 0 has 4 kv heads, but 3 devices can share only 3"),
        ("--serve_on=[decilm]", "an FFN of width 48 cannot be a multiple of 256"),
        ("--method.score=relativ", "score: expected 'activation', 'relative'. Got value: relativ"),
        ("--dtype=float8", "dtype: expected 'float32', 'bfloat16', 'float16'. Got value: float8"),
        ("--dtpe=float16", "unrecognized arguments: --dtpe=float16; did you mean --dtype?"),
        ("--sparsity=0.1", "unrecognized arguments: --sparsity=0.1; did you mean --method.sparsity?"),
        ("--seed=none", "seed: expected int. Got value: none"),
        ("--seed=-1", "seed is -1, but must be at least 0"),
        ("--seed=99999999999999999999", "seed is 99999999999999999999, but must be at least 0 and less than 2**32"),
        ("--text=", "a text has no name"),
        ("--method.sparsity=null", "sparsity has no value"),
        ("--target.batch=null", "target.batch: expected int. Got value: None"),
        ("--method.damping=null", "damping has no value"),
        ("--method.sparsity=.nan", "sparsity is nan, but it is a fraction"),
        ("--serve_on=null", "serve_on: expected Sequence. Got value: None"),
        ("--batch_size=0", "batch_size is 0, but must be at least 1"),
        ("--device=gpu", "there is no device 'gpu' here"),
    ],
)
def test_options_of_prune(complain_of_pruning: Complain, given: str, said: str) -> None:
    assert said in complain_of_pruning(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("fti", "fit"), ("valdate", "validate"), ("tests", "test"), ("prnue", "prune"), ("eval", "evaluate")],
)
def test_unknown_command(complain: Complain, given: str, meant: str) -> None:
    said = complain(given, "--config=a.yaml")
    assert said.startswith(f"no command '{given}'; known commands: fit, validate, test, plan, prune, evaluate")
    assert f"did you mean {meant}?" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__seqlen": 16}, "no option 'data.seqlen'; did you mean data.seq_len?"),
        ({"trainer__max_steps": -1}, "needs an end of training: set trainer.max_steps or trainer.max_epochs"),
        ({"trainer__devices": -1}, "the trainer does not take this: `devices` selected with `CPUAccelerator`"),
        ({"trainer__max_step": 1}, "no option 'trainer.max_step'; did you mean trainer.max_steps?"),
        ({"model__dtype": "float8"}, "model.dtype: expected 'float32', 'bfloat16', 'float16'. Got value: float8"),
        ({"data__max_windows": "all"}, "data.max_windows: expected int. Got value: all"),
        ({"plprune.Prune__method": {"class_path": "CFP"}}, "no method 'CFP'; known methods: BestOf, CFSP, FASP"),
        ({"plprune.Prune__methd": 1}, "plprune.Prune: no option 'methd'; did you mean method?"),
        ({"plprune.Prnue__method": 1}, "has no attribute 'Prnue'; did you mean Prune?"),
        ({"plprune.Prune__method": {"class_path": "FLAP", "init_args": {"sparsity": 2}}}, "sparsity is 2.0, but"),
        ({"plprune.Prune__method": {"class_path": "FLAP", "init_args": {"sparsity": 0.999}}}, "is out of reach"),
        (
            {"plprune.Prune__method": "CFSP", "plprune.Prune__target": {"parameters": "1K"}},
            "target.parameters 1K is out",
        ),
        ({"plprune.Prune__method": "CFSP", "plprune.Prune__serve_on": ["decilm"]}, "48 cannot be a multiple of 256"),
        ({"plprune.Prune__method": "CFSP", "plprune.Prune__tensor_parallel": None}, "tensor_parallel has no value"),
        ({"data__num_samples": 10_000}, "but num_samples is 10000: give more text, or lower num_samples"),
        ({"data__seq_len": 10_000}, "but a window needs 10000: give more text"),
        ({"data__train": "no.txt"}, "no.txt does not exist"),
        ({"data__seq_len": None}, "data.seq_len has no value: give one, or leave it out if it has a default"),
        ({"model__lora": {"rank": None}}, "model.lora.rank has no value"),
        ({"model__lora": 5}, "model.lora is 5, but must be given by its settings: rank, alpha, dropout"),
        ({"data__train": ""}, "a text has no name"),
        ({"data__seed": -1}, "seed is -1, but must be at least 0"),
        ({"data__held_out": 1.5}, "held_out is 1.5, but it is a fraction in (0, 1)"),
        ({"model__name_or_path": "no/where"}, "no/where"),
        ({"plprune.Checkpoint__keep": 1}, "there is a Checkpoint in trainer.callbacks, but trainer.enable"),
        ({"plprune.Export__output": "text.txt"}, "is not empty: choose another output, or pass --overwrite"),
    ],
)
def test_configurations_of_fit(complain: Complain, model: Path, here: Path, changes: dict[str, Any], said: str) -> None:
    assert said in complain("fit", "--config", fit_config(here, model, **changes))


@pytest.mark.parametrize("section", ["trainer", "data"])
def test_a_section_without_options(complain: Complain, model: Path, here: Path, section: str) -> None:
    config = yaml.safe_load(Path(fit_config(here, model)).read_text()) | {section: None}
    (here / "none.yaml").write_text(yaml.safe_dump(config))
    assert f"{section} is None, but must hold options" in complain("validate", "--config=none.yaml")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seq_len": None}, "seq_len has no value"),
        ({"max_dropped": None}, "max_dropped has no value"),
        ({"calibration": [{"text": "text.txt", "num_samples": None}]}, "calibration.num_samples has no value"),
        ({"recover": {"text": "text.txt", "distill": {"weight": None}}}, "recover.distill.weight has no value"),
        ({"sparsities": "many"}, "sparsities: expected Sequence. Got value: many"),
    ],
)
def test_configurations_of_compare(complain: Complain, here: Path, changes: dict[str, Any], said: str) -> None:
    config = {"models": ["no"], "methods": [{"class_path": "CFSP"}], "output": "out", "text": "text.txt"}
    (here / "compare.yaml").write_text(yaml.safe_dump(config | changes))
    assert said in complain("compare", "--config=compare.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_a_configuration_for_gpus_without_one(complain: Complain, model: Path, here: Path, strategy: str) -> None:
    shipped = Path(__file__).parents[1] / "configs" / "strategy" / f"{strategy}.yaml"
    said = complain("fit", "--config", fit_config(here, model), "--config", shipped)
    assert said.startswith("there is no GPU here: give --trainer.accelerator cpu")


def test_deepspeed_that_is_not_installed(
    complain: Complain, model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fit_config(here, model, trainer__strategy={"class_path": "plprune.training.strategies.DeepSpeed"})
    present = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else present(name, *a)
    )
    said = complain("fit", "--config", config)
    assert said == "the strategy DeepSpeed needs DeepSpeed: pip install 'plprune[deepspeed]'"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fit"], "required: fit.model.name_or_path"),
        (["fit", "--config=no.yaml"], "no.yaml"),
        (["fit", "--data.seqlen=3", "--model.name_or_path=a"], "--data.seqlen=3; did you mean --data.seq_len?"),
        (["evaluate"], "required: model"),
        (["prune", "a", "--output=b"], "required: method"),
        (["evaluate", "a", "--maxwindows=3"], "did you mean --max_windows?"),
        (["evaluate", "a", "--max_windows=0"], "max_windows is 0, but must be at least 1 and less than 2**31"),
        (["plan", "a", "--method=CFSP", "--context=9999999999"], "context is 9999999999, but must be at least 1 and"),
        (["evaluate", ""], "a model has no name"),
        (["evaluate", "absent"], "; give a folder, a .gguf file, or ORG/NAME of a hub that can be reached"),
    ],
)
def test_command_lines(complain: Complain, args: list[str], said: str) -> None:
    assert said in complain(*args)


def test_what_nobody_foresaw_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("plprune.cli._run", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["prune"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said == "plprune: error: unexpected error: KeyError: 'a\\nb' (PLPRUNE_DEBUG=1 shows where)\n"
    monkeypatch.setenv("PLPRUNE_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["prune"])


def test_a_broken_configuration(complain: Complain, here: Path) -> None:
    (here / "fit.yaml").write_text("model: {\ndata\n")
    assert "parsing config" in complain("fit", "--config=fit.yaml")


# ---- texts


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"too short", "num_samples is 4: give more text, or lower num_samples"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 (byte 3): convert it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2, is not JSON"),
        (
            "a.jsonl",
            b'{"body": "a"}\n',
            "none of its 1 rows can be used: 1 dropped, as a row with the columns ['body']",
        ),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "as its text has half of a surrogate pair (first at line 1)"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl is not JSON"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000, "a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl, line 1, is not JSON (Exceeds the limit"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "a.jsonl is not UTF-8 (byte 1)"),
        ("a.json", b"[1, 2]", "a.json is not an array of JSON objects"),
        ("a.json", b"[]", "a.json is empty"),
        ("a.json", b'{\n "data": []\n}', "a.json, line 1, is not JSON"),
        ("a.jsonl.gz", b"\x1f\x8b", "a.jsonl.gz is of no known kind"),
        ("a.parquet", b"PAR1", "a.parquet is not a Parquet file"),
        ("a.csv", b"a", "a.csv is of no known kind"),
    ],
)
def test_bad_texts(complain_of_pruning: Complain, here: Path, name: str, content: bytes, said: str) -> None:
    (here / name).write_bytes(content)
    assert said in complain_of_pruning(f"--text={name}")


@pytest.mark.parametrize("command", ["prune", "evaluate", "sensitivity", "export", "fit"])
def test_tokens_that_the_embedding_lacks(complain: Complain, model: Path, here: Path, command: str) -> None:
    words = load_tokenizer(str(model))
    words.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|tool|>"]})  # type: ignore[arg-type]
    larger = shutil.copytree(model, here / "larger")
    words.save_pretrained(larger)
    (here / "a.txt").write_text("<|user|>So it goes. " * 100)
    options = {
        "prune": ["--method=CFSP", "--output=out", *CALIBRATION],
        "sensitivity": ["--output=out", *CALIBRATION],
        "export": ["--output=out", "--seq_len=16"],
    }
    given = [larger, "--text=a.txt", *options.get(command, ["--seq_len=16"])]
    if command == "fit":
        given = ["--config", fit_config(here, larger, data__train="a.txt")]
    said = complain(command, *given)
    assert said.startswith("the text has tokens that the embedding, of 300 rows, has none for: <|user|> (300); use the")


def test_evaluation_of_a_text_that_is_too_short(complain: Complain, model: Path, here: Path) -> None:
    (here / "a.txt").write_text("short")
    assert "the evaluation text has" in complain("evaluate", model, "--text=a.txt")


# ---- models


def variant(model: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(model, folder)
    damage(folder)
    return folder


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return damage


def with_value(name: str, value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[name][:] = value
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return damage


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, size)


def garbled(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[8:200] = os.urandom(192)
        (folder / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (with_config(model_type="t5", architectures=None), "'t5' is an encoder-decoder"),
        (with_config(model_type="mixtral"), "does not hold the model of its config.json"),
        (with_config(model_type="lama"), "lama"),
        (cut("config.json", 50), "config.json"),
        (cut("model.safetensors", 0), "model.safetensors is missing, truncated or corrupted"),
        (cut("model.safetensors", 50_000), "model.safetensors is missing, truncated or corrupted"),
        (garbled("model.safetensors"), "model.safetensors is missing, truncated or corrupted"),
        (cut("tokenizer.json", 1000), "cannot load a tokenizer from"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_damaged_models(
    complain_of_pruning: Complain, model: Path, here: Path, damage: Callable[[Path], None], said: str
) -> None:
    assert said in complain_of_pruning(model=variant(model, here / "damaged", damage))


@pytest.mark.parametrize("name", ["no", "/no/where", "no/where", "./no", "no.gguf", "package://no/where.gguf"])
@pytest.mark.parametrize("command", ["plan", "prune", "evaluate"])
def test_a_model_that_is_not_there(complain: Complain, command: str, name: str) -> None:
    options = {"plan": ["--method=FLAP"], "prune": ["--method=FLAP", "--output=out", "--text=text.txt", *CALIBRATION]}
    assert name in complain(command, name, *options.get(command, ["--text=text.txt"]))


def test_a_folder_and_a_file_that_are_no_model(complain_of_pruning: Complain, here: Path) -> None:
    (here / "folder").mkdir()
    (here / "file").write_text("no model")
    for name in ("folder", "file"):
        assert f"{name} is not a model" in complain_of_pruning(model=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_name_the_block(
    complain_of_pruning: Complain, model: Path, here: Path, method: str, value: float
) -> None:
    damaged = variant(model, here / "damaged", with_value("model.layers.1.mlp.up_proj.weight", value))
    said = complain_of_pruning(f"--method={method}", model=damaged)
    assert said.startswith("NaN or infinity in the activations of block 1")


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors", 50_000),
        garbled("model.safetensors"),
        lambda folder: (folder / "model.safetensors").unlink(),
        cut("plan.safetensors", 100),
        garbled("plan.safetensors"),
    ],
)
def test_damaged_pruned_models(complain: Complain, pruned: Path, here: Path, damage: Callable[[Path], None]) -> None:
    damaged = variant(pruned, here / "damaged", damage)
    assert str(damaged) in complain("evaluate", damaged, "--text=text.txt", "--seq_len=16")


def test_the_plan_of_another_model(complain: Complain, pruned: Path, here: Path) -> None:
    other = save_tiny(here / "other", intermediate_size=80)
    main(["prune", other, "--method=FLAP", "--output=theirs", "--text=text.txt", *CALIBRATION])
    mixed = here / "mixed"
    shutil.copytree(pruned, mixed)
    shutil.copy(here / "theirs" / "plan.safetensors", mixed)
    assert f"plan and weights of {mixed} disagree" in complain("evaluate", mixed, "--text=text.txt")


# ---- output


def test_an_output_that_is_not_empty(complain_of_pruning: Complain, model: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    assert "exists and is not empty: choose another output, or pass --overwrite" in complain_of_pruning()
    assert (here / "out" / "mine.txt").read_text() == "mine"
    args = ["--method=CFSP", "--output=out", "--text=text.txt", *CALIBRATION]
    main(["prune", str(model), *args, "--overwrite"])
    assert "mine.txt" not in tree(here / "out")
    assert (here / "out" / "plan.safetensors").exists()


@pytest.mark.parametrize("output", [".", "text.txt", "text.txt/out"])
def test_an_output_that_cannot_be(complain_of_pruning: Complain, output: str) -> None:
    assert complain_of_pruning(f"--output={output}")


@pytest.mark.parametrize("given", [["plan", "--method=CFSP"], ["evaluate"], ["report"]])
@pytest.mark.parametrize(("output", "said"), [("folder.html", "folder.html is a folder"), ("", "html")])
def test_an_output_that_is_a_file(
    complain: Complain, pruned: Path, here: Path, given: list[str], output: str, said: str
) -> None:
    (here / "folder.html").mkdir()
    command, *more = given
    said = said if output or command == "report" else "the output path is empty"
    assert said in complain(command, pruned, f"--output={output}", *more)


# ---- real processes


def start(here: Path, *command: str, **env: str) -> subprocess.Popen[str]:
    (here / "text.txt").write_text("So it goes. " * 100)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(here)])
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=here,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a runner in the background ignores it
    )


def test_a_real_process(tmp_path: Path, model: Path) -> None:
    args = ["prune", str(model), "--method=CFSP", "--method.sparsity=2", "--output=out", "--text=text.txt"]
    quiet, debug = (start(tmp_path, "-m", "plprune", *args, PLPRUNE_DEBUG=value) for value in ("", "1"))
    out, err = quiet.communicate(timeout=120)
    assert (quiet.returncode, out) == (1, "")
    assert err.splitlines() == [f"plprune: error: {err.removeprefix('plprune: error: ').rstrip()}"]
    _, err = debug.communicate(timeout=120)
    assert debug.returncode == 1
    assert "_run_module_as_main" in err  # a traceback, from the first frame on
    assert tree(tmp_path) == {"text.txt"}


FULL = """
import os, resource, sys
from plprune.cli import main

def written():
    return sorted(os.path.join(folder, f) for folder, _, files in os.walk(".") for f in files)

before = written()
for command in ("prune", "fit"):
    for size in (100, 500, 1500, 4000, 20_000, 100_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))  # Python ignores SIGXFSZ
        try:
            main(sys.argv[1:] if command == "prune" else ["fit", "--config=fit.yaml"])
        except SystemExit as stop:
            assert stop.code == 1, stop.code
        else:
            raise AssertionError("it was written")
        new = set(written()) - set(before)
        assert not any("out" in name or "/." in name for name in new), new
        assert not os.path.exists("out") and not any(name.startswith(".") for name in os.listdir()), os.listdir()
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path: Path, model: Path) -> None:
    fit_config(tmp_path, model)
    (tmp_path / "full.py").write_text(FULL)
    args = ["prune", str(model), "--method=CFSP", "--output=out", "--text=text.txt", *CALIBRATION]
    process = start(tmp_path, "full.py", *args)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = [line for line in err.splitlines() if line.startswith("plprune: error: ")]
    assert len(lines) == 12
    assert all("cannot write" in line and "File too large" in line for line in lines)


SLOW = """
import time
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
from plprune import CFSP

def wait():
    Path("reached").touch()
    time.sleep(100)

@dataclass(frozen=True)
class Pruning(CFSP):
    def prune(self, model, batches):
        wait()

@dataclass(frozen=True)
class Saving(CFSP):
    def prune(self, model, batches):
        family = type(model)
        save = family.save_pretrained
        def save_and_wait(*args, **kwargs):
            save(*args, **kwargs)
            wait()
        family.save_pretrained = save_and_wait
        return super().prune(model, batches)

class Training(pl.Callback):
    def on_train_batch_start(self, *_):
        wait()
"""


@pytest.fixture(scope="module")
def interrupted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, Any]]]:
    """Processes that wait in the middle of something, side by side because each takes seconds to start."""
    processes: dict[str, tuple[Path, Any]] = {}
    for name in ("Pruning", "Saving", "Training"):
        here = tmp_path_factory.mktemp(name)
        (here / "slow.py").write_text(SLOW)
        args = ["prune", str(model), f"--method=slow.{name}", "--output=out", "--text=text.txt", *CALIBRATION]
        if name == "Training":
            args = ["fit", "--config", fit_config(here, model, "slow.Training")]
        processes[name] = here, start(here, "-m", "plprune", *args)
    yield processes
    for _, process in processes.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Pruning", "Saving", "Training"])
def test_interrupt(interrupted: dict[str, tuple[Path, Any]], name: str) -> None:
    here, process = interrupted[name]
    patience = time.monotonic() + 120
    while not (here / "reached").exists() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "plprune: error: interrupted; nothing half-written is left behind"
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    left = {path for path in tree(here) if not path.startswith("run")}
    assert left - {"fit.yaml"} == {"text.txt", "slow.py", "reached"}


# ---- an adapter beside a model


@pytest.fixture(params=["beside", "alone"])
def adapted(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    """A folder with an adapter, and with or without the weights that it is for."""
    folder = tmp_path / "adapted"
    get_peft_model(load_model(str(model)), LoraConfig(target_modules=["up_proj"])).save_pretrained(str(folder))
    if request.param == "beside":
        shutil.copytree(model, folder, dirs_exist_ok=True)
    return folder


def test_an_adapter_is_refused_by_whoever_opens_a_model(adapted: Path) -> None:
    said = "beside the weights: move" if (adapted / "config.json").exists() else "and no model: merge it"
    for load in (load_model, load_skeleton, load_pruned, load_tokenizer, open_streamed):
        with pytest.raises(ValueError, match=f"holds an adapter {said}.*merge_and_unload"):
            load(str(adapted))


def test_the_command_that_merges_an_adapter(model: Path, adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="python -c") as refused:
        load_model(str(adapted))
    (adapted / "config.json").unlink(missing_ok=True)
    monkeypatch.chdir(adapted.parent)
    names = {"MODEL": str(model), "ADAPTER": "adapted", "MERGED": "merged"}
    exec(str(refused.value).split("'")[1], names)
    assert torch.equal(logits(load_model("merged")), logits(load_model(str(model))))


# ---- outputs that are links to nothing


def test_a_link_to_nothing_is_refused_before_a_model_is_loaded(complain: Complain, model: Path, here: Path) -> None:
    (here / "link").symlink_to(here / "gone")
    more = [str(model), "--text=text.txt", "--output=link"]
    for command in (
        ["prune", *more, "--method=CFSP"],
        ["prune", *more, "--method=CFSP", "--stream"],
        ["evaluate", *more],
        ["export", *more],
        ["sensitivity", *more],
        ["plan", str(model), "--method=CFSP", "--output=link"],
    ):
        assert "link links to" in complain(*command)
