"""lm-eval's tasks on a model in memory, against plain loops and lm-eval's own command line."""

import copy
import dataclasses
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.checkpoint.save import save_pruned
from plprune.cli import main
from plprune.evaluation import lm_eval
from plprune.evaluation.lm_eval import check_tasks, run_tasks
from plprune.evaluation.task_results import Difference, TaskResult, average, columns, paired, score_table
from plprune.methods import prune
from tests.builders import jsonl, method, save_tiny, tiny, tokenizer, windows
from tests.shared import shared

pytest.importorskip("lm_eval", reason="no lm-eval: pip install 'plprune[eval]'")

QUESTIONS = [
    {"question": f"What comes after {i}?", "choices": [f"{i + 1}", f"{i - 1} or so", "if"], "answer": i % 3}
    for i in range(12)
]
TASK = """
task: {name}
tag: toys
dataset_path: own/{data}
output_type: multiple_choice
training_split: train
validation_split: validation
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
WORDS = """
task: words
dataset_path: own/words
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
metadata: {version: 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Task files: `toy` has a validation split only, `full` has all; `lost` has no data; `words` is a perplexity."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "data"
    for name, splits in {"toy": ["validation"], "full": ["train", "test"], "words": ["validation"]}.items():
        (place / "own" / name).mkdir(parents=True)
        for split in splits:
            jsonl(place / "own" / name / f"{split}.jsonl", QUESTIONS)
    for name in ("toy", "full", "lost"):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, data=name))
    (place / "words.yaml").write_text(WORDS)
    return str(place)


@pytest.fixture
def groups(folder: str) -> str:
    """`outer` is scored over the examples of `inner` and `full`, `inner` over its tasks; `unscored` has no score."""
    place = Path(folder)
    (place / "lost.yaml").unlink()
    (place / "own/short").mkdir()
    jsonl(place / "own/short/validation.jsonl", QUESTIONS[2:7])
    (place / "short.yaml").write_text(TASK.format(name="short", data="short").replace("tag: toys\n", ""))
    members = {"outer": ("[inner, full]", True), "inner": ("[toy, short]", False), "unscored": ("[inner, full]", None)}
    for name, (listed, by_size) in members.items():
        scored = f"aggregate_metric_list: [{{metric: acc, weight_by_size: {by_size}}}]\n"
        text = f"group: {name}\ntask: {listed}\n" + ("" if by_size is None else scored)
        (place / f"{name}.yaml").write_text(text)
    return folder


@torch.no_grad()
def slow_score(model: Any, row: dict[str, Any]) -> float:
    """Whether the answer is the most probable of the choices."""

    def ids(text: str) -> list[int]:
        return list(tokenizer()(text, add_special_tokens=False).input_ids)

    likelihoods = []
    for choice in row["choices"]:
        context, whole = f"Question: {row['question']}\nAnswer:", f"Question: {row['question']}\nAnswer: {choice}"
        start, tokens = len(ids(context)), torch.tensor([ids(whole)])
        scores: Tensor = model(input_ids=tokens).logits[0].double().log_softmax(-1)
        likelihoods.append(sum(float(scores[t - 1, tokens[0, t]]) for t in range(start, tokens.shape[1])))
    return float(likelihoods.index(max(likelihoods)) == row["answer"])


def test_scores_are_those_of_a_plain_loop(folder: str) -> None:
    model, here = tiny(), Path.cwd()
    found = run_tasks(model, tokenizer(), ["toy"], folder=folder, batch_size=3)["toy"]
    expected = [slow_score(model, row) for row in QUESTIONS]
    assert found.scores == expected
    assert found.value == statistics.fmean(expected)
    assert found.stderr == pytest.approx(statistics.stdev(expected) / math.sqrt(len(expected)))
    assert found.metric == "acc"
    assert found.higher_is_better
    assert set(found.others) == {"acc_norm"}
    assert Path.cwd() == here
    assert TaskResult(**json.loads(json.dumps(dataclasses.asdict(found)))).scores == found.scores


def test_a_run_leaves_the_model_and_the_random_state_as_they_were(folder: str) -> None:
    model = tiny().train()
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
    first = run_tasks(model, tokenizer(), ["toy"], limit=3, folder=folder)
    after = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]
    assert before == after
    assert model.training
    assert len(first["toy"].scores) == 3
    assert run_tasks(model, tokenizer(), ["toy"], limit=3, folder=folder) == first


def test_a_tag_stands_for_its_tasks_and_a_split_of_its_own_is_used(folder: str) -> None:
    Path(folder, "lost.yaml").unlink()
    found = run_tasks(tiny(), tokenizer(), ["toys"], limit=4, folder=folder)
    assert set(found) == {"toy", "full"}
    assert found["toy"].scores == found["full"].scores  # the same rows, once as validation, once as test


def test_a_group_has_a_score_of_its_own_and_counts_once(groups: str) -> None:
    dense, pruned = (run_tasks(tiny(seed=seed), tokenizer(), ["outer", "words"], folder=groups) for seed in (0, 1))
    assert list(dense) == ["outer", "inner", "toy", "short", "full", "words"]
    assert [result.group for result in dense.values()] == [None, "outer", "inner", "inner", "outer", None]
    for found in (dense, pruned):
        documents = [score for name in ("toy", "short", "full") for score in found[name].scores]
        assert found["outer"].value == pytest.approx(statistics.fmean(documents))
        assert found["inner"].value == pytest.approx((found["toy"].value + found["short"].value) / 2)
        assert found["inner"].stderr == pytest.approx(
            math.hypot(*(found[name].stderr or 0 for name in ("toy", "short"))) / 2
        )
        assert columns({"model": found})["model"].get("average") is None  # of one figure that counts
    changes = columns({"dense": dense, "pruned": pruned})["difference"]
    for name in ("outer", "inner"):
        change = changes[name]
        assert change is not None
        assert change.value == pytest.approx(pruned[name].value - dense[name].value)
    assert changes["inner"] == average(changes[name] for name in ("toy", "short"))  # type: ignore[misc]
    errors = {name: change.stderr or 0 for name, change in changes.items() if change is not None}
    sizes = {"toy": 12, "short": 5, "full": 12}
    assert errors["outer"] == pytest.approx(math.hypot(*(sizes[name] / 29 * errors[name] for name in sizes)))
    rows = [line[:10].rstrip() for line in score_table({"dense": dense, "pruned": pruned}).splitlines()]
    assert rows == ["task", "outer", "  inner", "    toy", "    short", "  full", "words"]
    assert TaskResult(**json.loads(json.dumps(dataclasses.asdict(dense["outer"])))).value == dense["outer"].value


def test_the_average_is_over_what_was_asked_for(groups: str) -> None:
    found = run_tasks(tiny(), tokenizer(), ["inner", "full"], folder=groups)
    assert columns({"model": found})["model"]["average"] == average([found["inner"], found["full"]])
    assert run_tasks(tiny(), tokenizer(), ["unscored"], folder=groups) == found  # only stands for what is in it


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    name = "a_task_with_a_name_that_is_longer_than_any_column_was"
    first, second = score_table({"model": {name: made(0.5, [])}, "m" * 40: {name: made(0.25, [])}}).splitlines()
    assert second.split() == [name, "acc", "0.5000", "±", "0.1000", "0.2500", "±", "0.1000", "-"]
    assert first.index("metric") == second.index("acc")
    assert first.index("mm") == second.index("0.2500")
    assert first.index("difference") == second.index("-")


def test_a_metric_that_is_no_mean_has_no_scores(folder: str) -> None:
    dense, pruned = (run_tasks(tiny(seed=seed), tokenizer(), ["words"], folder=folder)["words"] for seed in (0, 1))
    assert dense.metric == "word_perplexity"
    assert dense.value > 1
    assert not dense.higher_is_better
    assert dense.scores == []
    assert paired(dense, pruned) is None
    assert "word_perplexity" in score_table({"dense": {"words": dense}, "pruned": {"words": pruned}})


def test_results_are_paired_example_by_example(folder: str) -> None:
    dense, pruned = (run_tasks(tiny(seed=seed), tokenizer(), ["toy"], folder=folder)["toy"] for seed in (0, 1))
    found = paired(dense, pruned)
    changes = np.array(pruned.scores) - np.array(dense.scores)
    assert found is not None
    assert found.value == pytest.approx(pruned.value - dense.value)
    assert found.stderr == pytest.approx(changes.std(ddof=1) / math.sqrt(len(changes)))
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(dense, run_tasks(tiny(), tokenizer(), ["toy"], limit=3, folder=folder)["toy"])
    with pytest.raises(ValueError, match="cannot be paired"):
        paired(dense, dataclasses.replace(dense, metric="acc_norm"))


def made(value: float, scores: list[float]) -> TaskResult:
    return TaskResult("acc", value, 0.1, True, scores, "", {})


def test_the_table_has_models_differences_and_averages() -> None:
    dense = {"a": made(0.5, [1.0, 0.0]), "b": made(1.0, [1.0, 1.0]), "c": made(9.0, [])}
    pruned = {"a": made(0.0, [0.0, 0.0]), "b": made(1.0, [1.0, 1.0]), "c": made(8.0, [])}
    found = columns({"dense": dense, "pruned": pruned})
    assert found["dense"]["average"] == average([dense["a"], dense["b"]])
    assert found["difference"]["average"] == Difference(-0.25, 0.25)
    lines = [line.split() for line in score_table({"dense": dense, "pruned": pruned}).splitlines()]
    assert lines[0] == ["task", "metric", "dense", "pruned", "difference"]
    assert lines[1] == ["a", "acc", *["0.5000", "±", "0.1000", "0.0000", "±", "0.1000", "-0.5000", "±", "0.5000"]]
    assert lines[3][-1] == "-"
    assert lines[4] == ["average", *["0.7500", "±", "0.0707", "0.5000", "±", "0.0707", "-0.2500", "±", "0.2500"]]
    alone = score_table({"model": dense}).splitlines()
    assert [line.split()[0] for line in alone] == ["task", "a", "b", "c", "average"]


def test_one_example_has_no_standard_error() -> None:
    assert paired(made(1.0, [1.0]), made(0.0, [0.0])) == Difference(-1.0, None)
    assert average([Difference(1.0, None), Difference(0.0, 0.5)]) == Difference(0.5, None)
    assert average([]) is None


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("bos", [None, False, True])
def test_prompts_begin_with_bos_where_it_is_asked_for_or_the_tokenizer_does(
    folder: str, monkeypatch: pytest.MonkeyPatch, bos: bool | None, own: bool
) -> None:
    words, firsts, model = copy.deepcopy(tokenizer()), set(), tiny()
    if own:
        parts: Any = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
        words.backend_tokenizer.post_processor = TemplateProcessing(**parts)  # type: ignore[assignment]
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: firsts.update(args[0][:, 0].tolist()))
    run_tasks(model, words, ["toy"], folder=folder, limit=2, bos=bos)
    assert (firsts == {1}) == (own if bos is None else bos)


def test_prompts_with_tokens_that_the_embedding_lacks(folder: str) -> None:
    with pytest.raises(ValueError, match="the text has tokens that the embedding, of 200 rows, has none for"):
        run_tasks(tiny(vocab_size=200), tokenizer(), ["toy"], folder=folder, limit=2)


# ---- faults, before any model is loaded


def index_of(folder: str | None) -> Any:
    """lm-eval's index without its own tasks, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toi", "no task 'toi'; did you mean toy"),
        ("nothing_like_it", "no task 'nothing_like_it'; `lm_eval ls tasks` lists them"),
        ("lost", "no benchmark files for lost: "),
    ],
)
def test_tasks_that_cannot_be_run(folder: str, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr(lm_eval, "_manager", lambda names, folder: index_of(folder))
    with pytest.raises(ValueError, match=said) as fault:
        check_tasks([name], folder)
    assert name != "lost" or f"{folder}/own/lost does not exist" in str(fault.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["outer", "inner"], "inner is in outer: leave it out"),
        (["inner", "outer"], "inner is in outer: leave it out"),
        (["toy", "inner"], "toy is in inner: leave it out"),
        (["inner", "toys"], "inner and toys both contain toy: run them one after the other"),
    ],
)
def test_groups_that_overlap(groups: str, monkeypatch: pytest.MonkeyPatch, names: list[str], said: str) -> None:
    monkeypatch.setattr(lm_eval, "_manager", lambda names, folder: index_of(folder))
    with pytest.raises(ValueError, match=said):
        check_tasks(names, groups)


def test_folders_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="no benchmark files: no/where is not a folder"):
        check_tasks(["toy"], "no/where")


def test_lm_eval_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs lm-eval: pip install 'plprune\[eval\]'"):
        check_tasks(["some_task"])


def test_data_without_anything_to_judge_by(folder: str) -> None:
    (Path(folder) / "own/full/test.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot load the tasks full"):
        check_tasks(["full"], folder)


def test_the_command_looks_at_tasks_before_it_loads_a_model(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules["plprune.commands.evaluate"]  # the package has the function under this name
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    args = ["--seq_len=8", "--max_windows=1", "--tasks=lost", f"--task_data={folder}"]
    with pytest.raises(SystemExit):
        main(["evaluate", save_tiny(tmp_path / "m"), *args])
    assert "no benchmark files for lost" in capsys.readouterr().err


def test_the_command_prints_tasks_and_speed_and_writes_them(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("dense"), max_position_embeddings=256)
    model = load_model("dense")
    prune(model, method("FASP value_channels"), [windows()])
    save_pruned(model, "pruned", tokenizer())
    monkeypatch.setattr("plprune.evaluation.speed.measure_speed.__wrapped__.__defaults__", (8, 4, 2, 2))
    judged = ["--tasks=toy,full", f"--task_data={folder}", "--limit=5", "--speed"]
    main(["evaluate", "pruned", "--seq_len=8", "--max_windows=2", *judged, "--output=out.json"])
    out, record = capsys.readouterr().out, json.loads(Path("out.json").read_text())
    dense, pruned = (TaskResult(**record["tasks"][stage]["toy"]) for stage in ("dense", "pruned"))
    change = record["differences"]["toy"]
    assert dataclasses.asdict(paired(dense, pruned)) == change  # type: ignore[arg-type]
    line = next(line.split() for line in out.splitlines() if line.startswith("toy"))
    assert [line[i] for i in (2, 5, 8, 10)] == [
        f"{value:.4f}" for value in (dense.value, pruned.value, change["value"], change["stderr"])
    ]
    assert set(record["averages"]) == {"dense", "pruned", "difference"}
    assert "the first 5 examples of each task; ± is the standard error" in out
    assert f"{record['speed']['pruned']['writing']['median']:.1f} [" in out
    assert all(line in out for line in record["not_faster"])


# ---- against lm-eval's own command line, and on real data


@pytest.mark.slow
def test_groups_are_scored_as_lm_eval_does(groups: str, tmp_path: Path) -> None:
    for name, split in (
        ("toy", "train"),
        ("toy", "test"),
        ("short", "train"),
        ("short", "test"),
        ("full", "validation"),
    ):
        jsonl(Path(groups) / "own" / name / f"{split}.jsonl", QUESTIONS[2:7] if name == "short" else QUESTIONS)
    save_tiny(tmp_path / "model")
    found = run_tasks(load_model(str(tmp_path / "model")), tokenizer(), ["outer"], folder=groups, batch_size=4)
    theirs = by_lm_eval(groups, tmp_path, "outer")["groups"]
    assert set(theirs) == {"outer", "inner"}
    for name, figures in theirs.items():
        assert (found[name].value, found[name].stderr) == (figures["acc,none"], figures["acc_stderr,none"])


def by_lm_eval(folder: str, room: Path, names: str) -> dict[str, Any]:
    """What its own command line writes of a model in a room."""
    args = f"pretrained={room}/model,dtype=float32,trust_remote_code=True"
    command = ["--model=hf", f"--model_args={args}", f"--tasks={names}", f"--include_path={folder}", "--device=cpu"]
    subprocess.run(
        [sys.executable, "-m", "lm_eval", *command, "--batch_size=4", f"--output_path={room}/out.json"],
        cwd=folder,
        check=True,
        timeout=300,
        capture_output=True,
    )
    (written,) = room.glob("out_*.json")
    return json.loads(written.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "CFSP activation", "FASP value_channels"])
def test_results_are_those_of_lm_eval_on_the_folder(folder: str, tmp_path: Path, name: str) -> None:
    model: Any = tiny()
    if name != "dense":
        prune(model, method(name, 0.3), [windows()])
    save_pruned(model, tmp_path / "model", tokenizer())
    found = run_tasks(load_model(str(tmp_path / "model")), tokenizer(), ["full", "words"], folder=folder, batch_size=4)
    theirs = by_lm_eval(folder, tmp_path, "full,words")["results"]
    assert found["full"].value == theirs["full"]["acc,none"]
    assert found["full"].stderr == theirs["full"]["acc_stderr,none"]
    assert found["full"].others["acc_norm"] == (
        theirs["full"]["acc_norm,none"],
        theirs["full"]["acc_norm_stderr,none"],
    )
    assert found["words"].value == theirs["words"]["word_perplexity,none"]


@pytest.mark.slow
def test_real_tasks_without_a_training_split() -> None:
    place, model = str(shared("data/benchmarks/hf")), str(shared("data/models/stories260k"))
    names = ["hellaswag", "sciq", "copa"]
    found = run_tasks(load_model(model), load_tokenizer(model), names, limit=10, folder=place)
    assert {name: len(found[name].scores) for name in found} == dict.fromkeys(names, 10)
    with pytest.raises(ValueError, match=f"no benchmark files for swag: {place}/allenai/swag does not exist"):
        check_tasks(["swag"], place)
    with pytest.raises(ValueError, match="no task 'arc_esay'; did you mean arc_easy"):
        check_tasks(["arc_esay"])


def test_lm_eval_is_only_asked_for_with_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None if name == "lm_eval" else present(name))
    main(["evaluate", save_tiny(tmp_path / "m"), "--seq_len=8", "--max_windows=1"])
    assert "1 windows of 8 tokens" in capsys.readouterr().out
