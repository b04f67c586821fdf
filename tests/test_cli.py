import csv
import dataclasses
import importlib.util
import inspect
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks.timer import Interval
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import plprune
from plprune import CFSP, FLAP, load_pruned
from plprune.checkpoint.load import load_model
from plprune.cli import COMMANDS, STAGES, explained, main
from plprune.io.text import draw, tokenised
from plprune.pruning.plan import PruningPlan
from plprune.pruning.plan_summary import plan_summary
from plprune.training.checkpointing import Checkpoint
from tests.builders import save_tiny, tokenizer
from tests.io.test_progress import lines_on_screen
from tests.ranks import free_port
from tests.runs import on_terminal

FIT = """
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
    - class_path: plprune.Evaluate
    - class_path: plprune.Prune
      init_args: {method: {class_path: CFSP, init_args: {sparsity: 0.2}}}
    - class_path: plprune.Export
      init_args: {output: out, overwrite: true}
model: {name_or_path: model}
data: {train: text.txt, seq_len: 16, num_samples: 4, batch_size: 2}
"""
PRUNE = ["prune", "model", "--output=out", "--text=text.txt", "--num_samples=4", "--seq_len=16"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a configuration, which is the current one."""
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text("So it goes. " * 200)
    (tmp_path / "fit.yaml").write_text(FIT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command prints, and nothing goes wrong."""
    code = None
    capsys.readouterr()
    try:
        main(list(args))
    except SystemExit as stop:
        code = stop.code
    assert not code
    return capsys.readouterr().out


# ---- help


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_the_overview_names_every_command_with_what_it_does(
    capsys: pytest.CaptureFixture[str], args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["plprune"])
    lines = printed(capsys, *args).splitlines()
    assert lines[0] == "usage: plprune COMMAND [options]"
    listed = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in listed] == [*STAGES, *COMMANDS]
    assert all(len(what) > 20 for _, what in listed)
    assert max(map(len, lines)) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "--version") == f"plprune {plprune.__version__}\n"


def options(name: str) -> dict[str, Any]:
    """The options of a command, each with its default; of one with settings of its own, these."""
    found: dict[str, Any] = {}
    for option in inspect.signature(COMMANDS[name]).parameters.values():
        if dataclasses.is_dataclass(option.default):
            found |= {f"{option.name}.{key}": value for key, value in vars(option.default).items()}
        else:
            found[option.name] = option.default
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_its_default(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text = " ".join(printed(capsys, name, "--help").split())
    assert text.startswith(f"usage: plprune {name} ")
    assert " --config CONFIG A YAML file with options. " in text
    given = options(name)
    for option, default in given.items():
        if f" --{option} " not in text:  # by position
            assert len(text.partition(f" {option} ")[2].split()) > 1
            continue
        about = text.rpartition(f" --{option} ")[2]  # the usage names it before
        others = "|".join(map(re.escape, given.keys() - {option}))
        meaning, facts = about.partition("(")[0], re.split(rf" --({others})\b", about)[0]
        assert len(meaning.split()) > 1
        required = default is inspect.Parameter.empty
        assert ("(required, " if required else f"default: {'null' if default is None else default})") in facts


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_lightning_commands(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    text = " ".join(printed(capsys, stage, "--help").split())
    assert STAGES[stage] in text
    for option in ("--config", "--model.name_or_path", "--model.lora.rank", "--data.train", "--trainer.callbacks"):
        assert f" {option} " in text
    assert "--optimizer" not in text


def test_the_settings_of_a_method_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(capsys, "prune", "--method.help=CFSP").split())
    assert "--method.sparsity SPARSITY" in text


@pytest.mark.parametrize(
    ("message", "command", "said"),
    [
        ("unrecognized arguments: --sedd 3", "prune", "--sedd 3; did you mean --seed?"),
        ("unrecognized arguments: --sparsity 0.2", "prune", "did you mean --method.sparsity?"),
        ("unrecognized arguments: --model.learningrate 1", "fit", "did you mean --model.learning_rate?"),
        ("unrecognized arguments: --qqqqqqqq 1", "fit", "unrecognized arguments: --qqqqqqqq 1"),
        ('Parser key "method":\n  Expected a dot import path string: 2SSP', "prune", "did you mean TwoSSP?"),
        ("Subcommand 'fit' does not accept option 'data.jion'", "fit", "'data.jion'; did you mean data.join?"),
        ("the following arguments are required: output", "prune", "the following arguments are required: output"),
    ],
)
def test_near_matches(message: str, command: str, said: str) -> None:
    assert explained(message, command).endswith(said)


# ---- running


def test_prune_does_what_the_library_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, *PRUNE, "--method=FLAP", "--method.sparsity=0.3", "--batch_size=3", "--seed=5")
    ids, _ = tokenised("text.txt", tokenizer())
    model = load_model("model")
    plan = plprune.prune(model, FLAP(sparsity=0.3), list(draw(ids, 4, 16, seed=5).split(3)), seed=5)
    assert PruningPlan.load("out").digest == plan.digest
    own = load_pruned("out")
    assert torch.equal(own(input_ids=ids[None, :16]).logits, model(input_ids=ids[None, :16]).logits)
    assert out == f"{plan_summary(plan)}; saved to out\n"


def test_prune_says_what_its_own_text_is_about(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [word for word in PRUNE if not word.startswith("--text")]
    main([*command, "--method=FLAP", "--output=first"])
    assert "pydoc_data.topics, which is about Python only" in caplog.text
    caplog.clear()
    main([*command, "--method=FLAP", "--output=second", "--text=text.txt"])
    assert "about Python only" not in caplog.text
    assert "text.txt: 1 rows read, 1 used" in caplog.text


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_evaluate_measures_dense_and_pruned_models(here: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    main([*PRUNE, "--method=CFSP"])
    parameters = []
    for model in ("model", "out"):
        args = ["--text=text.txt", "--seq_len=16", "--max_windows=5", f"--device={device}", "--dense=none"]
        *_, head, row, foot = printed(capsys, "evaluate", model, *args).splitlines()
        assert head.split()[:3] == ["model", "perplexity", "bits/byte"]
        parameters.append(int(row.split()[4].replace(",", "")))
        assert foot.startswith("text.txt: 5 windows of 16 tokens, no overlap, no BOS; 75 tokens counted")
    assert parameters[0] > parameters[1]


def test_join_and_dtype_reach_the_work(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rows.jsonl").write_text('{"text": "So it goes."}\n' * 300)
    main([*PRUNE, "--method=CFSP", "--text=rows.jsonl", "--join=\\n\\n", "--dtype=bfloat16", "--offload=cpu"])
    assert load_pruned("out").dtype == torch.bfloat16
    plans = [PruningPlan.load("out").origin["calibration"]]
    main([*PRUNE, "--method=CFSP", "--text=rows.jsonl", "--overwrite"])
    assert PruningPlan.load("out").origin["calibration"] not in plans


def test_a_fit_is_pruned_recovered_measured_and_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "fit", "--config=fit.yaml", "--data.batch_size=3", "--model.lora.rank=2")
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("dense ", "pruned ", "recovered "))]
    assert rows == ["dense", "pruned", "recovered"]
    assert PruningPlan.load("out").method == CFSP.__name__
    before = Path("config.yaml").read_bytes()
    for stage in ("validate", "test"):
        assert "perplexity" in printed(capsys, stage, "--config=fit.yaml")
    assert Path("config.yaml").read_bytes() == before


# ---- going on


RESUMABLE = (
    FIT.replace("  enable_checkpointing: false\n", "")
    .replace("  callbacks:\n", "  callbacks:\n    - class_path: plprune.Checkpoint\n")
    .replace(", overwrite: true", "")
)


@pytest.fixture
def resumable(here: Path) -> Path:
    (here / "fit.yaml").write_text(RESUMABLE)
    return here


def test_resuming_a_finished_run_writes_what_is_missing(resumable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit", "--config=fit.yaml", "--resume")
    first = (resumable / "out" / "model.safetensors").read_bytes()
    assert printed(capsys, "fit", "--config=fit.yaml", "--resume") == "this run is finished; its model is in out\n"
    shutil.rmtree(resumable / "out")
    assert "recovered" in printed(capsys, "fit", "--config=fit.yaml", "--resume")
    assert (resumable / "out" / "model.safetensors").read_bytes() == first
    save_tiny(resumable / "model", seed=1)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=fit.yaml", "--resume"])
    assert stop.value.code == 1
    assert re.search(r"this run's model\.name_or_path is model \(\w+\), the checkpoint's", capsys.readouterr().err)


def test_resuming_a_run_that_was_stopped_after_its_export_writes_it_again(
    resumable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, "fit", "--config=fit.yaml")
    first = (resumable / "out" / "model.safetensors").read_bytes()
    (resumable / "checkpoints" / "finished.json").unlink()
    (resumable / "out" / "model.safetensors").unlink()
    printed(capsys, "fit", "--config=fit.yaml", "--resume")
    assert (resumable / "out" / "model.safetensors").read_bytes() == first


def test_without_resume_nothing_is_lost_by_mistake(resumable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit", "--config=fit.yaml")
    before = sorted(path.name for path in (resumable / "checkpoints").glob("*.ckpt"))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=fit.yaml"])
    assert stop.value.code == 1
    assert "choose another output" in capsys.readouterr().err
    assert sorted(path.name for path in (resumable / "checkpoints").glob("*.ckpt")) == before
    assert printed(capsys, "fit", "--config=fit.yaml", "--resume").startswith("this run is finished")


def there(root: Path) -> dict[Path, tuple[int, int]]:
    """All files and folders, as they are."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}


def test_a_dry_run_touches_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RESUMABLE.replace("output: out", "output: out, overwrite: true")
    evaluate, report = (f"    - class_path: plprune.{name}\n" for name in ("Evaluate", "Report"))
    (here / "fit.yaml").write_text(text.replace(evaluate, evaluate + report))
    printed(capsys, "fit", "--config=fit.yaml")
    before = there(here)
    out = printed(capsys, "fit", "--config=fit.yaml", "--resume", "--trainer.fast_dev_run=1", "--model.learning_rate=1")
    assert there(here) == before
    assert "recovered" in out
    assert [line.split()[0] for line in out.splitlines() if line][-2:] == ["recovered", "time"]


def test_the_checkpoints_of_another_run_are_left_alone(resumable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "fit", "--config=fit.yaml")
    before = there(resumable)
    for options, said in {
        ("--model.learning_rate=0.5",): "this run's model.learning_rate is 0.5, the checkpoint's is 0.0002: use",
        ("--model.learning_rate=0.5", "--trainer.max_steps=4"): "this run's model.learning_rate is 0.5",
        ("--data.train=pydoc_data.topics",): "this run's data.train is pydoc_data.topics (",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config=fit.yaml", "--resume", *options])
        assert stop.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"plprune: error: {said}")
        assert there(resumable) == before


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_checkpoint_that_is_not_there_is_one_line(
    resumable: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    Path("damaged.ckpt").write_text("no")
    for path, said in {
        "best": "there is no checkpoint best: name a file",
        "damaged.ckpt": "damaged.ckpt is no",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([stage, "--config=fit.yaml", f"--ckpt_path={path}"])
        assert stop.value.code == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"plprune: error: {said}")


def test_resuming_needs_checkpoints(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config=fit.yaml", "--resume"])
    assert stop.value.code == 1
    assert "add plprune.Checkpoint to trainer.callbacks" in capsys.readouterr().err


def test_a_word_of_lightnings_can_be_written_to_a_file() -> None:
    assert yaml.safe_dump({"interval": Interval.step}) == "interval: step\n"


def test_the_help_says_what_resuming_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "exit code 75: start it again with --resume" in " ".join(printed(capsys, "fit", "--help").split())
    assert "--resume" not in printed(capsys, "validate", "--help")


# ---- what a person sees of it


LOGGED = RESUMABLE.replace("  logger: false\n", "").replace("max_steps: 2", "max_steps: 8\n  log_every_n_steps: 1")
LOGGED = LOGGED.replace("plprune.Checkpoint\n", "plprune.Checkpoint\n      init_args: {every_n_train_steps: 3}\n")
LOGS = Path("lightning_logs/fit")


def rows(version: int) -> list[dict[str, str]]:
    with open(LOGS / f"version_{version}" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def by_step(version: int, name: str) -> dict[int, float]:
    """A metric of a version, which was logged once a step."""
    logged = [(int(row["step"]), float(row[name])) for row in rows(version) if row.get(name)]
    assert len(dict(logged)) == len(logged)
    return dict(logged)


def test_a_fit_logs_to_tensorboard_and_csv_and_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "fit.yaml").write_text(LOGGED)
    out = printed(capsys, "fit", "--config=fit.yaml")
    said = dict(line.split(maxsplit=1) for line in out.splitlines()[-3:])
    assert said["model"] == "out"
    assert Path(said["logs"]) == here / LOGS / "version_0"
    assert set(by_step(0, "train_loss")) == set(by_step(0, "grad_norm/total")) == set(range(8))
    ranks = {f"rank/block_{i:02}" for i in range(3)}
    assert set(yaml.safe_load((LOGS / "version_0" / "hparams.yaml").read_text())) == ranks
    assert [row["step"] for row in rows(0) if row["rank/block_00"]] == ["0"]
    board = EventAccumulator(str(LOGS / "version_0")).Reload()
    assert {"train_loss", "grad_norm/block_02", *ranks} <= set(board.Tags()["scalars"])


def test_without_loggers_there_are_no_logs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "logs" not in printed(capsys, "fit", "--config=fit.yaml").splitlines()[-2]
    assert not Path("lightning_logs").exists()


def test_resuming_goes_on_in_the_same_logs(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    (here / "fit.yaml").write_text(LOGGED)
    own = Checkpoint.on_train_batch_end

    def stop(self, trainer, *args) -> None:
        own(self, trainer, *args)
        if trainer.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "on_train_batch_end", stop)
    with pytest.raises(SystemExit):
        main(["fit", "--config=fit.yaml"])
    monkeypatch.setattr(Checkpoint, "on_train_batch_end", own)
    assert max(by_step(0, "train_loss")) >= 3
    printed(capsys, "fit", "--config=fit.yaml", "--resume")
    shutil.move("out", "first")
    printed(capsys, "fit", "--config=fit.yaml")
    for name in ("train_loss", "grad_norm/total"):
        assert by_step(0, name) == by_step(1, name)
        assert set(by_step(0, name)) == set(range(8))
    board = EventAccumulator(str(LOGS / "version_0")).Reload()
    assert [event.step for event in board.Scalars("train_loss")] == list(range(8))
    assert not (LOGS / "version_2").exists()


@pytest.mark.parametrize(("logger", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_whose_package_is_missing_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], logger: str, package: str
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(SystemExit):
        main(["fit", "--config=fit.yaml", f"--trainer.logger={logger}"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"plprune: error: {logger} needs {package}, which is not installed: pip install {package}"


@pytest.mark.slow
def test_a_terminal_shows_one_bar_at_a_time_and_then_the_results(here: Path) -> None:
    (here / "fit.yaml").write_text(FIT.replace("  enable_progress_bar: false\n", ""))
    text = on_terminal(here, ["fit", "--config=fit.yaml"])
    lines = lines_on_screen(text)
    first = [line.split()[0] for line in lines]
    assert [first.count(word) for word in ("epoch", "dense", "pruned", "recovered", "model")] == [1, 1, 1, 1, 2]
    assert first.index("epoch") < first.index("recovered") < len(first) - 2
    assert sum("CFSP removed" in line for line in lines) == 1  # the log is above the bars, and none is drawn over it
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 1  # every display has ended


def test_the_command_line_is_taken_from_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plprune", "--version"])
    main()
    assert capsys.readouterr().out.startswith("plprune ")


@pytest.mark.parametrize("args", [["prune", "no", "--method=CFP", "--output=a"], ["evaluate", "no", "--text=no.txt"]])
def test_debugging_shows_where_it_went_wrong(monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setenv("PLPRUNE_DEBUG", "1")
    with pytest.raises(Exception, match=r"CFP|no\.txt"):
        main(args)


def test_our_own_lines_are_heard_and_those_of_others_are_not(
    here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["--version"])
    assert logging.getLogger("plprune.training.callbacks.report").isEnabledFor(logging.INFO)
    assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
    monkeypatch.setattr("plprune.training.console.rank_zero_only.rank", 1)
    main(["--version"])
    assert not logging.getLogger("plprune.training.callbacks.report").isEnabledFor(logging.INFO)


def test_a_real_fit_says_everything_once(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plprune", "fit", "--config=fit.yaml"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == len(set(lines))
    for ours in ("removed", "LoRA ranks", "saved the recovered model"):
        assert sum(ours in line for line in lines) == 1
    for noise in ("Warning", "warn", "Tip:", "LightningCLI's args", "workers", "LeafSpec", "INFO", "it/s", "No seed"):
        assert noise not in done.stderr


@pytest.mark.slow
@pytest.mark.multi_process
def test_prune_under_torchrun_writes_what_one_process_does(here: Path) -> None:
    main([*PRUNE, "--method", "FLAP"])
    launch = ["-m", "torch.distributed.run", f"--master-port={free_port()}", "--nproc-per-node=2", "-m", "plprune"]
    command = [*launch, *PRUNE[:2], "--output=both", *PRUNE[3:], "--method", "FLAP"]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.count("saved to both") == 1
    assert PruningPlan.load("both").digest == PruningPlan.load("out").digest
    alone, together = load_pruned("out").state_dict(), load_pruned("both").state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value)


@pytest.mark.parametrize(
    ("command", "less"),
    [
        (["prune", "model", "--method=FLAP", "--output=out"], "lower --batch_size or --seq_len, give --offload cpu"),
        (["fit", "--config=fit.yaml"], "lower data.batch_size (trainer.accumulate_grad_batches makes up for it)"),
        (["evaluate", "model"], "lower --seq_len, or give --dtype bfloat16"),
    ],
)
def test_an_accelerator_without_memory_is_one_line(
    command: list[str], less: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.20 GiB free. If reserved but unallocated, try"

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr("plprune.cli._run", full)
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "plprune: error: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.20 GiB free. To"
    )
    assert less in line
