"""Which run a checkpoint belongs to: whatever would mix two runs is refused by its name, and no more than that."""

import inspect
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from plprune import CFSP, Distillation, Evaluate, LoRA, Prune, Recovery, RecoveryData
from plprune.training.run_identity import FREE, TRAINER, check_same_run, identify
from tests.builders import numbers, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two texts, and a checkpoint of a run on the first."""
    root = tmp_path_factory.mktemp("runs")
    save_tiny(root / "model")
    numbers(root / "text.txt")
    numbers(root / "other.txt", 400, 800)
    run = fit(root)
    run.save_checkpoint(root / "a.ckpt")
    return root


def fit(
    root: Path,
    checkpoint: str | None = None,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    stage: str = "fit",
    callbacks: list[pl.Callback] | None = None,
    **settings: Any,
) -> pl.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    shown: dict[str, Any] = dict.fromkeys(quiet, False) | {"accelerator": "cpu", "default_root_dir": root}
    shown |= {"max_steps": 3, "limit_val_batches": 1}
    own: dict[str, Any] = {"train": str(root / "text.txt"), "calibration": str(root / "text.txt"), "batch_size": 4}
    own |= {"seq_len": 16, "num_samples": 4} | (data or {})
    given: dict[str, Any] = {"name_or_path": str(root / "model"), "lora": LoRA(rank=2)}
    given |= model or {}
    shown |= settings
    run, recovery = pl.Trainer(callbacks=[*(callbacks or []), Prune(CFSP(0.3))], **shown), Recovery(**given)
    text = RecoveryData(**own)
    path = root / checkpoint if checkpoint else None
    getattr(run, stage)(recovery, datamodule=text, ckpt_path=path)
    return run


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": {"learning_rate": 0.01}}, r"model\.learning_rate is 0\.01, the checkpoint's is 0\.0002"),
        ({"model": {"weight_decay": 0.1}}, r"model\.weight_decay is 0\.1, the checkpoint's is 0\.0"),
        ({"model": {"warmup": 0.5}}, r"model\.warmup is 0\.5, "),
        ({"model": {"lora": LoRA(rank=2, alpha=64)}}, r"model\.lora\.alpha is 64, "),
        ({"model": {"distill": Distillation()}}, r"model\.distill is Distillation, the checkpoint's is None"),
        ({"data": {"seed": 1}}, r"data\.seed is 1, the checkpoint's is 0"),
        ({"data": {"batch_size": 2}}, r"data\.batch_size is 2, the checkpoint's is 4"),
        ({"data": {"held_out": 0.2}}, r"data\.held_out is 0\.2, "),
        ({"gradient_clip_val": 0.5}, r"trainer\.gradient_clip_val is 0\.5, the checkpoint's is None"),
        ({"precision": "bf16-mixed"}, r"trainer\.precision is bf16-mixed, the checkpoint's is 32-true"),
        ({"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches is 2, the checkpoint's is 1"),
    ],
)
def test_another_setting_is_refused_by_its_name(folder: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^this run's {said}.*use the settings .* or start without it"):
        fit(folder, "a.ckpt", **changed)


def test_another_text_is_refused_wherever_it_is(folder: Path) -> None:
    said = r"this run's data\.train is \S+other\.txt \(\w+\), the checkpoint's is \S+text\.txt \(\w+\)"
    with pytest.raises(ValueError, match=said):
        fit(folder, "a.ckpt", data={"train": str(folder / "other.txt")})
    with pytest.raises(ValueError, match=r"data\.validation is \S+other\.txt \(\w+\), the .* is not given \("):
        fit(folder, "a.ckpt", data={"validation": str(folder / "other.txt")})
    (folder / "moved.txt").write_bytes((folder / "text.txt").read_bytes())
    assert fit(folder, "a.ckpt", data={"train": str(folder / "moved.txt")}, max_steps=4).global_step == 4


def test_what_may_change_may(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    watching = [pl.callbacks.EarlyStopping("train_loss")]  # type: ignore[attr-defined]
    model = {"gradient_checkpointing": True}
    run = fit(folder, "a.ckpt", model, max_steps=5, log_every_n_steps=1, callbacks=watching, limit_val_batches=0)
    assert run.global_step == 5
    (said,) = [each for each in caplog.messages if "learning rate" in each]
    assert said.startswith("this run's trainer.max_steps is 5, the checkpoint's is 3: training continues at")


def test_a_model_that_is_measured_is_the_one_that_was_trained(folder: Path) -> None:
    assert fit(folder, "a.ckpt", {"learning_rate": 0.5}, stage="validate").callback_metrics["val_perplexity"] > 0
    for stage in ("validate", "test"):
        with pytest.raises(ValueError, match=r"this run's model\.lora\.alpha is 64"):
            fit(folder, "a.ckpt", {"lora": LoRA(rank=2, alpha=64)}, stage=stage)


def test_a_checkpoint_of_before_is_gone_on_with_and_said_to_be(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = torch.load(folder / "a.ckpt", weights_only=True)
    del old["plprune"]["run"]
    torch.save(old, folder / "old.ckpt")
    assert fit(folder, "old.ckpt", max_steps=4).global_step == 4
    assert "the checkpoint does not name its text and settings" in caplog.text


def test_a_checkpoint_without_an_optimizer_is_refused(folder: Path) -> None:
    whole = torch.load(folder / "a.ckpt", weights_only=True)
    torch.save({k: v for k, v in whole.items() if k not in ("optimizer_states", "lr_schedulers")}, folder / "w.ckpt")
    with pytest.raises(ValueError, match="holds weights only, which cannot be trained on"):
        fit(folder, "w.ckpt")
    assert fit(folder, "w.ckpt", stage="validate").callback_metrics["val_perplexity"] > 0


def test_another_number_of_processes_may_share_the_same_steps() -> None:
    run = {"processes": 1, "data.batch_size": 8, "trainer.accumulate_grad_batches": 1, "model.lora": "LoRA"}
    check_same_run(run, run | {"processes": 2, "data.batch_size": 4})
    check_same_run(run, run | {"processes": 2, "data.batch_size": 2, "trainer.accumulate_grad_batches": 2})
    check_same_run(run, run | {"processes": 2})  # the steps are others, at the same place in the data
    with pytest.raises(ValueError, match=r"data\.batch_size is 2"):
        check_same_run(run, run | {"processes": 2, "data.batch_size": 2})


def test_every_option_is_free_or_counts(folder: Path) -> None:
    """An option that is new must be decided on."""
    module, data = Recovery(str(folder / "model"), distill=Distillation()), RecoveryData(str(folder / "text.txt"))
    run = identify(pl.Trainer(accelerator="cpu", logger=False), module, data)
    for kind, owner in (("model", Recovery), ("data", RecoveryData), ("trainer", pl.Trainer)):
        options = set(inspect.signature(owner).parameters)
        counted = {name.split(".")[1] for name in run if name.startswith(f"{kind}.")} - FREE[kind]
        assert counted | FREE[kind] == options
    assert set(TRAINER) <= set(inspect.signature(pl.Trainer).parameters)
    assert {type(value) for value in run.values()} <= {type(None), bool, int, float, str, dict}


def test_rows_of_another_text_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    row = {"perplexity": 3.0, "block_parameters": 1, "parameters": 2, "bytes": 3}
    first, second = Evaluate(), Evaluate()
    first._windows, second._windows = "a", "b"
    state = first.state_dict() | {"rows": {"pruned": row}}
    first.load_state_dict(state)
    second.load_state_dict(state)
    assert (list(first.rows), list(second.rows)) == (["pruned"], [])
    assert "measurements are left out" in caplog.text
