"""Recipes: short options stand for long ones, and a fit says beforehand what it takes and what to expect."""

import dataclasses
import json
import re
from argparse import ArgumentError
from pathlib import Path

import pytest
import yaml

import plprune
from plprune import load_pruned
from plprune.cli import main
from plprune.planning.hardware import Machine
from plprune.pruning.surgery import plan_of
from plprune.training import recipes
from plprune.training.recipes import Point, expanded, expectation, find, folder, points
from tests.builders import save_tiny

NAMES = ["balanced", "best", "fast"]
HERE = Path(__file__).parents[2] / "configs" / "recipes"
POINT = Point("a model", "a text", "CFSP", "restore", 0.25, "64 x 512", "lora", 32_000, 32_000, 1.5)


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    with pytest.raises(SystemExit) as end:
        main(["fit", *args, "--print_config"])
    assert not end.value.code
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_config_and_what_is_given_overrides_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--trainer.max_steps", "7", "some/model", "--data", "text.txt", "--model.lora.rank=3", "--resume"]
    found = printed(capsys, "--recipe", name, "--sparsity=0.4", *given)
    long = [f"--config={HERE / name}.yaml", "--model.name_or_path=some/model", "--data.train=text.txt", "--resume"]
    long += ["--trainer.max_steps=7", "--model.lora.rank=3", "--trainer.callbacks.method.sparsity=0.4"]
    assert found == printed(capsys, *long)
    assert (found["trainer"]["max_steps"], found["model"]["lora"]["rank"], found["resume"]) == (7, 3, True)
    assert (found["model"]["name_or_path"], found["data"]["train"]) == ("some/model", "text.txt")
    assert found["trainer"]["callbacks"][-1]["init_args"]["method"]["init_args"]["sparsity"] == 0.4


def test_the_last_word_is_on_the_method_that_is_pruned_with(capsys: pytest.CaptureFixture[str]) -> None:
    method = "--trainer.callbacks.method=TwoSSP"
    short = ("--sparsity=0.3", "--target_parameters=20M")
    found = [printed(capsys, each, "--recipe", "fast", method)["trainer"]["callbacks"][-1] for each in short]
    by_sparsity, by_size = (each["init_args"] for each in found)
    assert by_sparsity["method"]["class_path"].endswith("TwoSSP")
    assert by_sparsity["method"]["init_args"]["sparsity"] == 0.3
    assert by_size["target"]["parameters"] == "20M"


def test_recipes_are_found_by_name_or_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [find(name) for name in NAMES] == [HERE / f"{name}.yaml" for name in NAMES]
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    assert find(str(own)) == own
    with pytest.raises(ValueError, match=r"no recipe 'fats': give balanced, best, fast, or the path of a config"):
        find("fats")
    (tmp_path / "plprune" / "recipes").mkdir(parents=True)
    monkeypatch.setattr(plprune, "__file__", str(tmp_path / "plprune" / "__init__.py"))
    assert folder() == tmp_path / "plprune" / "recipes"


def test_a_wheel_has_them() -> None:
    built = (HERE.parents[1] / "pyproject.toml").read_text()
    assert re.search(r'wheel\.force-include]\n"configs/recipes" = "plprune/recipes"\n', built)


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["a", "b"], "more than once: a, b"),
        (["--sparsity=0.2", "--target_parameters=1M"], "exclude each other"),
        (["--trainer.max_steps"], "--trainer.max_steps has no value"),
    ],
)
def test_what_cannot_be_meant_is_refused(args: list[str], why: str) -> None:
    with pytest.raises(ArgumentError, match=why):
        expanded(["fit", "--recipe", "fast", *args])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--recipe", "best", "model"], "this recipe needs more text than comes with plprune: give one by --data"),
        (
            ["--config", str(HERE / "fast.yaml"), "--sparsity", "0.2"],
            "sparsity is for the command line, after --recipe",
        ),
    ],
)
def test_a_fit_that_lacks_something_ends_with_one_line(
    args: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["fit", *args])
    assert end.value.code == 1
    assert why in capsys.readouterr().err


def test_a_fit_by_a_recipe_says_what_it_takes_and_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    speed = Machine("this machine", 1e9, 1e6, 1e6, False)  # a million operations a second
    monkeypatch.setattr(recipes, "machine", lambda device: speed)
    monkeypatch.setattr(recipes, "points", list)  # nothing has been measured
    small = ["--data.seq_len=16", "--data.batch_size=2", "--data.num_samples=4", "--data.calibration_seq_len=32"]
    small += ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.logger=false", "--data.max_windows=2"]
    main(["fit", "--recipe", "fast", save_tiny(tmp_path / "tiny"), "--sparsity", "0.3", *small])
    plan = plan_of(load_pruned(tmp_path / "runs" / "fast" / "model"))
    assert plan is not None
    assert (plan.method, plan.settings["repair"], plan.settings["sparsity"]) == ("CFSP", "restore", 0.3)
    what, cost, expected, *_ = capsys.readouterr().out.splitlines()
    assert what == "CFSP with repair restore at sparsity 0.3, on 4 x 32 tokens; then lora on 64 tokens"
    assert re.match(r"on this machine: about .* \(pruning .*, recovery .*, evaluation .*\), and .* of memory$", cost)
    # A token takes two operations for each of the 23,232 parameters of the blocks and the 32 x 300 of the head, and
    # attention in three blocks four for each of 32 channels and, on average, 8.5 tokens.
    seconds = 96 * (2 * 23_232 + 2 * 32 * 300 + 3 * 4 * 32 * 8.5) / 1e6
    assert float(re.search(r"evaluation ([\d.]+) s", cost)[1]) == pytest.approx(seconds, abs=0.51)  # type: ignore[index]
    assert expected == "what to expect has not been measured for this method, repair, recovery and sparsity"


def test_what_to_expect_is_the_nearest_that_was_measured() -> None:
    seeds = [dataclasses.replace(POINT, ratio=ratio, seed=i) for i, ratio in enumerate((1.4, 1.5))]
    others = [
        dataclasses.replace(POINT, tokens=300_000, ratio=1.2),
        dataclasses.replace(POINT, windows="256 x 512", ratio=1.3),
        dataclasses.replace(POINT, tokens=0, ratio=1.7),
        dataclasses.replace(POINT, repair="none", ratio=1.8),
        dataclasses.replace(POINT, sparsity=0.5, ratio=3.0),
    ]
    said = expectation([*others, *seeds], dataclasses.replace(POINT, tokens=40_000, sparsity=0.26))
    assert said.startswith(
        "nearest measured: 1.45 times the dense perplexity, for a model on a text, by CFSP with repair"
    )
    assert "at 25.0%, calibrated on 64 x 512 tokens, lora on 32K tokens (mean of 2); other models and texts" in said
    assert "3.00 times" in expectation(others, dataclasses.replace(POINT, sparsity=0.52))
    bare = expectation(others, dataclasses.replace(POINT, tokens=0, recovery="consumers"))
    assert "1.70 times" in bare
    assert "no recovery (one seed)" in bare
    for unknown in ({"sparsity": 0.4}, {"method": "FLAP"}, {"recovery": "consumers"}, {"repair": "compensate"}):
        assert "has not been measured" in expectation(others, dataclasses.replace(POINT, **unknown))


def test_the_measured_points_are_read() -> None:
    known = points()
    assert {"CFSP", "LearnedGates"} <= {point.method for point in known}
    assert all(1 < point.ratio < 10 and point.tokens <= point.run for point in known)
    assert [dataclasses.asdict(point) for point in known] == json.loads((HERE / "curve.json").read_text())
