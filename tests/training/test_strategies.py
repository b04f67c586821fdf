"""A run is the same under every strategy: two real processes on the CPU, with the configs that we ship for GPUs."""

import csv
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from plprune import CFSP, Recovery, load_pruned, prune, save_pruned
from plprune.pruning.plan import PruningPlan
from plprune.training.data import collate
from plprune.training.strategies import (
    FSDP2,
    CPUDeepSpeed,
    DeepSpeed,
    check_config,
    check_strategy,
    description,
    fusable,
    shards,
)
from tests.builders import jsonl, logits, numbers, save_tiny, tiny, tokenizer, windows
from tests.ranks import in_ranks
from tests.runs import Run
from tests.zoo import build

CONFIGS = Path(__file__).parents[2] / "configs" / "strategy"
SHARDED = ["zero3", "fsdp2"]
UNLIKE = ["ddp", *SHARDED]  # ZeRO-1 and 2 run the model as DDP does
KEEPING = ["ddp", "zero2", *SHARDED]  # what they keep; ZeRO-1 does as ZeRO-2
ZERO = ["zero1", "zero2", "zero3"]
STRATEGIES = ["ddp", *ZERO, "fsdp2"]
EVERY = ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in STRATEGIES[1:])]
PROBE: dict[str, Any] = {"tests.probes.Probe": {}}
Ended = tuple[Run, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model")
    numbers(folder / "text.txt", stop=800)
    return folder


def start(source: Path, folder: Path, strategy: str, *args: str, ranks: int = 2, **changes: Any) -> Run:
    """A run of six steps of eight windows, in two batches; the config of the strategy comes as it is shipped."""
    folder.mkdir(exist_ok=True)
    callbacks: dict[str, Any] = {"tests.probes.Probe": {}, "Evaluate": {}}
    callbacks["Export"] = {"output": "out", "overwrite": True}
    callbacks["plprune.Checkpoint"] = {"every_n_train_steps": 3}
    callbacks["Prune"] = {"method": {"class_path": "FLAP", "init_args": {"sparsity": 0.3}}}
    callbacks = changes.pop("callbacks", callbacks)
    listed = [{"class_path": name, "init_args": given} for name, given in callbacks.items()]
    settings = {"max_steps": 6, "logger": False, "limit_val_batches": 1, "callbacks": listed}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 0.5}
    data = {"train": str(source / "text.txt"), "seq_len": 16, "num_samples": 4, "calibration_batch_size": 2}
    config = {
        "trainer": settings | {"accumulate_grad_batches": 2},
        "model": {"name_or_path": str(source / "model"), "learning_rate": 5e-3} | changes,
        "data": data | {"batch_size": 4 // ranks, "max_windows": 7},
    }
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    options = [f"--config={CONFIGS / strategy}.yaml", "--trainer.accelerator=cpu", f"--trainer.devices={ranks}"]
    if strategy in ZERO:
        options.append("--trainer.strategy.class_path=plprune.training.strategies.CPUDeepSpeed")
    return Run(folder, *args, ranks=ranks, strategy=tuple(options))


def ended(run: Run) -> Ended:
    assert run.finish() == [0] * len(run.ranks), run.output()
    return run, [torch.load(run.folder / "probe" / f"{rank}.pt") for rank in range(len(run.ranks))]


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ended]:
    done: dict[str, Ended] = {}

    def run(strategy: str) -> Ended:
        if strategy not in done:
            ranks = 1 if strategy == "one-process" else 2
            done[strategy] = ended(start(source, tmp_path_factory.mktemp(strategy), strategy, ranks=ranks))
        return done[strategy]

    return run


@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", EVERY)
def test_every_strategy_ends_where_one_process_does(runs: Callable[[str], Ended], strategy: str) -> None:
    (one, (expected,)), (two, found) = runs("one-process"), runs(strategy)
    for rank in found:
        torch.testing.assert_close(rank["losses"], expected["losses"], rtol=0, atol=1e-4)
        assert rank["plan"] == expected["plan"]
        assert all(torch.equal(value, found[0]["adapters"][name]) for name, value in rank["adapters"].items())
    torch.testing.assert_close(found[0]["adapters"], expected["adapters"], rtol=0, atol=1e-4)
    theirs, ours = load_pruned(one.folder / "out"), load_pruned(two.folder / "out")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-3)
    assert PruningPlan.load(two.folder / "out").digest == expected["plan"]


def answers(source: Path) -> str:
    """Answers of one to forty numbers, in windows of which some have none."""
    rows = [{"prompt": "1 2 3 " * (i % 5), "completion": "4 " * (i * 7 % 40 + 1)} for i in range(120)]
    return f"--data.train={jsonl(source / 'rows.jsonl', rows)}"


@pytest.fixture(scope="module")
def answers_of_one_process(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_one_process(source, tmp_path_factory.mktemp("answers"), answers(source), callbacks=PROBE)[1]


def in_one_process(source: Path, root: Path, *args: str, **changes: Any) -> tuple[Run, dict[str, Any]]:
    """A run of one process, whose steps are one batch each."""
    together = ("--trainer.accumulate_grad_batches=1", "--data.batch_size=8")
    run, (found,) = ended(start(source, root / "run", "one-process", *args, *together, ranks=1, **changes))
    return run, found


@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", EVERY)
def test_tokens_weigh_the_same_in_whatever_process_and_batch_they_are(
    answers_of_one_process: dict[str, Any], source: Path, tmp_path: Path, strategy: str
) -> None:
    expected = answers_of_one_process
    _, found = ended(start(source, tmp_path / strategy, strategy, answers(source), callbacks=PROBE))
    assert_trained_alike(found, expected, 1e-5)


def assert_trained_alike(ranks: list[dict[str, Any]], expected: dict[str, Any], digits: float) -> None:
    """Every rank has the losses and the adapters of one process."""
    for rank in ranks:
        torch.testing.assert_close(rank["losses"][1::2], expected["losses"], rtol=0, atol=1e-4)
        torch.testing.assert_close(rank["adapters"], expected["adapters"], rtol=0, atol=digits)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", UNLIKE)
def test_the_dense_model_teaches_as_in_one_process(
    taught_in_one_process: dict[str, Any], source: Path, tmp_path: Path, strategy: str
) -> None:
    expected = taught_in_one_process
    run, found = ended(start(source, tmp_path / strategy, strategy, *conversations(source), **TAUGHT))
    assert_trained_alike(found, expected, 1e-4)
    assert len(list((run.folder / "teacher").rglob("*.safetensors"))) == expected["answers"]
    freed = [torch.load(run.folder / "freed" / f"{rank}.pt") for rank in range(2)]
    assert all(each["before"] > 20 and not each["held"] for each in freed)


TAUGHT: dict[str, Any] = {"distill": {"of": "both", "weight": 0.7, "top_k": 9}}
TAUGHT["callbacks"] = PROBE | {
    "tests.probes.Freed": {},
    "Prune": {"method": {"class_path": "FLAP", "init_args": {"sparsity": 0.3}}},
}


def conversations(source: Path) -> tuple[str, ...]:
    """Answers in documents kept apart, for more than one epoch."""
    return answers(source), "--data.max_documents=40", "--data.intra_document_masking=true"


@pytest.fixture(scope="module")
def taught_in_one_process(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run, found = in_one_process(source, tmp_path_factory.mktemp("taught"), *conversations(source), **TAUGHT)
    return found | {"answers": len(list((run.folder / "teacher").rglob("*.safetensors")))}


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", UNLIKE)
def test_all_weights_are_trained_as_in_one_process(
    trained_whole_by_one_process: dict[str, Any], source: Path, tmp_path: Path, strategy: str
) -> None:
    expected = trained_whole_by_one_process
    run, found = ended(start(source, tmp_path / strategy, strategy, **WHOLE))
    assert_trained_alike(found, expected, 1e-4)
    saved = dict(load_pruned(run.folder / "out").named_parameters())
    assert found[0]["adapters"].keys() == saved.keys()  # biases that FLAP adds among them
    torch.testing.assert_close(saved, expected["adapters"], rtol=0, atol=1e-4)


WHOLE: dict[str, Any] = {"train": "all", "learning_rate": 1e-3}
WHOLE["callbacks"] = PROBE | {"Export": {"output": "out"}, "Prune": TAUGHT["callbacks"]["Prune"]}


@pytest.fixture(scope="module")
def trained_whole_by_one_process(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_one_process(source, tmp_path_factory.mktemp("whole"), **WHOLE)[1]


@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", EVERY)
def test_the_table_is_that_of_one_process(runs: Callable[[str], Ended], strategy: str) -> None:
    """Seven windows on two ranks: their shares are not equal."""
    expected, found = (rows(runs(name)[0].output()) for name in ("one-process", strategy))
    assert [row[0] for row in found] == ["dense", "pruned", "recovered"]
    for ours, theirs in zip(found, expected, strict=True):
        assert float(ours[1]) == pytest.approx(float(theirs[1]), abs=0.05)
        assert ours[2:6] == theirs[2:6]
    assert [row[6] == "-" for row in found] == [False, *2 * [strategy in SHARDED]]


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines() if line.startswith(("dense ", "pruned ", "recovered "))]


@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", EVERY)
def test_the_first_line_says_what_each_process_holds(runs: Callable[[str], Ended], strategy: str) -> None:
    run, found = runs(strategy)
    lines = run.output().splitlines()
    (first,) = [i for i, line in enumerate(lines) if line.startswith("2 processes, ")]
    assert first < next(i for i, line in enumerate(lines) if line.startswith("FLAP removed"))
    everything = runs("one-process")[1][0]["held"]
    part = {True: 0.5, False: 1}[strategy in SHARDED]
    assert all(rank["held"] == pytest.approx(part * everything, rel=0.03) for rank in found)
    assert ("1/2 of the model" in lines[first]) == (part < 1)


def reported(source: Path, folder: Path, strategy: str, ranks: int) -> tuple[dict[str, Any], list[float]]:
    """The report of a run, and the gradient norms that it logged."""
    method = {"method": {"class_path": "FLAP", "init_args": {"sparsity": 0.3}}}
    callbacks: dict[str, Any] = {"Evaluate": {}, "Report": {"prompts": ["1 2 3"]}, "Prune": method}
    args = ("--trainer.logger=null", "--trainer.log_every_n_steps=1")
    run = start(source, folder, strategy, *args, ranks=ranks, callbacks=callbacks)
    assert run.finish() == [0] * ranks, run.output()
    (file,) = run.folder.rglob("metrics.csv")
    assert any(path.name.startswith("events.out") for path in file.parent.iterdir())
    with open(file, newline="") as rows:
        norms = [float(row["grad_norm/total"]) for row in csv.DictReader(rows) if row.get("grad_norm/total")]
    return json.loads((run.folder / "report.json").read_text()), norms


@pytest.fixture(scope="module")
def report_of_one_process(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[float]]:
    return reported(source, tmp_path_factory.mktemp("report") / "run", "one-process", 1)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", UNLIKE)
def test_processes_leave_one_report_and_one_log(
    report_of_one_process: tuple[dict[str, Any], list[float]], source: Path, tmp_path: Path, strategy: str
) -> None:
    expected, norms = report_of_one_process
    found, logged = reported(source, tmp_path / "run", strategy, 2)
    assert found["status"] == "finished"
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert found["loss"] == [[step, pytest.approx(loss, abs=1e-3)] for step, loss in expected["loss"]]
    assert found["stages"].keys() == expected["stages"].keys() == {"dense", "pruned", "recovered"}
    assert found["generated"][0].keys() - {"prompt"} == ({"dense"} if strategy in SHARDED else found["stages"].keys())
    assert found["generated"][0]["dense"] == expected["generated"][0]["dense"]
    assert logged == ([] if strategy in ZERO else pytest.approx(norms, rel=1e-3))


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])  # tests/training/test_durability.py stops and resumes ZeRO
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(source: Path, tmp_path: Path, strategy: str) -> None:
    lora = {"rank": 2, "dropout": 0.3}
    _, expected = ended(start(source, tmp_path / "run", strategy, lora=lora))
    checkpoint = next((tmp_path / "run").rglob("step=*3.ckpt"))
    _, found = ended(start(source, tmp_path / "run", strategy, f"--ckpt_path={checkpoint}", lora=lora))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["losses"] == theirs["losses"][6:]
        assert all(torch.equal(value, theirs["adapters"][name]) for name, value in ours["adapters"].items())


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_checkpoint_with_other_adapters_is_refused(
    runs: Callable[[str], Ended], source: Path, tmp_path: Path, strategy: str
) -> None:
    checkpoint = next(runs(strategy)[0].folder.rglob("step=*3.ckpt"))
    narrow = start(source, tmp_path / "run", strategy, f"--ckpt_path={checkpoint}", lora={"targets": ["q_proj"]})
    other = start(source, tmp_path / "other", strategy, f"--ckpt_path={checkpoint}", dtype="bfloat16")
    assert 0 not in [*narrow.finish(), *other.finish()]
    assert "this run's model.lora.targets is ['q_proj'], the checkpoint's is" in narrow.output()
    assert "this run's model.name_or_path is" in other.output()


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", KEEPING)
def test_another_number_of_processes_goes_on_or_is_refused(
    runs: Callable[[str], Ended], source: Path, tmp_path: Path, strategy: str
) -> None:
    checkpoint = next(runs(strategy)[0].folder.rglob("step=*3.ckpt"))
    run = start(source, tmp_path / "run", strategy, f"--ckpt_path={checkpoint}", ranks=1)
    if strategy in ZERO:
        assert run.finish() == [1]
        assert "was written by 2 processes and cannot be resumed by 1" in run.output()
    else:
        _, (found,) = ended(run)
        assert "the checkpoint is of 2 processes and this run has 1" in run.output()
        assert len(found["losses"]) == 6


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_pruned_folder_goes_straight_into_shards(tmp_path: Path, strategy: str) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 2000}
    model = tiny("llama", **sizes, tie_word_embeddings=True)
    prune(model, CFSP(0.1), [windows()])
    save_pruned(model, tmp_path / "model", tokenizer())
    numbers(tmp_path / "text.txt")
    bytes_of_all = sum(p.numel() * p.element_size() for p in model.parameters())
    probes: dict[str, Any] = {"tests.probes.Memory": {}, "tests.probes.Probe": {}}
    run, found = ended(start(tmp_path, tmp_path / "run", strategy, "--trainer.max_steps=1", callbacks=probes))
    peaks = [torch.load(run.folder / "memory" / f"{rank}.pt")["peak"] for rank in range(2)]
    assert bytes_of_all > 150e6
    assert peaks[1] < 0.9 * bytes_of_all  # half of it, one layer whole, and what the allocator keeps: 0.6 to 0.76
    assert found[0]["held"] == pytest.approx(found[1]["held"], rel=0.01)
    assert 4 * found[0]["held"] == pytest.approx(bytes_of_all / 2, rel=0.05)  # and the adapters


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", UNLIKE)
def test_gradient_checkpointing_changes_nothing(
    runs: Callable[[str], Ended], source: Path, tmp_path: Path, strategy: str
) -> None:
    _, found = ended(start(source, tmp_path / "run", strategy, gradient_checkpointing=True))
    torch.testing.assert_close(found[0]["losses"], runs("one-process")[1][0]["losses"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("strategy", UNLIKE)
def test_frozen_weights_stay_in_bfloat16_and_adapters_in_float32(source: Path, tmp_path: Path, strategy: str) -> None:
    _, found = ended(start(source, tmp_path / "run", strategy, dtype="bfloat16"))
    assert [rank["dtypes"] for rank in found] == 2 * [{True: {torch.float32}, False: {torch.bfloat16}}]
    assert load_pruned(tmp_path / "run" / "out").dtype == torch.bfloat16


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    build("mixtral", num_hidden_layers=2).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    numbers(folder / "text.txt", stop=800)
    return folder


OF_MIXTURES: dict[str, dict[str, Any]] = {
    "routers": {"train": "routers"},
    "experts": {"lora": {"rank": 2, "experts": True}, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("way", OF_MIXTURES)
def test_mixtures_are_recovered_as_in_one_process(mixture: Path, tmp_path: Path, way: str) -> None:
    experts = {"method": {"class_path": "REAP", "init_args": {"sparsity": 0.25, "sparsity_of": "experts"}}}
    settings: dict[str, Any] = {
        "callbacks": PROBE | {"Prune": experts, "Export": {"output": "out"}},
        **OF_MIXTURES[way],
    }
    one, (expected,) = ended(start(mixture, tmp_path / "one", "one-process", ranks=1, **settings))
    assert len(expected["adapters"]) == (2 if way == "routers" else 24)
    before = load_pruned(one.folder / "out")
    for strategy in UNLIKE if way == "routers" else ["zero3"]:
        two, found = ended(start(mixture, tmp_path / strategy, strategy, **settings))
        for rank in found:
            torch.testing.assert_close(rank["losses"], expected["losses"], rtol=0, atol=1e-5)
            torch.testing.assert_close(rank["adapters"], expected["adapters"], rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(load_pruned(two.folder / "out")), logits(before), rtol=0, atol=1e-4)


def fit_unequal(model: Path) -> None:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())  # else Lightning would start processes
    ids = torch.arange(5, 21)[None].repeat(4 + 2 * dist.get_rank(), 1)
    rows: Any = [(row, row) for row in ids]
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **settings)
    trainer.fit(Recovery(str(model)), DataLoader(rows, batch_size=2, collate_fn=collate))


@pytest.mark.slow
@pytest.mark.multi_process
def test_unequal_batch_counts_are_refused(source: Path) -> None:
    """Neither process would come to an end."""
    with pytest.raises(AssertionError, match="processes disagree on the number of batches: rank 0 has 2, rank 1 has 3"):
        in_ranks(fit_unequal, source / "model")


@pytest.mark.parametrize(
    ("strategy", "processes", "expected"),
    [
        (SingleDeviceStrategy("cpu"), 1, "1 process: it holds the whole model (538 MB)"),
        (DDPStrategy(), 4, "4 processes, DDP: each takes 1/4 of every batch, and holds the whole model (538 MB)"),
        (FSDP2(), 2, "2 processes, FSDP2: each takes 1/2 of every batch, and holds 1/2 of the model (538 MB in all)"),
    ],
)
def test_description(strategy: Any, processes: int, expected: str) -> None:
    assert description(strategy, processes, 538_000_000).startswith(expected)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_description_of_zero(stage: int) -> None:
    strategy = CPUDeepSpeed(stage=stage, offload_optimizer=True, offload_parameters=stage == 3)
    line = description(strategy, 2, 538_000_000)
    assert line.startswith(f"2 processes, ZeRO-{stage}: each takes 1/2 of every batch, and holds ")
    assert ("gradients" in line) == (stage > 1)
    assert ("the whole model" in line) == (stage < 3) == (not shards(strategy))
    assert line.endswith(f"; optimizer states{' and weights' * (stage == 3)} are in the CPU's memory")


@pytest.mark.parametrize(
    ("key", "value", "trainer"),
    [
        ("train_micro_batch_size_per_gpu", 8, "4"),
        ("gradient_accumulation_steps", 4, "2"),
        ("train_batch_size", 8, "16"),
        ("gradient_clipping", 1.0, "0.5"),
        ("fp16", {"enabled": True}, "False"),
        ("bf16", {"enabled": False}, "True"),
    ],
)
def test_a_config_that_contradicts_the_trainer_is_refused(key: str, value: Any, trainer: str) -> None:
    said = value["enabled"] if isinstance(value, dict) else value
    with pytest.raises(ValueError, match=rf"has {key}\S*: {said}, but .* is {trainer}: make them equal"):
        check_config({key: value, "zero_optimization": {"stage": 2}}, settings())


def test_a_config_that_repeats_the_trainer_is_fine() -> None:
    same = {"gradient_accumulation_steps": 2, "train_batch_size": 16, "gradient_clipping": "auto"}
    config: dict[str, Any] = same | {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}}
    check_config(config, settings())
    assert config == {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_a_config_with_an_optimizer_of_its_own_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"has {key}, but plprune.Recovery sets its own: remove the key"):
        check_config({key: {}}, settings())


def settings() -> pl.Trainer:
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(batch_size=4), accumulate_grad_batches=2, world_size=2, gradient_clip_val=0.5
    )
    trainer.precision = "bf16-mixed"
    return trainer


def test_what_is_silently_wrong_in_lightning_is_refused() -> None:
    for strategy, ours in ((DeepSpeedStrategy(stage=2), "DeepSpeed"), (ModelParallelStrategy(), "FSDP2")):
        with pytest.raises(ValueError, match=rf"use plprune\.training\.strategies\.{ours}"):
            check_strategy(strategy)
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy(), CPUDeepSpeed(stage=2), FSDP2()):
        check_strategy(strategy)


@pytest.mark.parametrize("option", ["model.lora.dora", "model.compile"])
def test_options_that_need_whole_weights_are_refused_where_they_are_split(option: str) -> None:
    for strategy in (CPUDeepSpeed(stage=3), FSDP2()):
        with pytest.raises(ValueError, match=rf"^{option} needs whole weights, which ZeRO-3 and FSDP2 split: leave it"):
            check_strategy(strategy, {option: True, "model.another": False})
    check_strategy(DDPStrategy(), {option: True})


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_steps_are_fused_on_a_gpu_unless_gradients_are_scaled_or_parameters_shared() -> None:
    precisions = {"32-true": Precision(), "bf16": MixedPrecision("bf16-mixed", "cuda")}
    precisions["16"] = MixedPrecision("16-mixed", "cuda")
    on = {name: fusable(SingleDeviceStrategy("cuda:0", precision_plugin=each)) for name, each in precisions.items()}
    assert on == {"32-true": True, "bf16": True, "16": False}
    assert not any(map(fusable, (SingleDeviceStrategy("cpu"), FSDP2(), CPUDeepSpeed(stage=2))))


def test_deepspeed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'plprune\[deepspeed\]'"):
        DeepSpeed()


def test_deepspeed_without_a_gpu_says_what_to_change() -> None:
    strategy = DeepSpeed(stage=2)
    with pytest.raises(ValueError, match="DeepSpeed needs GPUs, and this run has none: use"):
        strategy.setup_environment()
