"""Which checkpoints there are, which of them count, and what they may be resumed with."""

import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plprune import Checkpoint
from plprune.training.checkpoint_files import FINISHED, MANIFEST, OLD, checkpoints, newest, set_aside
from plprune.training.preemption import AGAIN, Preempted, preemptible
from plprune.training.resume import checkpoint_to_resume, is_finished, resolve_checkpoint
from plprune.training.run_identity import TRAINER, identify
from tests.builders import windows


class Plain(pl.LightningModule):
    """A module of anyone's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 1)
        self.ends = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch.float()).square().mean()

    def on_train_end(self) -> None:
        self.ends += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-8)


class Judged(Plain):
    """The same, with metrics."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch.float()).square().mean())


class At(pl.Callback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def trainer(root: Path, *others: pl.Callback, steps: int = 10, accumulate: int = 1, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        default_root_dir=root,
        callbacks=[*others, Checkpoint(**settings)],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(run: pl.Trainer, resume: bool = False) -> pl.Trainer:
    data: Any = DataLoader(windows(24), batch_size=2)  # type: ignore[arg-type]
    run.fit(Plain(), data, ckpt_path=checkpoint_to_resume(run) if resume else None)
    return run


def steps_in(folder: Path) -> list[int]:
    return [int(path.name[5:11]) for path in checkpoints(folder)]


def fake(folder: Path, *steps: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"step={step:06d}.ckpt" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        torch.save({"step": step, "values": torch.arange(1000)}, path)
    return paths


# ---- writing


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_newest_are_kept_and_the_last_leaves_a_step(tmp_path: Path, accumulate: int) -> None:
    run = fit(trainer(tmp_path, every_n_train_steps=4, accumulate=accumulate))
    assert steps_in(tmp_path / "checkpoints") == [8, 9]
    assert run.global_step == 10
    fit(trainer(tmp_path / "all", every_n_train_steps=1, keep=100, accumulate=accumulate))
    assert steps_in(tmp_path / "all" / "checkpoints") == list(range(1, 10))


def test_epochs_end_a_run_as_steps_do(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=-1, every_n_train_steps=100)
    run.fit_loop.max_epochs = 2
    fit(run)
    assert run.global_step == 24
    assert steps_in(tmp_path / "checkpoints") == [23]


def test_a_resumed_run_always_comes_to_its_end(tmp_path: Path) -> None:
    fit(trainer(tmp_path, every_n_train_steps=5))
    for _ in range(2):
        run = fit(trainer(tmp_path, every_n_train_steps=5), resume=True)
        assert run.lightning_module.ends == 1  # type: ignore[union-attr]
        assert is_finished(run)


@pytest.mark.parametrize("monitor", ["train_loss", "val_loss"])
@pytest.mark.parametrize(("rows", "interval"), [(8, 1.0), (80, 4)])  # validations at the end of an epoch, and within
def test_what_comes_after_a_step_comes_after_a_checkpoint_of_it(
    tmp_path: Path, monitor: str, rows: int, interval: float
) -> None:
    """Every fourth step is saved and judged, and the third judgement ends the run; all before have been lost."""

    def run(resume: bool) -> tuple[int, int]:
        stopping = EarlyStopping(monitor, min_delta=1e9, patience=2)
        run = trainer(tmp_path, stopping, steps=40, every_n_train_steps=4, keep=9)
        run.val_check_interval = interval
        train, judged = (cast(Any, DataLoader(windows(count), batch_size=2)) for count in (rows, 2))  # type: ignore[arg-type]
        run.fit(Judged(), train, judged, ckpt_path=checkpoint_to_resume(run) if resume else None)
        return run.global_step, stopping.wait_count

    whole = run(resume=False)
    assert whole == (12, 2)
    for step in (12, 8, 4):
        set_aside(tmp_path / "checkpoints", step)
        assert run(resume=True) == whole


def test_the_folder_may_be_another(tmp_path: Path) -> None:
    fit(trainer(tmp_path / "run", dirpath=str(tmp_path / "other")))
    assert steps_in(tmp_path / "other") == [9]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", [{"every_n_train_steps": 0}, {"keep": 0}, {"max_hours": -1.0}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .* above 0"):
        Checkpoint(**setting)


# ---- finding


def test_the_newest_is_that_of_the_last_step(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    fake(tmp_path, 100, 5, 20, 1000000)
    (tmp_path / ".step=000101.ckpt.12345678.partial").mkdir()
    (tmp_path / "last.ckpt").write_text("")
    assert newest(tmp_path) == tmp_path / "step=1000000.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_truncated_files_are_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, share: float) -> None:
    good, bad = fake(tmp_path, 5, 10)
    content = bad.read_bytes()
    bad.write_bytes(content[: int(share * len(content))])
    assert newest(tmp_path) == good
    (message,) = caplog.messages
    assert message.startswith(f"skipping the checkpoint {bad}: it is truncated or corrupted")


def test_no_byte_of_the_content_can_change_unnoticed(tmp_path: Path) -> None:
    (path,) = fake(tmp_path, 5)
    content = path.read_bytes()
    values = torch.arange(1000).numpy().tobytes()
    begin = content.index(values)
    for at in (begin, begin + len(values) // 2, begin + len(values) - 1, content.index(b"step") + 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert newest(tmp_path) is None, at
    path.write_bytes(content)
    assert newest(tmp_path) == path


def shared_folder(folder: Path, step: int, processes: int = 2) -> Path:
    """A checkpoint as DeepSpeed writes them."""
    path = folder / f"step={step:06d}.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    for rank in range(processes):
        torch.save(torch.arange(rank, 100), path / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (path / "latest").write_text("checkpoint")
    sizes = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    origin = {"processes": processes, "strategy": "DeepSpeed ZeRO-2"}
    (path / MANIFEST).write_text(json.dumps({"origin": origin, "files": sizes}))
    return path


@pytest.mark.parametrize("fault", ["missing", "truncated", "corrupted", "manifest"])
def test_a_folder_counts_with_all_of_its_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str) -> None:
    good, bad = shared_folder(tmp_path, 5), shared_folder(tmp_path, 10)
    assert newest(tmp_path) == bad
    part = bad / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = part.read_bytes()
    if fault in ("missing", "manifest"):
        (part if fault == "missing" else bad / MANIFEST).unlink()
    else:
        middle = len(content) // 2
        part.write_bytes(content[:middle] if fault == "truncated" else content[:middle] + b"?" + content[middle + 1 :])
    assert newest(tmp_path) == good
    (message,) = caplog.messages
    assert (MANIFEST if fault == "manifest" else part.name) in message
    assert str(bad) in message


# ---- beginning


def test_a_new_run_puts_those_of_an_earlier_one_aside(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for every in (4, 3):
        fit(trainer(tmp_path, every_n_train_steps=every))
    assert steps_in(folder) == [6, 9]
    assert steps_in(folder / OLD) == [8, 9]


def test_those_of_later_steps_than_where_a_run_begins_are_put_aside(tmp_path: Path) -> None:
    fake(tmp_path, 5, 10, 15)
    (tmp_path / FINISHED).write_text("{}")
    set_aside(tmp_path, 10)
    assert steps_in(tmp_path) == [5, 10]
    assert steps_in(tmp_path / OLD) == [15]
    assert not (tmp_path / FINISHED).exists()
    set_aside(tmp_path, 10)
    assert steps_in(tmp_path / OLD) == [15]
    set_aside(tmp_path)
    assert steps_in(tmp_path / OLD) == [5, 10]


def test_a_run_with_more_steps_is_not_finished(tmp_path: Path) -> None:
    assert not is_finished(trainer(tmp_path))
    fit(trainer(tmp_path))
    assert is_finished(trainer(tmp_path))
    assert not is_finished(trainer(tmp_path, steps=20))


def test_a_run_that_a_callback_ended_is_finished_until_it_is_given_more(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.callbacks.append(At(4, lambda: setattr(run, "should_stop", True)))  # type: ignore[attr-defined]
    assert fit(run).global_step == 5
    assert is_finished(trainer(tmp_path))
    assert not is_finished(trainer(tmp_path, steps=20))
    timed = trainer(tmp_path)
    timed.callbacks.append(Timer("00:01:00:00"))  # type: ignore[attr-defined]
    assert not is_finished(timed)


def test_a_run_with_nothing_to_train_is_finished(tmp_path: Path) -> None:
    fit(trainer(tmp_path, steps=0))
    assert is_finished(trainer(tmp_path, steps=0))
    assert not is_finished(trainer(tmp_path))


def test_a_dry_run_leaves_all_checkpoints_where_they_are(tmp_path: Path) -> None:
    fit(trainer(tmp_path, every_n_train_steps=4))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    (tmp_path / "checkpoints" / ".step=000008.ckpt.abc.partial").mkdir()
    rehearsal = pl.Trainer(
        fast_dev_run=3, default_root_dir=tmp_path, callbacks=[Checkpoint(1)], accelerator="cpu", logger=False
    )
    assert fit(rehearsal).global_step == 3
    (tmp_path / "checkpoints" / ".step=000008.ckpt.abc.partial").rmdir()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_a_finished_run_of_other_settings_is_another(tmp_path: Path) -> None:
    fit(trainer(tmp_path))
    again = trainer(tmp_path, accumulate=2)
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches is 2, the checkpoint's is 1"):
        is_finished(again, identify(again, Plain(), None))
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches is 2, the checkpoint's is 1"):
        checkpoint_to_resume(again, identify(again, Plain(), None))


# ---- named


def test_what_is_no_checkpoint_to_train_on_is_refused_in_one_line(tmp_path: Path) -> None:
    run = fit(trainer(tmp_path))
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    (damaged,) = fake(tmp_path / "damaged", 5)
    damaged.write_bytes(damaged.read_bytes()[:-100])
    torch.save({"plprune": {}}, tmp_path / "ours.ckpt")
    torch.save(Plain(), tmp_path / "pickled.ckpt")
    assert resolve_checkpoint("last", run, training=True) == str(tmp_path / "checkpoints" / "step=000009.ckpt")
    assert resolve_checkpoint(str(tmp_path / "ours.ckpt"), run, training=False) == str(tmp_path / "ours.ckpt")
    for path, reason in {
        "best": "there is no checkpoint best: name a file, like those in",
        "registry:model": "there is no checkpoint registry:model",
        "none.ckpt": "there is no checkpoint none.ckpt",
        damaged: "is no checkpoint, or is damaged",
        tmp_path / "weights.ckpt": r"was not written by plprune\.Recovery",
        tmp_path / "pickled.ckpt": "is no checkpoint of plprune",
        tmp_path / "ours.ckpt": "holds weights only",
    }.items():
        with pytest.raises(ValueError, match=reason) as raised:
            resolve_checkpoint(str(path), run, training=True)
        assert "\n" not in str(raised.value)


def test_there_must_be_a_callback_to_checkpoint_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"add plprune\.Checkpoint to trainer\.callbacks"):
        checkpoint_to_resume(pl.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False))


# ---- the table of plprune/training/README.md: what each may be resumed with

ALONE, DDP, FSDP2 = object.__new__(SingleDeviceStrategy), DDPStrategy(), ModelParallelStrategy()


def zero(stage: int) -> Strategy:
    strategies = pytest.importorskip("plprune.training.strategies")
    pytest.importorskip("deepspeed")
    return strategies.CPUDeepSpeed(stage=stage)


def as_if(strategy: Strategy, processes: int, root: Path) -> Any:
    settings = vars(pl.Trainer(accelerator="cpu", logger=False)) | dict.fromkeys(TRAINER)
    settings |= {"num_nodes": 1, "num_devices": processes, "max_steps": 10, "max_epochs": -1, "strategy": strategy}
    return SimpleNamespace(**settings | {"callbacks": [Checkpoint()], "default_root_dir": str(root)})


def write(folder: Path, strategy: Strategy, processes: int) -> None:
    callback, here = Checkpoint(), as_if(strategy, processes, folder)
    callback.setup(SimpleNamespace(**vars(here) | {"is_global_zero": False}), None, "fit")  # type: ignore[arg-type]
    path = folder / "checkpoints" / "step=000005.ckpt"
    path.parent.mkdir()
    torch.save({"callbacks": {callback.state_key: callback.state_dict()}}, path)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ((ALONE, 1), (DDP, 4), None),
        ((DDP, 4), (DDP, 3), None),
        ((DDP, 4), (ALONE, 1), None),
        ((FSDP2, 4), (FSDP2, 2), None),
        ((FSDP2, 4), (DDP, 4), "written under FSDP2, and one process or DDP stores its states differently"),
        ((DDP, 4), (FSDP2, 4), "written under one process or DDP, and FSDP2 stores its states differently"),
        ((1, 2), (1, 2), None),
        ((2, 2), (2, 4), "written by 2 processes under DeepSpeed ZeRO-2, each .* and this run has 4"),
        ((3, 4), (3, 2), "written by 4 processes under DeepSpeed ZeRO-3, each .* and this run has 2"),
        ((2, 2), (3, 2), "written under DeepSpeed ZeRO-2, and DeepSpeed ZeRO-3 stores"),
        ((2, 2), (DDP, 2), "written under DeepSpeed ZeRO-2, and one process or DDP stores its states differently"),
    ],
)
def test_what_a_checkpoint_may_be_resumed_with(
    tmp_path: Path, before: tuple[Any, int], after: tuple[Any, int], reason: str | None
) -> None:
    old, new = (zero(each) if isinstance(each, int) else each for each in (before[0], after[0]))
    write(tmp_path, old, before[1])
    here = as_if(new, after[1], tmp_path)
    if reason is None:
        assert checkpoint_to_resume(here) == tmp_path / "checkpoints" / "step=000005.ckpt"
    else:
        with pytest.raises(ValueError, match=reason) as raised:
            checkpoint_to_resume(here)
        assert str(raised.value).endswith("or start without --resume")


def test_a_folder_says_itself_what_it_was_written_with(tmp_path: Path) -> None:
    shared_folder(tmp_path / "checkpoints", 5)
    assert checkpoint_to_resume(as_if(zero(2), 2, tmp_path)) is not None
    with pytest.raises(ValueError, match="by 2 processes"):
        checkpoint_to_resume(as_if(zero(2), 3, tmp_path))


def test_another_callbacks_file_is_named(tmp_path: Path) -> None:
    fake(tmp_path / "checkpoints", 5)
    with pytest.raises(ValueError, match=r"was not written by plprune\.Checkpoint"):
        checkpoint_to_resume(as_if(ALONE, 1, tmp_path))


# ---- stopping


def test_a_signal_while_training_is_answered_after_the_step(tmp_path: Path) -> None:
    told = At(2, lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stop:
        fit(trainer(tmp_path, told, accumulate=2, every_n_train_steps=100))
    assert stop.value.code == AGAIN
    assert steps_in(tmp_path / "checkpoints") == [3]
    assert not (tmp_path / "checkpoints" / FINISHED).exists()
    assert signal.getsignal(signal.SIGTERM) == before
    assert fit(trainer(tmp_path), resume=True).global_step == 10


def test_a_run_that_may_not_take_any_time_comes_to_its_end_nevertheless(tmp_path: Path) -> None:
    for step in range(1, 4):
        with pytest.raises(Preempted):
            fit(trainer(tmp_path, steps=4, max_hours=1e-9), resume=True)
        assert steps_in(tmp_path / "checkpoints")[-1] == step
    run = fit(trainer(tmp_path, steps=4, max_hours=1e-9), resume=True)
    assert is_finished(run)


def test_training_in_another_thread_is_not_asked(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=fit, args=(trainer(tmp_path),))
    thread.start()
    thread.join()
    assert is_finished(trainer(tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_outside_of_training_is_answered_at_once() -> None:
    before, started = signal.getsignal(signal.SIGTERM), []
    launcher = SimpleNamespace(kill=started.append)
    with pytest.raises(Preempted), preemptible(launcher):
        signal.raise_signal(signal.SIGTERM)
    assert started == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_main_thread_can_be_asked() -> None:
    ran = []

    def work() -> None:
        with preemptible():
            ran.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("environment", "code"),
    [
        ({}, AGAIN),
        ({"LOCAL_RANK": "0"}, AGAIN),
        ({"LOCAL_RANK": "1"}, 0),  # Lightning has started it, and would kill its starter otherwise
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "a"}, AGAIN),
        ({"LOCAL_RANK": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "train"}, AGAIN),
    ],
)
def test_the_exit_code_of_a_process_depends_on_who_started_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], code: int
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Preempted().code == code


def test_the_last_checkpoint_is_judged_or_none(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False)
    with pytest.raises(ValueError, match="there is no last checkpoint"):
        resolve_checkpoint("last", trainer, training=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert resolve_checkpoint("last", trainer, training=False) == "last"
