"""Every configuration that we ship is parsed, instantiated and run on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from plprune import load_pruned
from plprune.cli import main
from plprune.pruning.surgery import plan_of
from tests.builders import save_tiny

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
RECIPES = sorted((FOLDER / "recipes").glob("*.yaml"))
STRATEGIES = sorted((FOLDER / "strategy").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [*CONFIGS, *(pytest.param(p, marks=pytest.mark.slow) for p in RECIPES)], ids=lambda path: path.stem
)
def test_config_runs_on_a_tiny_model(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Only what a tiny model and a machine without a network force is changed: names, sizes and the accelerator."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    config = yaml.safe_load(path.read_text())
    config["model"]["name_or_path"] = save_tiny(tmp_path / "tiny", max_position_embeddings=64)
    texts = {name: "text.txt" for name in ("train", "validation", "test", "calibration") if name in config["data"]}
    config["data"] |= texts | {"seq_len": 16, "num_samples": 4, "batch_size": 2, "num_workers": 0, "max_windows": 2}
    if "calibration_seq_len" in config["data"]:
        config["data"]["calibration_seq_len"] = 8
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 2, "logger": False, "accumulate_grad_batches": 1}
    config["trainer"] |= {"limit_val_batches": 1, "val_check_interval": 1, "enable_progress_bar": False}
    method = prune_of(config)["method"]
    method["init_args"].pop("multiple_of", None)
    Path("config.yaml").write_text(yaml.safe_dump(config))

    main(["fit", "--config", "config.yaml"])

    plan = plan_of(load_pruned(next(c["init_args"]["output"] for c in config["trainer"]["callbacks"] if is_export(c))))
    assert plan is not None
    assert plan.method == method["class_path"]
    assert plan.reached > 0


@pytest.mark.parametrize("path", [*CONFIGS, *RECIPES], ids=lambda path: path.stem)
def test_config_keeps_its_runs_apart(path: Path) -> None:
    root = yaml.safe_load(path.read_text())["trainer"]["default_root_dir"]
    assert root == f"runs/{path.stem}"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
@pytest.mark.parametrize("path", [CONFIGS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in CONFIGS[1:])])
def test_strategy_combines_with_config(path: Path, strategy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """None touches more than three settings, so that what combines with one config does with all."""
    expected = yaml.safe_load(strategy.read_text())
    assert expected.keys() == {"trainer"}
    assert expected["trainer"].keys() == {"accelerator", "devices", "strategy"}

    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={path}", f"--config={strategy}", "--print_config"])

    assert not end.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)["trainer"]
    if isinstance(chosen := expected["trainer"]["strategy"], dict):
        chosen["init_args"] = parsed["strategy"]["init_args"] | chosen.get("init_args", {})
    assert expected["trainer"].items() <= parsed.items()


def prune_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["trainer"]["callbacks"][-1]["init_args"]


def is_export(callback: dict[str, Any]) -> bool:
    return callback["class_path"] == "Export"
