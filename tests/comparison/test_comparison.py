"""Comparisons against the same things done by hand; nothing is computed twice, whatever stops the run."""

import dataclasses
import json
import random
import re
import signal
import threading
import time
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import plprune
from plprune import CFSP, FASP, FLAP, Calibration, PruningMethod, Target, TwoSSP, perplexity, prune
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.cli import main
from plprune.comparison import bench
from plprune.comparison.bench import Bench, identity
from plprune.comparison.engine import compare
from plprune.comparison.study import CalibrationText, Study, Training
from plprune.comparison.table import comparison_table
from plprune.evaluation.perplexity import Protocol
from plprune.io.cache import source_digest
from plprune.io.text import draw, tokenised
from plprune.methods import Request
from plprune.recovery.lora import LoRA
from plprune.report.records import with_true_status
from tests.builders import jsonl, numbers, save_tiny
from tests.runs import context

FOUR = (FLAP(), FASP(), CFSP(), TwoSSP())
CONFIGS = sorted((Path(__file__).parents[2] / "configs/compare").glob("*.yaml"))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        models=[save_tiny(tmp_path / "tiny")],
        methods=FOUR,
        sparsities=[0.1, 0.25],
        text=numbers(tmp_path / "text.txt"),
        calibration=numbers(tmp_path / "calibration.txt", 400, 800),
        num_samples=4,
        calibration_seq_len=16,
        protocol=Protocol(16, max_windows=3),
    )


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, int]:
    """How often functions of the module, or `prune` of its requests, are called."""
    counts = dict.fromkeys(names, 0)

    def counting(owner: Any, name: str) -> Any:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in names:
        owner = bench.Request if name == "prune" else bench
        monkeypatch.setattr(owner, name, counting(owner, name))
    return counts


def timeless(record: dict[str, Any]) -> Any:
    """A record without what clocks say, and who wrote it."""
    record = json.loads(json.dumps(record))
    del record["seconds"], record["written"], record["process"]
    for cell in record["cells"]:
        cell.pop("seconds", None)
    for row in record["summary"]:
        for name in [name for name in row if name.startswith("seconds")]:
            del row[name]
    return record


def test_every_cell_is_what_pruning_and_measuring_by_hand_give(study: Study, tmp_path: Path) -> None:
    record = compare(study, tmp_path / "out")
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert [cell["perplexity"] for cell in written["cells"]] == [cell["perplexity"] for cell in record["cells"]]
    assert (tmp_path / "out/report.html").exists()
    assert {path.stem for path in (tmp_path / "out").glob("*.svg")} >= {"tiny-perplexity"}
    tokenizer = load_tokenizer(study.models[0])
    windows = draw(tokenised(str(study.calibration), tokenizer)[0], 4, 16, 0)
    text = list(torch.as_tensor(tokenised(str(study.text), tokenizer)[0][:48]).view(3, 16).split(1))
    cells = record["cells"][1:]
    assert len(cells) == len(FOUR) * 2
    for cell, (method, sparsity) in zip(cells, [(m, s) for m in FOUR for s in (0.1, 0.25)], strict=True):
        model = load_model(study.models[0])
        plan = prune(model, dataclasses.replace(method, sparsity=sparsity), Calibration(list(windows.split(8))), 0)
        assert cell["method"] == type(method).__name__
        assert cell["reached"] == plan.reached
        assert cell["importance"] == plan.importance.tolist()
        assert cell["widths"]["ffn"] == [len(plan.keep[f"blocks.{i}.ffn"]) for i in range(3)]
        assert cell["perplexity"] == pytest.approx(perplexity(model, text), rel=1e-6)
        assert cell["parameters"] == sum(p.numel() for p in model.parameters())


def test_what_is_computed_is_not_computed_again(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataclasses.replace(study, methods=FOUR[:3], sparsities=[0.25])
    before = timeless(compare(first, tmp_path / "out"))
    counts = counted(monkeypatch, "prune", "survey", "judge")
    assert timeless(compare(first, tmp_path / "out")) == before
    assert counts == {"prune": 0, "survey": 0, "judge": 0}
    compare(dataclasses.replace(first, methods=FOUR), tmp_path / "out")
    assert counts == {"prune": 1, "survey": 0, "judge": 1}  # a new method costs itself
    edit("comparison/bench", monkeypatch)  # as its trainer, which is beside what uses it
    compare(dataclasses.replace(first, methods=FOUR[:1]), tmp_path / "out")
    assert counts == {"prune": 2, "survey": 0, "judge": 3}


def test_each_process_takes_what_nobody_is_at(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, out = dataclasses.replace(study, methods=[CFSP(), FLAP()], sparsities=[0.1]), tmp_path / "out"
    whole = timeless(compare(small, tmp_path / "whole"))
    counts = counted(monkeypatch, "prune", "survey", "judge")
    bench = Bench(small, small.models[0], out)
    cfsp = bench.key(small.prunings()[0])
    monkeypatch.setenv("RANK", "1")
    with bench.cache.lock(cfsp):
        cells = compare(small, out)["cells"]
    assert [cell["method"] for cell in cells] == ["dense", "FLAP"]
    assert counts == {"prune": 1, "survey": 1, "judge": 2}
    assert not (out / "report.json").exists()
    monkeypatch.delenv("RANK")
    with ExitStack() as held:
        assert held.enter_context(bench.cache.lock(cfsp))
        threading.Timer(0.3, held.close).start()  # the first waits for it
        assert timeless(compare(small, out)) == whole
    assert counts == {"prune": 2, "survey": 1, "judge": 3}


def test_the_dense_model_is_observed_once_for_each_seed(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = counted(monkeypatch, "survey")
    record = compare(dataclasses.replace(study, seeds=[0, 1]), tmp_path / "out")
    assert counts == {"survey": 2}
    assert {cell["seed"] for cell in record["cells"][1:]} == {0, 1}
    assert re.search(r"\(\d+\.\d\d to \d+\.\d\d\)", comparison_table(record))


def test_recovery_is_a_stage_of_its_own(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(str(study.calibration), steps=3, seq_len=16, batch_size=2, learning_rate=1e-2)
    small = dataclasses.replace(study, methods=[CFSP()], sparsities=[0.25])
    compare(small, tmp_path / "out")
    counts = counted(monkeypatch, "prune", "judge", "trainer")
    record = compare(dataclasses.replace(small, recover=training), tmp_path / "out")
    assert counts == {"prune": 1, "judge": 1, "trainer": 1}
    pruned, recovered = record["cells"][1:]
    assert (pruned["stage"], recovered["stage"]) == ("pruned", "recovered")
    assert pruned["perplexity"] != recovered["perplexity"]
    assert pruned["parameters"] == recovered["parameters"]
    assert recovered["seconds"].keys() == {"prune", "recover", "evaluate"}


def test_recoveries_stand_side_by_side(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Training(str(study.calibration), steps=2, seq_len=16, batch_size=2, learning_rate=1e-2)
    other = dataclasses.replace(first, lora=LoRA(by="uniform"), name="uniform ranks")
    small = dataclasses.replace(study, methods=[CFSP()], sparsities=[0.25], recover=first)
    before = compare(small, tmp_path / "out")["cells"]
    counts = counted(monkeypatch, "prune", "judge", "trainer")
    record = compare(dataclasses.replace(small, recover=[first, other]), tmp_path / "out")
    assert counts == {"prune": 1, "judge": 1, "trainer": 1}  # a further recovery costs itself
    assert record["cells"][:3] == before
    pruned, recovered, uniform = record["cells"][1:]
    assert [cell["stage"] for cell in (pruned, recovered, uniform)] == ["pruned", "recovered", "uniform ranks"]
    assert len({cell["perplexity"] for cell in record["cells"]}) == 4
    assert uniform["seconds"]["prune"] == recovered["seconds"]["prune"]
    assert uniform["seconds"]["recover"] != recovered["seconds"]["recover"]
    assert "| seconds to prune | perplexity, pruned | recovered | uniform ranks | bits" in comparison_table(record)


def test_each_text_has_its_own_perplexity(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(study, methods=[CFSP()], sparsities=[0.25])
    before = compare(small, tmp_path / "out")["cells"]
    counts = counted(monkeypatch, "prune", "judge")
    second = jsonl(tmp_path / "second.jsonl", [{"text": " ".join(map(str, range(i, i + 90)))} for i in (0, 300)])
    texts = [str(study.text), second]
    record = compare(dataclasses.replace(small, text=texts, join="\n\n"), tmp_path / "out")
    assert counts == {"prune": 1, "judge": 2}  # a further text costs itself
    for cell, old in zip(record["cells"], before, strict=True):
        assert cell["perplexity"] == old["perplexity"]
        assert cell["texts"].keys() == {"second"}
    tokenizer = load_tokenizer(study.models[0])
    ids = torch.as_tensor(tokenised(second, tokenizer, "\n\n")[0][:48]).view(3, 16)
    expected = perplexity(load_model(study.models[0]), list(ids.split(1)))
    assert record["cells"][0]["texts"]["second"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert record["summary"][0]["texts"]["second"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert f"| {expected:.2f} |" in comparison_table(record).splitlines()[2]
    assert "| perplexity on second, pruned |" in comparison_table(record)


def test_rounds_end_at_the_sparsity_of_one(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Training(str(study.calibration), steps=3, seq_len=16, batch_size=2, learning_rate=1e-2)
    twice = dataclasses.replace(once, name="two rounds", rounds=2)
    given: list[int] = []
    make = bench.trainer
    monkeypatch.setattr(
        bench, "trainer", lambda device, steps, folder: given.append(steps) or make(device, steps, folder)
    )
    small = dataclasses.replace(study, methods=[CFSP()], sparsities=[0.4], recover=[once, twice])
    record = compare(small, tmp_path / "out")
    assert given == [3, 2, 1]
    pruned, recovered, rounds = record["cells"][1:]
    assert rounds["reached"] == pytest.approx(0.4, abs=0.01)
    assert rounds["reached"] == 1 - rounds["block_parameters"] / record["cells"][0]["block_parameters"]
    assert rounds["widths"] != pruned["widths"] == recovered["widths"]
    assert rounds["perplexity"] != recovered["perplexity"]
    counts = counted(monkeypatch, "prune", "judge")
    assert timeless(compare(small, tmp_path / "out")) == timeless(record)
    assert counts == {"prune": 0, "judge": 0}


def test_texts_of_one_name_keep_their_own(study: Study) -> None:
    texts = ["a/wikitext:two:test", "a/wikitext:103:test", "b/c4"]
    assert list(dataclasses.replace(study, text=texts).texts) == ["a/wikitext:two:test", "a/wikitext:103:test", "c4"]


def test_every_pruning_is_taken_with_every_calibration(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(study.calibration)
    calibrations = [CalibrationText(text, 4, 16), CalibrationText(text, 8, 16, "more")]
    variants = [FLAP(), FLAP(repair="none")]
    small = dataclasses.replace(study, methods=variants, sparsities=[0.25])
    before = compare(small, tmp_path / "out")["cells"]
    counts = counted(monkeypatch, "prune", "survey", "judge")
    record = compare(dataclasses.replace(small, calibration=calibrations, seeds=[0, 1]), tmp_path / "out")
    assert counts == {"prune": 6, "survey": 3, "judge": 6}
    assert [cell["perplexity"] for cell in record["cells"][1:3]] == [cell["perplexity"] for cell in before[1:]]
    assert [row["name"] for row in record["summary"]] == [
        "dense",
        "FLAP (repair compensate, calibration calibration 4 x 16)",
        "FLAP (repair none, calibration calibration 4 x 16)",
        "FLAP (repair compensate, calibration more)",
        "FLAP (repair none, calibration more)",
    ]
    assert {row["seeds"] for row in record["summary"][1:]} == {2}


def test_what_a_method_cannot_do_stops_nothing(study: Study, tmp_path: Path) -> None:
    record = compare(dataclasses.replace(study, methods=[CFSP(), FLAP()], sparsities=[0.97, 0.1]), tmp_path / "out")
    errors = [bool(cell.get("error")) for cell in record["cells"]]
    assert errors == [False, True, False, True, False]
    assert "out of reach" in record["cells"][1]["error"]
    assert "- CFSP at 97.0%: " in comparison_table(record)


def test_models_of_one_name_are_told_apart(study: Study) -> None:
    one = dataclasses.replace(study, models=["runs/a/model", "runs/b/model.gguf"])
    assert list(one.labels.values()) == ["a/model", "b/model"]
    assert list(dataclasses.replace(study, models=["x/model.gguf"]).labels.values()) == ["model"]
    both = dataclasses.replace(study, models=["m", "m.gguf"])
    assert list(both.labels.values()) == ["m", "m.gguf"]


def test_a_killed_comparison_is_no_longer_running(study: Study, tmp_path: Path) -> None:
    record = compare(study, tmp_path / "out")
    running = record | {"status": "running"}
    assert with_true_status(running)["status"] == "running"
    gone = running | {"process": record["process"] | {"pid": 2**22 + 1}}  # above what a system gives
    assert with_true_status(gone)["status"] == "stopped"


def test_a_failure_of_one_cell_stops_nothing(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the input is not positive-definite")

    monkeypatch.setattr("plprune.pruning.repair.restore", fail)
    record = compare(dataclasses.replace(study, methods=[FASP(), CFSP()], sparsities=[0.1]), tmp_path / "out")
    assert [cell.get("error") for cell in record["cells"]] == [None, "the input is not positive-definite", None]


def test_models_keep_their_whole_names(study: Study, tmp_path: Path) -> None:
    models = [save_tiny(tmp_path / "Tiny-0.5B"), save_tiny(tmp_path / "Tiny-0.8B", seed=1)]
    record = compare(dataclasses.replace(study, models=models, methods=[CFSP()], sparsities=[0.1]), tmp_path / "out")
    assert [cell["model"] for cell in record["cells"]] == ["Tiny-0.5B"] * 2 + ["Tiny-0.8B"] * 2


def test_a_method_is_another_once_its_source_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = "from plprune import CFSP\n\n\nclass Mine(CFSP):\n    pass\n"
    (tmp_path / "mine.py").write_text(source)
    own: PruningMethod = import_module("mine").Mine()
    before = identity(Request(own))
    (tmp_path / "mine.py").write_text(source + "\n# another\n")
    assert identity(Request(own)) != before
    same = identity(Request(CFSP()))
    assert identity(Request(CFSP())) == same
    for other in (Request(CFSP(a=2.0)), Request(CFSP(), Target(35_000)), Request(CFSP(), serve_on=["decilm"])):
        assert identity(other) != same


def test_a_helper_beside_a_method_is_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "owned.py").write_text(
        "from plprune import CFSP\nfrom scale import a\n\n\nclass Owned(CFSP):\n    a = a\n"
    )
    (tmp_path / "scale.py").write_text("a = 1\n")
    before = source_digest("owned")
    (tmp_path / "another.py").write_text("")
    assert source_digest("owned") == before
    (tmp_path / "scale.py").write_text("a = 2\n")
    assert source_digest("owned") != before


@pytest.mark.parametrize(
    "name", ["pruning/repair", "pruning/surgery", "pruning/allocation", "planning/sizes", "methods/run", "methods/cfsp"]
)
def test_a_pruning_is_another_once_what_it_is_made_with_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(Request(CFSP())), identity(Request(FASP()))
    edit(name, monkeypatch)
    after = identity(Request(CFSP())), identity(Request(FASP()))
    assert after[0] != before[0]
    assert (after[1] == before[1]) == (name == "methods/cfsp")  # a method costs only itself


@pytest.mark.parametrize("name", ["recovery/distillation", "recovery/lora", "recovery/routers", "training/module"])
def test_what_was_recovered_otherwise_is_recovered_anew(
    name: str, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(str(study.calibration), steps=1, seq_len=16, batch_size=2)
    small = dataclasses.replace(study, methods=[CFSP()], sparsities=[0.25], recover=training)
    compare(small, tmp_path / "out")
    counts = counted(monkeypatch, "prune", "survey", "trainer")
    edit(name, monkeypatch)
    compare(small, tmp_path / "out")
    assert counts == {"prune": 1, "survey": 0, "trainer": 1}


def edit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a module of plprune read as if it had been edited."""
    read = Path.read_text
    edited = Path(plprune.__file__).parent / f"{name}.py"
    assert edited.exists()

    def changed(path: Path, *args: Any, **kwargs: Any) -> str:
        return read(path, *args, **kwargs) + ("# another\n" if path == edited else "")

    monkeypatch.setattr(Path, "read_text", changed)


def test_variants_of_a_method_are_told_apart(study: Study, tmp_path: Path) -> None:
    variants = [FASP(attention="none"), FASP(attention="kv_heads")]
    lines = comparison_table(
        compare(dataclasses.replace(study, methods=variants, sparsities=[0.1]), tmp_path / "out")
    ).splitlines()
    assert [line.split(" | ")[1] for line in lines[3:]] == ["FASP (attention none)", "FASP (attention kv_heads)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ()}, "nothing to compare: `methods` is empty"),
        ({"text": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"text": ["pydoc_data.topics"] * 2}, "`text` has 'pydoc_data.topics' twice"),
        (
            {"calibration": [CalibrationText("pydoc_data.topics")] * 2},
            "`calibration` has .* twice",
        ),
        ({"recover": [Training("pydoc_data.topics")] * 2}, "`recover` has 'recovered' twice"),
        ({"recover": Training("pydoc_data.topics", steps=1, rounds=2)}, "2 rounds share steps, of which there are 1"),
        ({"recover": Training("pydoc_data.topics", seq_len=0)}, "seq_len is 0, but must be at least 1"),
        ({"recover": Training("pydoc_data.topics", learning_rate=float("nan"))}, "learning_rate is nan"),
        ({"recover": Training("pydoc_data.topics", name="pruned")}, "`recover` has 'pruned' twice"),
        ({"tasks": ["arc_easy"], "task_data": "nowhere"}, "no benchmark files: nowhere"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    counts = counted(monkeypatch, "load_model")
    with pytest.raises(ValueError, match=message):
        compare(dataclasses.replace(study, **change), tmp_path / "out")
    assert counts == {"load_model": 0}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_run_on_a_tiny_model(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    family = "qwen2_moe" if "runs/mixture" in path.read_text() else "llama"
    config |= {"models": [save_tiny(tmp_path / "tiny", family)], "text": numbers(tmp_path / "text.txt"), "seq_len": 16}
    config |= {"num_samples": 2, "calibration_seq_len": 16, "max_windows": 2}
    if isinstance(config.get("calibration"), list):
        for each in config["calibration"]:
            each |= {"text": config["text"], "num_samples": 2, "seq_len": 16}
    else:
        config["calibration"] = config["text"]
    config |= {"sparsities": config["sparsities"][:1], "seeds": [0]}
    config = {name: value for name, value in config.items() if name not in ("tasks", "limit", "max_batch")}
    ways = config.get("recover", [])
    for way in ways if isinstance(ways, list) else [ways]:
        way |= {"text": config["text"], "steps": way.get("rounds", 1), "seq_len": 16}
    Path("compare.yaml").write_text(yaml.safe_dump(config))
    main(["compare", "--config", "compare.yaml"])
    assert f"report: {config['output']}/report.html" in capsys.readouterr().out
    assert config["output"] == f"runs/compare/{path.stem}"


@pytest.mark.slow
def test_a_killed_comparison_loses_at_most_the_cell_it_was_in(tmp_path: Path) -> None:
    """Killed at random moments until it ends, it computes each cell once or begins one again."""
    config = {
        "models": [save_tiny(tmp_path / "tiny")],
        "methods": ["FLAP", "FASP", "CFSP", "TwoSSP"],
        "sparsities": [0.2],
        "output": str(tmp_path / "out"),
        "text": numbers(tmp_path / "text.txt"),
        "calibration": str(tmp_path / "text.txt"),
        "num_samples": 4,
        "calibration_seq_len": 16,
        "seq_len": 16,
        "max_windows": 4,
        "recover": {"text": str(tmp_path / "text.txt"), "steps": 2, "seq_len": 16},
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    command = ["compare", "--config", str(tmp_path / "compare.yaml")]
    moments, kills, done = random.Random(0), 0, tmp_path / "out/cells"
    while True:
        process = context.Process(target=main, args=(command,), daemon=True)
        process.start()
        had = len(list(done.glob("*.json"))) if done.exists() else 0
        deadline = time.monotonic() + 600
        target = had + moments.randrange(1, 6)
        while process.exitcode is None and time.monotonic() < deadline:
            if done.exists() and len(list(done.glob("*.json"))) >= target:
                process.kill()
                process.join()
            time.sleep(0.01)
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        kills += 1
        assert len(list(done.glob("*.json"))) >= target  # nothing that was kept is lost
    assert kills >= 2
    killed = json.loads((tmp_path / "out/report.json").read_text())
    main([*command, "--output", str(tmp_path / "whole")])
    assert timeless(killed) == timeless(json.loads((tmp_path / "whole/report.json").read_text()))
