"""Reports: every number is the JSON's, and whatever a run leaves gives a page."""

import ast
import json
import logging
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import yaml
from markupsafe import escape

from plprune import CFSP, Evaluate, Export, LoRA, Prune, Recovery, RecoveryData, Report, TwoSSP, prune, report
from plprune.cli import main
from plprune.io.units import Form, format_value
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import plan_of
from plprune.report.comparison import plots
from plprune.report.page import MARK
from plprune.report.records import collect, of_plan, this_process, with_true_status
from plprune.report.samples import continuations
from plprune.report.summary import summarised
from tests.builders import save_tiny, tiny, tokenizer, windows
from tests.probes import StopAfter, Stopped

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
EVIL = "<script>alert('1')</script> & \"more\""


def measured(perplexity: float, share: float = 1.0) -> dict[str, Any]:
    sizes = {"block_parameters": round(share * 106_202_880), "parameters": round(share * 106_202_880) + 28_312_128}
    return {"perplexity": perplexity} | sizes | {"bytes": 4 * sizes["parameters"], "tokens_per_second": 412.345 / share}


def scores(value: float) -> dict[str, Any]:
    return {"metric": "acc", "value": value, "stderr": 0.0101234, "scores": [0.0, 1.0], "others": {}}


def speed(rate: float) -> dict[str, Any]:
    figure = {"median": rate, "low": rate / 1.03, "high": rate * 1.02}
    return {"device": "cpu", "threads": 2, "reading": figure, "writing": figure, "peak": None, "widths": [1, 2, 3]}


def run_record(blocks: int = 30) -> dict[str, Any]:
    """A run as large as that of a real model."""
    random = Random(0)
    units = [(random.randrange(4), random.randrange(500, 1500)) for _ in range(blocks)]
    left = [random.randrange(2_000_000, 3_540_096) for _ in units]
    return {
        "version": 1,
        "kind": "run",
        "title": f"SmolLM2 pruned by CFSP {EVIL}",
        "status": "finished",
        "progress": {"step": 50, "steps": 50},
        "asked": {"method": "CFSP", "settings": {"sparsity": 0.2, "serve_on": ["gguf"]}, "sparsity": 0.2},
        "reached": {"sparsity": 0.200043, "sparsity_of_model": 0.157912, "parameters": 113_274_560},
        "blocks": [
            {
                "kept": {"attention": [heads, 3], "ffn": [channels, 1536]},
                "heads": list(range(heads)),
                "parameters": [3_540_096, after],
                "importance": random.random(),
                "rank": random.randrange(1, 32),
            }
            for (heads, channels), after in zip(units, left, strict=True)
        ],
        "stages": {"dense": measured(21.345678), "pruned": measured(58.1, 0.8), "recovered": measured(29.98, 0.8)},
        "loss": [[step, 2.2 + 2 * math.exp(-step / 14)] for step in range(1, 51)],
        "tasks": {stage: {"arc_easy": scores(value)} for stage, value in (("dense", 0.51), ("recovered", 0.47))},
        "differences": {"arc_easy": {"value": -0.04, "stderr": 0.006}},
        "speed": {"dense": speed(25.1), "recovered": speed(27.9)},
        "not_faster": [f"odd widths {EVIL}"],
        "parity": {
            "rows": [
                {"format": "gguf", "program": "llama.cpp b6082", "difference": 2.13e-4, "same_text": True, "bytes": 10},
                {"format": "decilm", "refused": ["block 3 keeps 2 of 3 kv heads"], "difference": None},
            ],
            "text": {"windows": 4, "tokens": 1024},
        },
        "generated": [{"prompt": EVIL, "dense": " Paris.", "pruned": " the the", "recovered": EVIL}],
        "config": {"seed_everything": 0, "data": {"train": EVIL, "seq_len": 256}, "model": {"learning_rate": 5e-4}},
        "versions": {"torch": "2.13.0"},
        "seeds": {"run": 0, "calibration": 7},
        "fingerprints": {"weights": "a0b1c2d3e4f50617"},
    }


def cell(model: str, method: str, sparsity: float, seed: int, stage: str, perplexity: float) -> dict[str, Any]:
    share, known = 1 - sparsity, Random(f"{method} {sparsity}")
    return measured(perplexity, share) | {
        "model": model,
        "method": method,
        "settings": {"structure": "AL-AM"},
        "sparsity": sparsity,
        "seed": seed,
        "stage": stage,
        "bits_per_byte": math.log2(perplexity) / 4,
        "reached": sparsity + 1e-4,
        "tasks": {task: scores(0.6 - sparsity / 4 + i / 20) for i, task in enumerate(("arc_easy", "piqa"))},
        "average": 0.6 - sparsity / 4 + 0.025,
        "speed": speed(25 / share),
        "widths": {
            "attention": [known.randrange(4) for _ in range(30)],
            "ffn": [round(1536 * share * (0.8 + 0.4 * known.random())) for _ in range(30)],
        },
        "importance": [known.random() + 0.1 for _ in range(30)],
        "seconds": {"prune": 12.3456},
    }


def comparison_record(models: tuple[str, ...] = ("SmolLM2", f"gemma {EVIL}"), seeds: int = 2) -> dict[str, Any]:
    """Four methods, four sparsities, two stages."""
    cells = [cell(model, "dense", 0.0, 0, "dense", 21.3 + i) for i, model in enumerate(models)]
    for i, model in enumerate(models):
        for k, method in enumerate(("CFSP", "FASP", "FLAP", "TwoSSP")):
            for sparsity in (0.125, 0.25, 0.375, 0.5):
                for seed in range(seeds):
                    worse = (1 + 0.1 * k) * (21.3 + i) * math.exp(5 * sparsity) + seed
                    cells.append(cell(model, method, sparsity, seed, "pruned", worse))
                    cells.append(cell(model, method, sparsity, seed, "recovered", 21.3 + i + worse / 3))
    cells.append({"model": models[0], "method": "FLAP", "sparsity": 0.9, "stage": "pruned", "error": f"no way {EVIL}"})
    protocol = {"text": "wikitext-2", "seq_len": 512, "recovery": {"steps": 50, "learning_rate": 5e-4}}
    return {"kind": "comparison", "title": "Methods", "status": "finished", "protocol": protocol, "cells": cells}


def sensitivity_record() -> dict[str, Any]:
    random = Random(0)
    cells = [
        {"block": block, "kind": kind, "fraction": fraction, "perplexity": 21.5 + 40 * fraction * random.random()}
        for block in range(30)
        for kind in ("attention", "ffn")
        for fraction in (0.25, 0.5, 1.0)
    ]
    cells[-1]["perplexity"] = None
    title = {"kind": "sensitivity", "title": "Sensitivity", "model": f"SmolLM2 {EVIL}", "protocol": {"seq_len": 512}}
    return title | {"dense": 21.345678, "fractions": [0.25, 0.5, 1.0], "cells": cells}


RECORDS = {"run": run_record(), "comparison": comparison_record(), "sensitivity": sensitivity_record()}
every_kind = pytest.mark.parametrize("kind", RECORDS)


class Reader(HTMLParser):
    """What a page says: its numbers, its scripts, and all its other text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {"": []}
        self._within: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link"):
            self._within.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._within.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._within]
        if "data" in tags:
            self.numbers.append((self._within[-1][1], data))
        else:
            place = next((tag for tag in ("style", "script", "svg", "pre") if tag in tags), "")
            self.text.setdefault(place, []).append(data)


def at(record: Any, path: str | None) -> Any:
    for key in (path or "")[1:].split("/"):
        record = record[int(key)] if isinstance(record, list) else record[key.replace("~1", "/").replace("~0", "~")]
    return record


def values(record: Any) -> list[Any]:
    """All values at the ends of a record."""
    inner = record.values() if isinstance(record, dict) else record if isinstance(record, list) else None
    return [record] if inner is None else [value for each in inner for value in values(each)]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for kind, record in RECORDS.items():
        report.write(record, folder / f"{kind}.html")
    return folder


def read(pages: Path, kind: str) -> tuple[Reader, dict[str, Any]]:
    return Reader((pages / f"{kind}.html").read_text()), json.loads((pages / f"{kind}.json").read_text())


@every_kind
def test_every_number_is_that_of_the_json(pages: Path, kind: str) -> None:
    page, record = read(pages, kind)
    assert len(page.numbers) > 100
    for attributes, text in page.numbers:
        value = at(record, attributes["data-path"])
        assert attributes["value"] == repr(value)
        assert text == format_value(value, cast(Form, attributes["data-form"]))


@every_kind
def test_no_other_number_is_on_the_page(pages: Path, kind: str) -> None:
    """Digits are in what was given as text, in counted blocks, and nowhere else."""
    page, record = read(pages, kind)
    given = " ".join(str(value) for value in values(record) if isinstance(value, str)) + json.dumps(record)
    allowed = {str(i) for i in range(30)} | {"1"}  # block numbers; batch 1
    words = set(re.findall(r"\S*\d\S*", " ".join(page.text[""])))
    assert [word for word in words if word not in allowed and word.strip("(),:;") not in given] == []


@every_kind
def test_the_charts_draw_the_numbers_of_the_json(pages: Path, kind: str) -> None:
    page, record = read(pages, kind)
    known = {float(value) for value in [*values(record), *range(30)] if isinstance(value, int | float)}  # and blocks
    drawn = [attributes for _, attributes in page.tags if attributes.keys() & {"data-value", "data-x", "data-y"}]
    assert len(drawn) > 50
    for attributes in drawn:
        for name in attributes.keys() & {"data-value", "data-x", "data-y"}:
            assert float(attributes[name] or "") in known


def test_the_json_has_nothing_that_the_page_of_a_run_has_not(pages: Path) -> None:
    page, record = read(pages, "run")
    paths = {attributes["data-path"] for attributes, _ in page.numbers}
    for key in ("reached", "blocks", "stages", "loss", "parity", "seeds", "differences"):
        for name, value in flat(record[key], f"/{key}"):
            if isinstance(value, int | float) and not isinstance(value, bool) and "/heads/" not in name:
                assert name in paths
    assert yaml.safe_load("".join(page.text["pre"])) == record["config"]
    for value in values({key: record[key] for key in ("asked", "versions", "fingerprints", "generated", "title")}):
        assert not isinstance(value, str) or value in "".join(page.text[""])


def flat(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [each for key, inner in pairs for each in flat(inner, f"{path}/{key}")]
    return [(path, value)]


def test_the_templates_are_in_the_package() -> None:
    names = {each.name for each in resources.files("plprune.report").joinpath("templates").iterdir()}
    assert names == {"chart.css", "page.html", "pieces.html", "sort.js", "style.css"}
    assert MARK in report.html({"kind": "run"})[:400]


def test_only_templates_and_charts_have_tags() -> None:
    for file in Path(report.__file__).parent.glob("*.py"):
        trees = ast.walk(ast.parse(file.read_text()))
        texts = [node.value for node in trees if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        tags = [text for text in texts if re.search("</?[a-z]", text)]
        assert bool(tags) == (file.name in ("charts.py", "svg.py"))


@every_kind
def test_a_page_loads_nothing_and_runs_nothing_that_was_given(pages: Path, kind: str) -> None:
    page, _ = read(pages, kind)
    assert [tag for tag, _ in page.tags].count("script") == 1
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "use", "image")
        assert not attributes.keys() & {"src", "onclick", "onload", "onerror"}
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in "".join(page.text["style"])
    assert "alert('1')" in "".join(page.text[""])


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("run", "/loss/0"),
        ("run", "/stages/dense"),
        ("run", "/blocks/0/rank"),
        ("run", "/blocks/0/parameters"),
        ("run", "/parity/rows/0"),
        ("comparison", "/cells/0/model"),
        ("comparison", "/cells/1/speed"),
        ("comparison", "/cells/1/widths/ffn/0"),
        ("sensitivity", "/cells/0/kind"),
        ("sensitivity", "/cells/0/perplexity"),
    ],
)
def test_what_is_not_as_it_should_be_is_shown_safely_or_refused(kind: str, path: str) -> None:
    records = {"run": run_record(2), "comparison": comparison_record(("m",), 1), "sensitivity": sensitivity_record()}
    place, _, last = path.rpartition("/")
    for wrong in (f"'\"{EVIL}", [], {EVIL: EVIL}, 10**400, -1, math.nan, None, True):
        record = json.loads(json.dumps(records[kind]))
        at(record, place)[int(last) if last.isdecimal() else last] = wrong
        told = page_or_error(record)
        assert told.startswith("the record is not as plprune writes them (") or told.count("<script>") == 1


def page_or_error(record: dict[str, Any]) -> str:
    try:
        return report.html(with_true_status(record))
    except ValueError as error:
        return str(error)


@every_kind
def test_nothing_but_the_kind_is_needed(kind: str) -> None:
    assert "<h1>" in report.html({"kind": kind})
    whole = RECORDS[kind] if kind != "comparison" else comparison_record(("m",), seeds=1)
    for key in whole.keys() - {"kind"}:
        assert Reader(report.html({name: value for name, value in whole.items() if name != key})).text[""]


def test_a_part_of_a_kind_that_is_unknown_is_shown_with_true_status() -> None:
    assert "hours: 7" in report.html(run_record() | {"cost": {"hours": 7}})


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'novel' is unknown: give one of run, comparison, sensitivity"):
        report.html({"kind": "novel"})


def test_what_json_cannot_say_is_said_in_words(tmp_path: Path) -> None:
    record = {"kind": "run", "stages": {"pruned": {"perplexity": math.inf}}, "config": {"folder": tmp_path}}
    record["title"] = "caf\udce9"  # how Python has a name of a file that is no UTF-8
    report.write(record, tmp_path)
    read = json.loads((tmp_path / "report.json").read_text())
    assert "<h1>caf?</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert read["stages"]["pruned"]["perplexity"] == "inf"
    assert read["config"]["folder"] == str(tmp_path)


def test_a_report_replaces_nothing_unasked(tmp_path: Path) -> None:
    report.write(run_record(3), tmp_path / "a.html")
    before = (tmp_path / "a.html").read_bytes()
    with pytest.raises(FileExistsError, match="choose another output, or pass --overwrite"):
        report.write(run_record(4), tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes() == before
    report.write(run_record(4), tmp_path / "a.html", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.json"]
    (tmp_path / "own.html").write_text("<h1>mine</h1>")
    with pytest.raises(FileExistsError, match="is no report of plprune"):
        report.check_replaceable(tmp_path / "own.html")


def test_completing_twice_changes_nothing() -> None:
    once = report.completed(comparison_record())
    assert report.completed(once) == once
    assert "scores" not in json.dumps(once)


def test_seeds_are_summarised_by_mean_and_range() -> None:
    rows = summarised(comparison_record(("m",))["cells"])
    assert len(rows) == 1 + 4 * 4 * 2
    row = next(row for row in rows if (row["name"], row["sparsity"], row["stage"]) == ("CFSP", 0.25, "pruned"))
    assert row["seeds"] == 2
    low, high = row["perplexity_range"]
    assert high == low + 1
    assert row["perplexity"] == pytest.approx((low + high) / 2)
    assert row["perplexity_deviation"] == pytest.approx(math.sqrt(0.5))
    assert row["average"] == pytest.approx(0.6 - 0.25 / 4 + 0.025)
    assert "stderr" not in row["tasks"]["piqa"]
    alone = summarised(comparison_record(("m",), seeds=1)["cells"])
    assert alone[1]["tasks"]["piqa"]["stderr"] == 0.0101234
    assert "perplexity_range" not in alone[1]


def test_what_is_in_a_group_is_marked_and_has_no_column_of_a_comparison() -> None:
    record = run_record(3)
    for own in record["tasks"].values():
        own |= {"mmlu": scores(0.3), "mmlu_anatomy": scores(0.2) | {"group": "mmlu"}}
    assert ">mmlu<" in (page := report.html(record))
    assert ">↳ mmlu_anatomy<" in page
    record = comparison_record(("m",))
    for own in record["cells"]:
        own.get("tasks", {}).get("piqa", {})["group"] = "arc_easy"
    assert "arc_easy</th>" in (page := report.html(record))
    assert "piqa</th>" not in page


def test_settings_tell_one_method_twice_apart() -> None:
    cells = [cell("m", "FLAP", 0.2, 0, "pruned", 30.0) | {"settings": {"structure": s}} for s in ("AL-AM", "UL-UM")]
    assert [row["name"] for row in summarised(cells)] == ["FLAP (structure AL-AM)", "FLAP (structure UL-UM)"]


def test_texts_and_recoveries_have_columns_and_rows_of_their_own() -> None:
    record = comparison_record(("m",))
    for each in [c for c in record["cells"] if c["stage"] == "recovered"]:
        record["cells"].append({**each, "stage": "another", "perplexity": each["perplexity"] + 1})
    for each in record["cells"]:
        each["texts"] = {EVIL: {"perplexity": 7.5 + (each.get("seed") or 0), "bits_per_byte": 1.0}}
    page = report.html(record)
    row = next(row for row in report.completed(record)["summary"] if row["sparsity"] == 0.125)
    assert row["texts"][EVIL]["perplexity_range"] == [7.5, 8.5]
    assert f"perplexity on {escape(EVIL)}</th>" in page
    assert page.index("<td>pruned</td>") < page.index("<td>recovered</td>") < page.index("<td>another</td>")
    before = plots(report.completed(comparison_record(("m",))))
    assert plots(report.completed(record)) == before  # the first recovery is the one that is plotted


def test_models_share_no_plot_but_that_of_bits_per_byte() -> None:
    record = report.completed(comparison_record(("one", "two")))
    names = {"perplexity", "tasks", "speed", "attention-widths", "ffn-widths", "importance"}
    assert plots(record).keys() == {f"{model}-{name}" for model in ("one", "two") for name in names}
    page = report.html(record)
    assert "does not compare across tokenizers" in page
    assert page.count("Bits per byte against size</title>") == 1
    assert "does not compare" not in report.html(comparison_record(("one",)))


def test_a_model_whose_name_begins_with_another_has_its_own_plots() -> None:
    page = report.html(comparison_record(("SmolLM2", "SmolLM2-Instruct")))
    assert page.count(">Block importance</title>") == 2


@pytest.mark.parametrize("status", ["running", "stopped"])
def test_a_run_that_has_not_ended_says_so_first(status: str) -> None:
    page = report.html(run_record(3) | {"status": status, "progress": {"step": 12, "steps": 50}, "reason": "SIGTERM"})
    text = " ".join(re.sub(r"<[^>]+>", "", page.split('role="status">')[1].split("</p>")[0]).split())
    expected = "was still going" if status == "running" else "was stopped"
    assert text.startswith(f"This run {expected} after 12 of 50 steps (SIGTERM)")


def test_blocks_are_counted_over_all_prunings() -> None:
    model = tiny()
    prune(model, TwoSSP(0.2), [windows()])
    first = of_plan(plan_of(model))  # type: ignore[arg-type]
    prune(model, CFSP(0.3), [windows()])
    plan: PruningPlan = plan_of(model)  # type: ignore[assignment]
    record = of_plan(plan)
    for i, block in enumerate(record["blocks"]):
        left = len(plan.keep[f"blocks.{i}.ffn"])
        assert block["kept"]["ffn"] == [left, 48]
        assert left <= first["blocks"][i]["kept"]["ffn"][0]
        assert block["parameters"] == [plan.chain()[0].before[i], plan.after[i]]
        kept = block["kept"].get("attention", first["blocks"][i]["kept"].get("attention"))
        assert kept[1] == 4
        assert len(block["heads"]) == kept[0]
    assert record["reached"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["fingerprints"]["plan"] == plan.digest


def test_texts_are_continued_greedily() -> None:
    model = tiny().train()
    said = continuations(model, tokenizer(), ["if the", "else"], new_tokens=5)
    ids = tokenizer()("else", return_tensors="pt").input_ids
    for _ in range(5):
        ids = torch.cat([ids, model.eval()(ids).logits[:, -1:].argmax(-1)], 1)
    assert said[1] == tokenizer().decode(ids[0, -5:], skip_special_tokens=True)
    assert len(said) == 2


def test_prompts_with_tokens_that_the_embedding_lacks() -> None:
    with pytest.raises(ValueError, match="the text has tokens that the embedding, of 200 rows, has none for"):
        continuations(tiny(vocab_size=200), tokenizer(), ["if the"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def fit(root: Path, model: str, *extra: pl.Callback, steps: int = 6, **how: Any) -> tuple[Report, Recovery]:
    text = root.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    data = RecoveryData(str(text), seq_len=16, batch_size=2, num_samples=4, held_out=0.2)
    own, module = Report(prompts=["the quick", EVIL]), Recovery(model, learning_rate=5e-3, lora=LoRA(rank=4))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [Evaluate(), own, *extra, Prune(CFSP(0.3))]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=root,
        callbacks=callbacks,
        limit_val_batches=0,
        log_every_n_steps=1,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, datamodule=data, **how)
    return own, module


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory) -> tuple[Path, list[int]]:
    """The folder of a run, and its LoRA ranks."""
    root = tmp_path_factory.mktemp("finished") / "run"
    _, module = fit(root, model, Export(str(root / "out")))
    return root, module.ranks


def test_a_fit_leaves_a_report(finished: tuple[Path, list[int]]) -> None:
    root, ranks = finished
    record, page = json.loads((root / "report.json").read_text()), (root / "report.html").read_text()
    assert record["status"] == "finished"
    assert record["progress"] == {"step": 6, "steps": 6}
    assert list(record["stages"]) == ["dense", "pruned", "recovered"]
    assert [step for step, _ in record["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [block["rank"] for block in record["blocks"]] == ranks
    assert [each["prompt"] for each in record["generated"]] == ["the quick", EVIL]
    assert all(list(each) == ["prompt", "dense", "pruned", "recovered"] for each in record["generated"])
    assert record["config"]["model"]["lora"]["rank"] == 4
    assert record["versions"].keys() >= {"plprune", "torch", "transformers", "lightning", "peft"}
    assert record["fingerprints"].keys() == {"weights", "calibration", "plan"}
    for attributes, text in Reader(page).numbers:
        assert text == format_value(at(record, attributes["data-path"]), cast(Form, attributes["data-form"]))
    kept = collect(root / "out")
    assert kept["blocks"] == [{k: v for k, v in block.items() if k != "rank"} for block in record["blocks"]]
    assert kept["stages"]["recovered"]["perplexity"] == record["stages"]["recovered"]["perplexity"]
    assert report.html(kept)


def test_a_fit_of_the_command_line_keeps_its_configuration(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    quiet = {
        "accelerator": "cpu",
        "max_steps": 1,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
    }
    quiet |= {"enable_progress_bar": False, "callbacks": [{"class_path": "Report", "init_args": {"prompts": []}}]}
    own = {"train": "text.txt", "seq_len": 16, "batch_size": 2}
    Path("fit.yaml").write_text(yaml.safe_dump({"trainer": quiet, "model": {"name_or_path": model}, "data": own}))
    main(["fit", "--config=fit.yaml"])
    record = json.loads(Path("report.json").read_text())
    assert record["config"]["data"]["train"] == "text.txt"
    assert record["config"]["trainer"]["max_steps"] == 1
    assert record["seeds"]["run"] == record["config"]["seed_everything"]
    assert (record["status"], record["generated"], "blocks" in record) == ("finished", [], False)


def test_a_run_that_ended_before_training_shows_its_plan(finished: tuple[Path, list[int]], tmp_path: Path) -> None:
    root, whole = tmp_path, json.loads((finished[0] / "report.json").read_text())
    shutil.copytree(finished[0] / "plans", root / "plans")
    assert collect(root)["reason"] == "there is only its plan"
    early: dict[str, Any] = {key: whole[key] for key in ("kind", "asked", "stages", "title")} | {"status": "stopped"}
    (root / "report.json").write_text(json.dumps(early))
    again = collect(root)
    assert [block["kept"] for block in again["blocks"]] == [block["kept"] for block in whole["blocks"]]
    assert (again["stages"], again["status"]) == (whole["stages"], "stopped")
    early["asked"]["settings"] = {"sparsity": 0.7}
    (root / "report.json").write_text(json.dumps(early))
    assert "blocks" not in collect(root)


class Save(pl.Callback):
    """Writes a checkpoint after a step, as `Checkpoint` does."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "3.ckpt")


def test_a_stopped_run_leaves_a_report_and_goes_on_with_it(model: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    with pytest.raises(Stopped):
        fit(root, model, Save(), StopAfter(4))
    first = json.loads((root / "report.json").read_text())
    assert first["status"] == "stopped"
    assert first["reason"] == "Stopped"
    assert [step for step, _ in first["loss"]] == [1, 2, 3, 4]
    assert list(first["stages"]) == ["dense", "pruned"]
    fit(root, model, ckpt_path=root / "3.ckpt")
    second = json.loads((root / "report.json").read_text())
    assert second["status"] == "finished"
    assert "reason" not in second
    assert [step for step, _ in second["loss"]] == [1, 2, 3, 4, 5, 6]
    assert second["loss"][:4] == first["loss"]
    assert list(second["stages"]) == ["dense", "pruned", "recovered"]
    for before, after in zip(first["generated"], second["generated"], strict=True):
        assert after.items() >= before.items()
        assert "recovered" in after


def test_what_was_asked_is_what_is_asked_now() -> None:
    own = Report()
    own.record = {"config": {"max_steps": 9}, "loss": [], "stages": {}}
    own.load_state_dict({"config": {"max_steps": 3}, "loss": [[1, 2.0]], "stages": {"dense": {}}, "written": "before"})
    assert own.record == {"config": {"max_steps": 9}, "loss": [[1, 2.0]], "stages": {"dense": {}}}


def test_a_report_that_cannot_be_written_stops_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [ValueError("what is that"), *[OSError("no space left on device")] * 9]

    def full(*_: Any, **__: Any) -> None:
        raise errors.pop(0)

    monkeypatch.setattr("plprune.report.write", full)
    with caplog.at_level(logging.WARNING):
        own, _ = fit(tmp_path / "run", model, steps=1)
    assert own.record["status"] == "finished"
    assert "no report: what is that" in caplog.text
    assert "no report: no space left on device" in caplog.text


def test_a_long_run_keeps_some_points_of_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plprune.training.callbacks.report.POINTS", 4)
    own, steps = Report(), range(1, 12)
    own.record = {"loss": []}
    monkeypatch.setattr(own, "_progress", lambda trainer: None)
    monkeypatch.setattr(own, "_write", lambda trainer: None)
    for step in [0, *steps, 11]:  # batches of the first step, and of one that was begun
        trainer: Any = SimpleNamespace(global_step=step, log_every_n_steps=1, callback_metrics={"train_loss": 0.5})
        own.on_train_batch_end(trainer, Any, None, None, 0)  # type: ignore[arg-type]
    found = [step for step, _ in own.record["loss"]]
    assert found[0] == 1
    assert found[-1] == 11
    assert len(found) <= 4


def test_a_page_of_another_is_not_replaced(model: str, tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    (root / "report.html").write_text("mine")
    with pytest.raises(FileExistsError, match="is no report of plprune"):
        fit(root, model)
    assert (root / "report.html").read_text() == "mine"


def test_a_running_run_whose_process_is_gone_was_stopped() -> None:
    running = {"kind": "run", "status": "running", "process": this_process()}
    assert with_true_status(running)["status"] == "running"
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = with_true_status(running | {"process": this_process() | {"pid": ended.pid}})
    assert (gone["status"], gone["reason"]) == ("stopped", "its process is gone")
    for pid in (None, "1", 10**30):
        assert with_true_status(running | {"process": this_process() | {"pid": pid}})["status"] == "stopped"
    assert with_true_status(running | {"process": [1]})["status"] == "running"
    elsewhere = running | {"process": {"host": "elsewhere", "pid": ended.pid}}
    assert with_true_status(elsewhere)["status"] == "running"


def test_the_command_says_that_a_run_is_going_or_was_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = run_record(3) | {"progress": {"step": 12, "steps": 50}}
    report.write(half | {"status": "running", "process": this_process()}, tmp_path)
    main(["report", str(tmp_path)])
    assert "the run is still going at step 12 of 50: the report shows it so far" in capsys.readouterr().out
    report.write(half | {"status": "stopped", "reason": "SIGTERM"}, tmp_path, overwrite=True)
    main(["report", str(tmp_path), f"--output={tmp_path / 'b.html'}"])
    assert "the run was stopped at step 12 of 50 (SIGTERM): the report shows what" in capsys.readouterr().out
    assert "was stopped" in (tmp_path / "b.html").read_text()


def test_the_command_collects_what_lies_in_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {key: value for key, value in run_record(3).items() if key not in ("tasks", "speed", "parity")}
    report.write(bare, tmp_path)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "parity.json").write_text(json.dumps(run_record(3)["parity"]))
    evaluation = {"kind": "run", "title": "evaluation", "protocol": {"pruned": {"seq_len": 77}}}
    evaluation |= {"stages": {"pruned": measured(31.5)}, "tasks": {"pruned": {"piqa": scores(0.6)}}}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "broken.json").write_text("{")
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"saved to {tmp_path / 'report.html'}\n"
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["parity"] == report.completed(run_record(3))["parity"]
    assert record["tasks"]["recovered"]["piqa"]["value"] == 0.6
    assert record["evaluation"]["recovered"]["perplexity"] == 31.5
    assert record["stages"]["recovered"]["perplexity"] == 29.98
    page = (tmp_path / "report.html").read_text()
    assert "llama.cpp b6082" in page
    assert "seq len" in page
    main(["report", str(tmp_path)])  # what it has written itself changes nothing
    assert json.loads((tmp_path / "report.json").read_text()) == record


@pytest.mark.parametrize("kind", ["comparison", "sensitivity"])
def test_the_command_takes_other_kinds(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"{kind}.json").write_text(json.dumps(RECORDS[kind]))
    main(["report", str(tmp_path)])
    assert json.loads((tmp_path / "report.json").read_text())["kind"] == kind
    main(["report", str(tmp_path / f"{kind}.json"), f"--output={tmp_path / 'b.html'}"])
    assert "<svg" in (tmp_path / "b.html").read_text()


def test_the_command_leaves_alone_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, text = tmp_path / "report.json", json.dumps(run_record(2))  # has what a report leaves out
    file.write_text(text)
    main(["report", str(file)])
    assert "<svg" in (tmp_path / "report-report.html").read_text()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "report.json exists and is no report of plprune" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "does not exist: name the folder of a run"),
        ({}, "nothing to report in .*: there is no report.json, plan.safetensors, or"),
        ({"other.json": '{"kind": "novel"}'}, "nothing to report in"),
        ({"report.json": "{"}, "report.json is truncated or no JSON"),
        ({"report.json": "[]"}, "holds no record of plprune"),
    ],
)
def test_nothing_to_report_is_one_line(
    tmp_path: Path, write: dict[str, str] | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if write is not None:
        folder.mkdir()
        for name, text in write.items():
            (folder / name).write_text(text)
    with pytest.raises(SystemExit):
        main(["report", str(folder)])
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert not (folder / "report.html").exists()


PROBE = """<script>addEventListener("load",()=>{const wide=[...document.querySelectorAll("body *")].filter(e=>
!e.closest(".scroll,svg,pre")&&e.getBoundingClientRect().right>innerWidth+1).length;
parent.postMessage([innerWidth,document.documentElement.scrollWidth,wide,document.querySelectorAll("svg").length]
.join(" "),"*")})</script></body>"""


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    common = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    command = [BROWSER, *common, "--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no headless browser: install chromium or google-chrome")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@every_kind
def test_a_real_browser_shows_it(pages: Path, tmp_path: Path, kind: str, width: int, dark: bool) -> None:
    import numpy
    from PIL import Image

    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size, picture = f"--window-size={width},1600", tmp_path / "page.png"
    inside = tmp_path / "inside.html"  # a window of a browser has a least width, a frame has not
    probed = tmp_path / "probed.html"
    probed.write_text((pages / f"{kind}.html").read_text().replace("</body>", PROBE))
    frame = f'<body style="margin:0"><iframe src="{probed.as_uri()}" style="border:0;width:{width}px;height:1600px">'
    inside.write_text(f"<script>onmessage=e=>document.title=e.data</script>{frame}</iframe>")
    shot = browse(inside, tmp_path / "profile", size, scheme, f"--screenshot={picture}")
    assert not re.search(r"CONSOLE|Uncaught|SyntaxError", shot.stderr), shot.stderr
    pixels = numpy.asarray(Image.open(picture).convert("L"), dtype=float)
    assert pixels.std() > 10
    assert (numpy.median(pixels) < 80) == dark
    dom = browse(inside, tmp_path / "profile", size, scheme, "--dump-dom").stdout
    found = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", dom)
    assert found is not None
    inner, scroll, too_wide, charts = map(int, found.groups())
    assert (inner, scroll, too_wide) == (width, width, 0)
    assert charts >= 1
