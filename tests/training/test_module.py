"""Prune, LoRA and training together, through the real Trainer."""

import copy
import csv
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from plprune import (
    CFSP,
    FLAP,
    REAP,
    Checkpoint,
    Evaluate,
    Export,
    LoRA,
    Prune,
    Recovery,
    RecoveryData,
    Report,
    load_pruned,
    perplexity,
)
from plprune.architecture.blocks import blocks_of
from plprune.io.text import IGNORED
from plprune.pruning.losses import next_token_loss
from plprune.pruning.plan import PruningPlan
from plprune.pruning.surgery import apply, plan_of
from plprune.recovery.lora import adapters, merged
from plprune.training.callbacks.order import ORDER, check_order
from plprune.training.checkpoint_files import checkpoints
from plprune.training.console import CloseBar
from plprune.training.data import collate
from plprune.training.optimisation import gradient_norms
from plprune.training.watchdog import Watch
from tests.builders import DEFAULTS, logits, method, save_tiny, tiny, tokenizer, windows
from tests.runs import Run, make_source, new_folder
from tests.zoo import build

STEPS = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(file)


def data(text: str, **settings: Any) -> RecoveryData:
    return RecoveryData(train=text, **{"seq_len": 16, "batch_size": 2, "num_samples": 4, "held_out": 0.2} | settings)


def trainer(root: Path, *callbacks: pl.Callback, steps: int = STEPS, **settings: Any) -> pl.Trainer:
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False} | settings
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 2}
    return pl.Trainer(max_steps=steps, default_root_dir=root, callbacks=list(callbacks), **settings)


def recovery(folder: str, **settings: Any) -> Recovery:
    return Recovery(folder, learning_rate=5e-3, **settings)


def losses(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", DEFAULTS)
def test_recovery_lowers_the_loss_of_every_method(folder: str, text: str, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    module = recovery(folder)
    run = trainer(tmp_path, Evaluate(), Prune(method(name)), Export(str(tmp_path / "out")), steps=30)
    run.fit(module, datamodule=data(text))
    rows = next(c for c in run.callbacks if isinstance(c, Evaluate)).rows  # type: ignore[attr-defined]
    assert rows["recovered"].perplexity < 0.9 * rows["pruned"].perplexity
    assert rows["recovered"].block_parameters == rows["pruned"].block_parameters < rows["dense"].block_parameters
    held_out = data(text, tokenizer=folder).held_out_windows()
    assert perplexity(load_pruned(tmp_path / "out"), held_out) == pytest.approx(rows["recovered"].perplexity, rel=1e-6)


def test_only_adapters_are_trained(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder)
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    trainer(tmp_path).fit(module, datamodule=data(text))
    after = dict(module.model.named_parameters())
    for name, value in before.items():
        kept = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[kept], value)
    assert all("lora" in n for n, p in after.items() if p.requires_grad)
    assert any(p.abs().sum() > 0 for n, p in after.items() if "lora_B" in n)


def test_ranks_follow_importance_and_sum_to_the_budget(folder: str, text: str, tmp_path: Path) -> None:
    for by in ("importance", "damage", "uniform"):
        module = recovery(folder, lora=LoRA(rank=8, by=by))  # type: ignore[arg-type]
        trainer(tmp_path / by, Prune(CFSP(0.3, a=3)), steps=1).fit(module, datamodule=data(text))
        plan = plan_of(module.model)
        assert plan is not None
        assert sum(module.ranks) == 3 * 8
        share = {"importance": plan.importance, "damage": plan.damage, "uniform": torch.ones(3)}[by]
        assert all(abs(rank - 8 * u / share.mean()) < 1 for rank, u in zip(module.ranks, share, strict=True))
        scales = {s for _, layer in adapters(module.model) for s in layer.scaling.values()}
        assert all(s == pytest.approx(32 / 8) for s in scales)


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoRA(rank=2)},
    "dropout": {"lora": LoRA(rank=2, dropout=0.3)},
    "dora": {"lora": LoRA(rank=2, dropout=0.3, dora=True, rslora=True)},
    "consumers": {"train": "consumers", "dtype": "bfloat16"},
    "all": {"train": "all", "dtype": "bfloat16"},
}


def way_of(root: Path, folder: str, text: str, way: str, **settings: Any) -> tuple[dict[str, torch.Tensor], float]:
    pl.seed_everything(0)
    module = recovery(folder, **WAYS[way])
    save = ModelCheckpoint(root / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = trainer(root, Prune(FLAP(0.3)), save, enable_checkpointing=True)
    run.fit(module, datamodule=data(text, seq_len=24, batch_size=18), **settings)
    assert run.num_training_batches == 4
    return losses(module), float(run.callback_metrics["train_loss"])


@pytest.mark.parametrize(
    ("way", "stops"), [("lora", (3, 4, 7)), ("dropout", (3, 4, 7)), ("dora", (3,)), ("consumers", (3,)), ("all", (3,))]
)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    folder: str, text: str, tmp_path: Path, way: str, stops: tuple[int, ...], monkeypatch
) -> None:
    """An epoch has 4 batches: stops within one, at the last batch of one, and in a later one."""
    whole, loss = way_of(tmp_path / "whole", folder, text, way)
    monkeypatch.setattr("plprune.methods.run.Request.prune", lambda *_: pytest.fail("calibrated again"))
    for stop in stops:
        parts = shutil.copytree(tmp_path / "whole", tmp_path / str(stop))
        resumed, resumed_loss = way_of(parts, folder, text, way, ckpt_path=parts / "ckpt" / f"step={stop}.ckpt")
        assert resumed_loss == loss
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_checkpoints_hold_the_adapters_only(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder)
    run = trainer(tmp_path, Prune(CFSP(0.3)), steps=2)
    run.fit(module, datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all("lora_" in name for name in state)


def test_checkpoints_hold_magnitudes_too(folder: str, text: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, Prune(CFSP(0.3)), Export(str(tmp_path / "out")), steps=2)
    module = recovery(folder, lora=LoRA(rank=2, dora=True))
    run.fit(module, datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    magnitudes = [name for name in state if "lora_magnitude_vector" in name]
    assert len(magnitudes) == len(adapters(module.model))
    torch.testing.assert_close(logits(load_pruned(tmp_path / "out")), logits(module.model.eval()))
    with pytest.raises(ValueError, match=r"this run's model\.lora\.dora is False, the checkpoint's is True"):
        trainer(tmp_path, Prune(CFSP(0.3)), steps=3).fit(
            recovery(folder, lora=LoRA(rank=2)), datamodule=data(text), ckpt_path=tmp_path / "a.ckpt"
        )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixture")
    build("mixtral", num_hidden_layers=2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


OF_MIXTURES: dict[str, dict[str, Any]] = {  # ways to train
    "routers": {"train": "routers", "dtype": "bfloat16"},
    "experts": {"lora": LoRA(rank=2, targets=[], experts=True), "gradient_checkpointing": True},
}


@pytest.mark.parametrize("way", OF_MIXTURES)
def test_mixtures_are_recovered_saved_and_resumed(mixture: str, text: str, tmp_path: Path, way: str) -> None:
    ends = []
    for stop in (None, 2):
        pl.seed_everything(0)
        module, evaluate = recovery(mixture, **OF_MIXTURES[way]), Evaluate()
        save = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [evaluate, save, Prune(REAP(0.25, sparsity_of="experts"))]
        callbacks.append(Export(str(tmp_path / "out"), overwrite=True))
        run = trainer(tmp_path, *callbacks, steps=4, enable_checkpointing=True)
        run.fit(module, datamodule=data(text), ckpt_path=stop and tmp_path / "kept" / f"step={stop}.ckpt")
        ends.append(losses(module.model))
    factors = [f"mlp.experts.{nested}lora_{x}.default.weight" for nested in ("", "base_layer.") for x in "AB"]
    names = {f"model.layers.{i}.{n}" for i in range(2) for n in (["mlp.gate.weight"] if way == "routers" else factors)}
    assert ends[0].keys() == names
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert torch.load(tmp_path / "kept" / "step=2.ckpt")["state_dict"].keys() == {f"model.{name}" for name in names}
    after, plain = load_pruned(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(after), logits(plain))
    with merged(module.model.eval()):
        assert torch.equal(logits(after), logits(module.model))
        assert all(torch.equal(p, after.get_parameter(name)) for name, p in module.model.named_parameters())
    assert evaluate.rows["recovered"].perplexity < evaluate.rows["pruned"].perplexity


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_consumers_are_trained_and_nothing_else(folder: str, text: str, tmp_path: Path, dtype: Any) -> None:
    module = recovery(folder, train="consumers", dtype=dtype)
    prune, evaluate = Prune(CFSP(0.3)), Evaluate()
    run = trainer(tmp_path, evaluate, prune, Export(str(tmp_path / "out")), logger=CSVLogger(tmp_path, "", ""))
    run.fit(module, datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")

    names = {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}  # CFSP leaves attentions whole
    trained = losses(module.model)
    assert trained.keys() == names
    assert {value.dtype for value in trained.values()} == {torch.float32}
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"model.{name}" for name in names}
    assert module.ranks == []
    assert not (tmp_path / "hparams.yaml").exists() or not yaml.safe_load((tmp_path / "hparams.yaml").read_text())

    before, after = tiny().to(getattr(torch, dtype)), load_pruned(tmp_path / "out")
    apply(before, cast(PruningPlan, prune.plan))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert old.dtype == new.dtype
        assert torch.equal(old, new) == (name not in names), name
    assert all(torch.equal(dict(after.named_parameters())[n], v.to(after.dtype)) for n, v in trained.items())
    assert evaluate.rows["recovered"].bytes == evaluate.rows["pruned"].bytes
    assert evaluate.rows["recovered"].perplexity < evaluate.rows["pruned"].perplexity
    held_out = data(text, tokenizer=folder).held_out_windows()
    assert perplexity(after, held_out) == pytest.approx(evaluate.rows["recovered"].perplexity, rel=1e-6)


def test_a_checkpoint_of_another_plan_or_model_is_refused(folder: str, text: str, tmp_path: Path) -> None:
    run = trainer(tmp_path / "a", Prune(CFSP(0.3)), steps=2)
    run.fit(recovery(folder), datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    other = save_tiny(tmp_path / "other", seed=9)
    for model, sparsity, said in (
        (folder, 0.2, "method.sparsity is 0.2"),
        (other, 0.3, "model.name_or_path is .*other"),
    ):
        again = trainer(tmp_path / "a", Prune(CFSP(sparsity)), steps=4)
        with pytest.raises(ValueError, match=f"this run's {said}"):
            again.fit(recovery(model), datamodule=data(text), ckpt_path=tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match="trained on another base model or plan"):
            again.validate(recovery(model), datamodule=data(text), ckpt_path=tmp_path / "a.ckpt")


def test_a_missing_adapter_is_noticed(folder: str, text: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=1)
    run.fit(recovery(folder), datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["state_dict"].popitem()
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="do not train the same parameters"):
        trainer(tmp_path, steps=2).fit(recovery(folder), datamodule=data(text), ckpt_path=tmp_path / "b.ckpt")


def test_prune_works_with_any_module_that_holds_a_model(tmp_path: Path) -> None:
    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = tiny("qwen2")

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.network(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Plain()
    prune = Prune(CFSP(0.3), calibration=[windows()], attribute="network")
    before = sum(p.numel() for p in module.parameters())
    run = trainer(tmp_path, prune, Export(str(tmp_path / "out"), attribute="network"), steps=3)
    run.fit(module, torch.utils.data.DataLoader(windows(8), batch_size=2))  # type: ignore[arg-type]
    assert sum(p.numel() for p in module.parameters()) < before
    ids = windows(1)
    with torch.no_grad():
        assert torch.equal(load_pruned(tmp_path / "out")(input_ids=ids).logits, module.network(input_ids=ids).logits)


def test_prune_says_what_is_missing(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Recovery\.net is NoneType"):
        trainer(tmp_path, Prune(CFSP(), attribute="net")).fit(recovery(folder), windows())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no calibration text"):
        trainer(tmp_path, Prune(CFSP())).fit(recovery(folder), windows())  # type: ignore[arg-type]


def test_a_second_run_uses_the_plan_and_another_setting_makes_its_own(folder: str, text: str, tmp_path: Path) -> None:
    for sparsity in (0.2, 0.2, 0.3):
        trainer(tmp_path, Prune(FLAP(sparsity)), steps=1).fit(recovery(folder), datamodule=data(text))
    plans = [PruningPlan.load(path) for path in (tmp_path / "plans").iterdir()]
    assert sorted(plan.sparsity for plan in plans) == [0.2, 0.3]


def test_fit_goes_on_from_a_pruned_folder(folder: str, text: str, tmp_path: Path) -> None:
    method = CFSP(0.3)
    trainer(tmp_path, Prune(method), Export(str(tmp_path / "out")), steps=2).fit(
        recovery(folder), datamodule=data(text)
    )
    module = recovery(str(tmp_path / "out"))
    run = trainer(tmp_path, Prune(method), Export(str(tmp_path / "further")), steps=2)
    run.fit(module, datamodule=data(text))
    plan = plan_of(load_pruned(tmp_path / "further"))
    assert plan is not None
    assert plan.previous is None
    assert plan.digest == plan_of(load_pruned(tmp_path / "out")).digest  # type: ignore[union-attr]


def test_validate_and_test_see_the_pruned_model(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder)
    run = trainer(tmp_path, Prune(CFSP(0.3)), steps=4)
    run.fit(module, datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    kept = copy.deepcopy(losses(module))
    again = recovery(folder)
    run = trainer(tmp_path, Prune(CFSP(0.3)))
    (validated,) = run.validate(again, datamodule=data(text, max_windows=3), ckpt_path=tmp_path / "a.ckpt")
    (tested,) = run.test(again, datamodule=data(text, max_windows=3), ckpt_path=tmp_path / "a.ckpt")
    assert all(torch.equal(losses(again)[name], value) for name, value in kept.items())
    expected = perplexity(again.model, data(text, max_windows=3, tokenizer=folder).held_out_windows())
    assert validated["val_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert tested["test_perplexity"] == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(folder: str, text: str, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = recovery(folder, gradient_checkpointing=checkpointing)
        trainer(tmp_path, Prune(CFSP(0.3)), steps=4).fit(module, datamodule=data(text))
        ends.append(losses(module))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value)


def test_bfloat16_weights_with_float32_adapters(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder, dtype="bfloat16")
    trainer(tmp_path, Prune(CFSP(0.3)), Export(str(tmp_path / "out")), steps=3).fit(module, datamodule=data(text))
    assert {p.dtype for p in losses(module).values()} == {torch.float32}
    assert load_pruned(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("train", ["lora", "consumers", "all"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16)])
def test_what_is_trained_stays_float32_in_half_precision(
    folder: str, text: str, tmp_path: Path, train: Any, precision: Any, dtype: torch.dtype
) -> None:
    module = recovery(folder, train=train, dtype="float32")
    run = trainer(tmp_path, Prune(CFSP(0.3)), Export(str(tmp_path / "out")), steps=2, precision=precision)
    run.fit(module, datamodule=data(text))
    assert {p.dtype for p in losses(module).values()} == {torch.float32}
    frozen = {p.dtype for p in module.model.parameters() if not p.requires_grad}
    assert frozen == (set() if train == "all" else {dtype})
    assert {p.dtype for p in load_pruned(tmp_path / "out").parameters()} == {dtype}


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(folder: str, text: str, tmp_path: Path, where: str) -> None:
    class Spoil(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                next(p for p in pl_module.parameters() if p.requires_grad).data[0, 0] = torch.nan

    keep = Checkpoint(every_n_train_steps=2, dirpath=str(tmp_path / "kept"))
    run = trainer(
        tmp_path,
        keep,
        Spoil(),
        Export(str(tmp_path / "out")),
        steps=3 if where == "weight" else 6,
        enable_checkpointing=True,
    )
    expected = "weight is not finite after step 3" if where == "weight" else "loss of step 4 is not finite"
    with pytest.raises(ValueError, match=expected):
        run.fit(recovery(folder), datamodule=data(text))
    assert not (tmp_path / "out").exists()
    assert [path.name for path in checkpoints(tmp_path / "kept")] == ["step=000002.ckpt"]
    assert torch.load(tmp_path / "kept" / "step=000002.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.parametrize("settings", [{"steps": 0}, {"limit_train_batches": 0}, {"steps": -1, "max_epochs": 0}])
def test_without_training_the_pruned_model_is_judged_and_exported(
    folder: str, text: str, tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, report = Evaluate(), Report(str(tmp_path / "report"), prompts=["the"])
    run = trainer(tmp_path, evaluate, report, Prune(CFSP(0.3)), Export(str(tmp_path / "out")), **settings)
    run.fit(recovery(folder), datamodule=data(text))
    assert list(evaluate.rows) == ["dense", "pruned"]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line][1:] == ["dense", "pruned"]
    held_out = data(text, tokenizer=folder).held_out_windows()
    found = perplexity(load_pruned(tmp_path / "out"), held_out)
    assert found == pytest.approx(evaluate.rows["pruned"].perplexity, rel=1e-6)
    assert json.loads((tmp_path / "report" / "report.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: [Prune(CFSP()), Evaluate()], "Evaluate is listed after Prune, and .*: list Evaluate before Prune"),
        (lambda: [EMAWeightAveraging()], "EMAWeightAveraging copies the model before it is pruned"),
        (lambda: [StochasticWeightAveraging(1e-2)], "StochasticWeightAveraging copies the model before it is pruned"),
        (lambda: [BackboneFinetuning()], "BackboneFinetuning chooses what is trained, as model.lora and model.train"),
        (lambda: [ModelPruning("l1_unstructured")], "ModelPruning masks weights"),
        (lambda: [BatchSizeFinder()], r"BatchSizeFinder changes data\.batch_size after the steps were counted"),
        (lambda: [LearningRateFinder()], "LearningRateFinder suggests a rate that the schedule does not use"),
        (lambda: [GradientAccumulationScheduler({0: 2})], r"set trainer\.accumulate_grad_batches; leave it out"),
        (lambda: [SpikeDetection()], "SpikeDetection takes a batch's share"),
        (lambda: [EarlyStopping("val_loss")], "monitors val_loss, which is not logged: monitor one of train_loss"),
        (lambda: [ModelCheckpoint(monitor="loss")], "ModelCheckpoint monitors loss, which is not logged: monitor one"),
    ],
)
def test_callbacks_that_cannot_work_are_refused_before_pruning(
    folder: str, text: str, tmp_path: Path, make: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plprune.methods.run.Request.prune", lambda *_: pytest.fail("pruned"))
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, *make(), enable_checkpointing=None).fit(recovery(folder), datamodule=data(text))


def test_callbacks_in_an_order_that_loses_something_are_refused() -> None:
    makers: dict[str, Any] = {kind.__name__: kind for kind in (Watch, CloseBar, Evaluate, Report)}
    makers |= {"Prune": lambda: Prune(CFSP()), "Export": lambda: Export("out")}
    for first, second, lost in ORDER:
        wrong = [makers[second](), pl.Callback(), makers[first]()]
        with pytest.raises(ValueError, match=f"{first} is listed after {second}, and {lost}: list {first} before"):
            wrong[0].setup(SimpleNamespace(callbacks=wrong), None, "fit")
    right = ("Watch", "CloseBar", "Evaluate", "Report", "Export", "Prune")
    check_order(cast(Any, SimpleNamespace(callbacks=[makers[name]() for name in right])))


def test_a_fitted_module_is_not_pruned_again(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder)
    trainer(tmp_path, Prune(CFSP(0.2)), steps=1).fit(module, datamodule=data(text))
    with pytest.raises(ValueError, match="the model was trained before"):
        trainer(tmp_path, Prune(CFSP(0.3)), steps=1).fit(module, datamodule=data(text))


def test_a_run_without_an_end_is_refused(folder: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, steps=-1, max_epochs=-1).fit(recovery(folder), datamodule=data(text))


def test_loss_and_perplexity_agree_with_transformers(folder: str) -> None:
    module = recovery(folder)
    ids = windows()
    with torch.no_grad():
        theirs = module.model(input_ids=ids, labels=ids).loss.item()
    assert perplexity(module.model, list(ids.split(4))) == pytest.approx(math.exp(theirs), rel=1e-5)


def test_training_says_when_it_will_end(folder: str, text: str, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr("plprune.io.progress.Progress.seconds", 0.0)
    run = trainer(tmp_path, steps=3)
    with caplog.at_level(logging.INFO, "plprune.io.progress"):
        run.fit(recovery(folder), datamodule=data(text))
    lines = [record.getMessage() for record in caplog.records if record.name == "plprune.io.progress"]
    assert [re.sub(r"\d+ s left", "TIME left", line) for line in lines] == [
        f"training: {step} of 3 steps, TIME left" for step in (1, 2)
    ]
    assert run.callback_metrics["minutes_left"] == 0


def test_a_resumed_run_remembers_what_was_measured(folder: str, text: str, tmp_path: Path) -> None:
    first = Evaluate()
    run = trainer(tmp_path, first, Prune(CFSP(0.3)), steps=2)
    run.fit(recovery(folder), datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = Evaluate()
    trainer(tmp_path, again, Prune(CFSP(0.3)), steps=4).fit(
        recovery(folder), datamodule=data(text), ckpt_path=tmp_path / "a.ckpt"
    )
    assert list(again.rows) == ["dense", "pruned", "recovered"]
    assert again.rows["pruned"] == first.rows["pruned"]
    assert again.rows["recovered"] != first.rows["recovered"]


# ---- what the loss is divided by


class Unsized(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Rows of which nobody knows how many there are."""

    def __init__(self, rows: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.rows)


def unequal(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rows that have 0 to 15 tokens which count."""
    firsts = torch.randint(1, 17, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = windows(count)
    return list(zip(ids, torch.where(torch.arange(16) >= firsts, ids, IGNORED), strict=True))


@pytest.mark.parametrize("kind", [list, Unsized])
def test_batches_that_are_accumulated_are_one_batch(folder: str, tmp_path: Path, kind: Any) -> None:
    """Of 22 rows, so that the last step of each of both epochs has six."""
    found = []
    for size in (8, 2, 1):
        torch.manual_seed(0)
        module, rows = recovery(folder), kind(unequal(22))
        logger = CSVLogger(tmp_path, "", str(size))
        settings: dict[str, Any] = {"accumulate_grad_batches": 8 // size, "gradient_clip_val": 0.5, "logger": logger}
        trainer(tmp_path, steps=6, log_every_n_steps=1, **settings).fit(
            module, DataLoader(rows, batch_size=size, collate_fn=collate)
        )
        names = ("train_loss", "grad_norm/total")
        found.append((losses(module), [logged(tmp_path / str(size), name) for name in names]))
    for weights, (loss, norm) in found[1:]:
        torch.testing.assert_close(weights, found[0][0], rtol=0, atol=1e-4)
        assert loss == pytest.approx(found[0][1][0], abs=1e-4)
        assert norm == pytest.approx(found[0][1][1], rel=1e-3)
    assert len(found[0][1][0]) == 6


def test_the_loss_of_a_step_is_the_mean_over_all_its_tokens_that_count(folder: str, tmp_path: Path) -> None:
    module, rows = recovery(folder), unequal(8)
    ids, labels = (torch.stack(each) for each in zip(*rows, strict=True))
    with torch.no_grad():
        expected = next_token_loss(module.model(input_ids=ids).logits, labels)
    run = trainer(tmp_path, steps=1, accumulate_grad_batches=4)
    run.fit(module, DataLoader(cast(Any, rows), batch_size=2, collate_fn=collate))
    assert run.callback_metrics["train_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_step_in_which_nothing_counts_changes_nothing(folder: str, tmp_path: Path) -> None:
    module, ids = recovery(folder), windows(4)
    rows = [(row, torch.full_like(row, IGNORED)) for row in ids]
    trainer(tmp_path, steps=1).fit(module, DataLoader(cast(Any, rows), batch_size=2, collate_fn=collate))
    assert all(not p.any() for name, p in module.named_parameters() if "lora_B" in name)


# ---- what is logged


class Batches(pl.Callback):
    """Keeps what a model is trained on, and what it was before."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model, self.seen = copy.deepcopy(cast(Recovery, pl_module).model), []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        self.seen.append(batch)


def logged(root: Path, name: str) -> dict[int, float]:
    with open(root / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def test_the_norms_are_of_all_accumulated_gradients_before_clipping(folder: str, text: str, tmp_path: Path) -> None:
    batches = Batches()
    logger = CSVLogger(tmp_path, "", "")
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "log_every_n_steps": 1}
    trainer(tmp_path, Prune(CFSP(0.3)), batches, steps=1, logger=logger, **settings).fit(
        recovery(folder), datamodule=data(text)
    )
    for batch in batches.seen:
        (next_token_loss(batches.model(input_ids=batch["input_ids"]).logits, batch["labels"]) / 2).backward()
    blocks = [[p.grad for p in block.module.parameters() if p.grad is not None] for block in blocks_of(batches.model)]
    assert len(batches.seen) == 2
    for i, grads in enumerate(blocks):
        expected = torch.cat([grad.flatten() for grad in grads]).norm().item()
        assert logged(tmp_path, f"grad_norm/block_{i:02}") == {0: pytest.approx(expected, rel=1e-5)}
    expected = torch.cat([grad.flatten() for grads in blocks for grad in grads]).norm().item()
    assert logged(tmp_path, "grad_norm/total") == {0: pytest.approx(expected, rel=1e-5)}


def test_norms_are_computed_when_they_are_logged_only(folder: str, text: str, tmp_path: Path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("plprune.training.module.gradient_norms", lambda p: calls.append(p) or torch.ones(3))
    for logger, every, count in ((CSVLogger(tmp_path, "", ""), 4, 2), (False, 1, 0)):
        calls.clear()
        trainer(tmp_path, logger=logger, log_every_n_steps=every).fit(recovery(folder), datamodule=data(text))
        assert len(calls) == count
    assert set(logged(tmp_path, "grad_norm/total")) == {3, 7}


def test_a_block_without_adapters_has_no_gradient() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert gradient_norms([[], [weight], [nn.Parameter(torch.ones(1))]]).tolist() == [0.0, 5.0, 0.0]


def test_ranks_are_logged_once(folder: str, text: str, tmp_path: Path) -> None:
    module = recovery(folder, lora=LoRA(rank=8))
    logger = CSVLogger(tmp_path, "", "")
    run = trainer(tmp_path, Prune(CFSP(0.3, a=3)), steps=2, logger=logger)
    run.fit(module, datamodule=data(text))
    run.save_checkpoint(tmp_path / "a.ckpt")
    ranks = {f"rank/block_{i:02}": rank for i, rank in enumerate(module.ranks)}
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text()) == ranks
    for name, rank in ranks.items():
        assert logged(tmp_path, name) == {0: rank}
    again = CSVLogger(tmp_path / "again", "", "")
    trainer(tmp_path, Prune(CFSP(0.3, a=3)), steps=3, logger=again, log_every_n_steps=1).fit(
        recovery(folder, lora=LoRA(rank=8)), datamodule=data(text), ckpt_path=tmp_path / "a.ckpt"
    )
    assert yaml.safe_load((tmp_path / "again" / "hparams.yaml").read_text()) == ranks
    assert logged(tmp_path / "again", "rank/block_00") == {}


STRATEGIES = {
    "ddp": (),
    "FSDP2": ("--trainer.strategy=plprune.training.strategies.FSDP2", "--trainer.strategy.process_group_backend=gloo"),
    "DeepSpeed": ("--trainer.strategy=plprune.training.strategies.CPUDeepSpeed", "--trainer.strategy.stage=2"),
}


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("name", STRATEGIES)
def test_several_processes_log_the_norms_of_one(tmp_path: Path, name: str) -> None:
    source = make_source(tmp_path)
    logs = ("--trainer.logger=null", "--trainer.log_every_n_steps=1", "--trainer.max_steps=4")
    norms = []
    for ranks in (1, 2):
        folder = new_folder(source, tmp_path / str(ranks), dropout=0.0)
        strategy = STRATEGIES[name] if ranks > 1 else ()
        run = Run(folder, *logs, f"--data.batch_size={8 // ranks}", ranks=ranks, strategy=strategy)
        assert run.finish() == [0] * ranks, run.output()
        norms.append(logged(folder / "lightning_logs" / "fit" / "version_0", "grad_norm/total"))
    assert set(norms[0]) == set(range(4))
    if name == "DeepSpeed":
        assert norms[1] == {}
        assert run.output().count("gradient norms are not logged") == 1
    else:
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
