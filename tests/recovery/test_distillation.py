"""Learning from the dense model: the loss, the teacher's answers on disk, and runs that find them."""

import shutil
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from plprune import CFSP, FLAP, Export, LoRA, Prune, Recovery, RecoveryData
from plprune.cli import main
from plprune.comparison.engine import compare
from plprune.comparison.study import Study, Training
from plprune.evaluation.perplexity import Protocol
from plprune.io import distributed
from plprune.io.text import IGNORED
from plprune.pruning.losses import divergence, next_token_loss, top_k_log_probs
from plprune.pruning.plan import fingerprint
from plprune.recovery.distillation import (
    Distillation,
    Teacher,
    TeacherModel,
    hidden_distances,
    loss_denominators,
    recorded_outputs,
    share,
)
from plprune.training.data import collate
from tests.builders import VOCABULARY, jsonl, logits, numbers, save_tiny, tiny, windows
from tests.probes import StopAfter, Stopped

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return numbers(tmp_path_factory.mktemp("text") / "text.txt", 0, 100)


def run(
    root: Path,
    folder: str,
    text: str,
    *callbacks: pl.Callback,
    steps: int = STEPS,
    path: Path | None = None,
    **settings: Any,
) -> Recovery:
    pl.seed_everything(0)
    asked: dict[str, Any] = {"lora": LoRA(rank=2, dropout=0.3)} | settings
    module = Recovery(folder, learning_rate=5e-3, **asked)
    data = RecoveryData(text, seq_len=16, batch_size=4, num_samples=2, held_out=0.2)
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    own = [Prune(FLAP(0.3)), *callbacks]
    pl.Trainer(max_steps=steps, default_root_dir=root, callbacks=own, limit_val_batches=0, **shown).fit(
        module, datamodule=data, ckpt_path=path
    )
    return module


def trained(module: Recovery) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def same(a: Recovery, b: Recovery) -> bool:
    return all(torch.equal(value, trained(b)[name]) for name, value in trained(a).items())


def teacher(settings: Distillation, name: str, root: Path) -> Teacher:
    return Teacher(settings, TeacherModel(name, None, "float32"), "float32", torch.device("cpu"), root)


def one_by_one(count: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": row} for row in windows(count).split(1)]


def labelled(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, :5], labels[1, 7:9] = IGNORED, IGNORED
    return labels


def rows(values: Tensor, labels: Tensor) -> Tensor:
    """What is at the positions whose next token counts."""
    counts = labels[:, 1:] != IGNORED
    return values[:, : counts.shape[1]][counts]


# ---- the loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_with_all_tokens_it_is_the_divergence_of_the_whole_distributions(temperature: float) -> None:
    ids, ours, theirs = windows(2), logits(tiny(seed=1), windows(2)), logits(tiny(), windows(2))
    labels = labelled(ids)
    expected, count = 0.0, 0
    for b, t in (labels[:, 1:] != IGNORED).nonzero().tolist():
        q, p = (z[b, t].double().div(temperature).softmax(0) for z in (theirs, ours))
        expected += (q * (q.log() - p.log())).sum().item()
        count += 1
    assert count == 2 * 15 - 4 - 2
    said = rows(ours, labels), *top_k_log_probs(rows(theirs, labels), VOCABULARY, temperature)
    found = divergence(*said, temperature)
    assert found.item() == pytest.approx(temperature**2 * expected, rel=1e-4)


def test_what_is_left_of_the_vocabulary_is_one_event() -> None:
    ids, ours, theirs = windows(2), logits(tiny(seed=1), windows(2)), logits(tiny(), windows(2))
    labels, terms = labelled(ids), []
    for b, t in (labels[:, 1:] != IGNORED).nonzero().tolist():
        q, p = (z[b, t].double().softmax(0) for z in (theirs, ours))
        best = q.argsort(descending=True)[:5]
        q, p = (torch.cat([each[best], (1 - each[best].sum())[None]]) for each in (q, p))
        terms.append((q * (q / p).log()).sum())
    ours.requires_grad_()
    found = divergence(rows(ours, labels), *top_k_log_probs(rows(theirs, labels), 5, 1.0), 1.0)
    assert found.item() == pytest.approx(torch.stack(terms).sum().item(), rel=1e-4)
    found.backward()
    grad = cast(Tensor, ours.grad)
    counts = torch.cat([labels[:, 1:] != IGNORED, torch.zeros(2, 1, dtype=torch.bool)], 1)
    assert torch.equal(grad.abs().sum(-1) > 0, counts)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(2, 16), atol=1e-6, rtol=0.0)


def test_it_is_zero_for_the_teacher_itself_and_its_gradient_that_of_the_formula() -> None:
    z = torch.randn(2, 7, dtype=torch.float64).float().requires_grad_()
    loss = divergence(z, *top_k_log_probs(z.detach(), 3, 2.0), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(cast(Tensor, z.grad), torch.zeros_like(z), atol=1e-6, rtol=0.0)


def test_hidden_states_are_compared_relative_to_the_teachers() -> None:
    ours, theirs, labels = torch.randn(3, 2, 5, 4), torch.randn(2, 3, 4, 4), windows(2, 5)
    labels[1, 2:] = IGNORED
    expected = []
    for i in range(3):
        rows = [(ours[i, b, t], theirs[b, i, t]) for b, t in (labels[:, 1:] != IGNORED).nonzero().tolist()]
        expected.append(sum((a - b).square().sum() for a, b in rows) / sum(b.square().sum() for _, b in rows))
    found = hidden_distances(list(ours), labels, theirs) / loss_denominators(labels, {"hidden": theirs})[1:]
    torch.testing.assert_close(found, torch.stack(expected), atol=0.0, rtol=1e-5)


def test_what_is_recorded_is_what_leaves_the_blocks() -> None:
    model = tiny()
    with torch.no_grad(), recorded_outputs(model, [0, 2]) as states:
        hidden = model.model(windows(2), output_hidden_states=True)
    assert torch.equal(states[0], hidden.hidden_states[1])
    assert torch.equal(model.model.norm(states[1]), hidden.last_hidden_state)
    logits(model)
    assert len(states) == 2


@pytest.mark.parametrize("settings", [{"weight": 1.5}, {"weight": -0.1}, {"top_k": 0}, {"temperature": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Distillation(**settings)


# ---- the teacher


@pytest.mark.parametrize("of", ["logits", "hidden", "both"])
def test_answers_are_the_dense_models_and_do_not_depend_on_the_batch(folder: str, tmp_path: Path, of: Any) -> None:
    settings = Distillation(of, temperature=2.0, top_k=7)
    found = teacher(settings, folder, tmp_path).answers({"input_ids": windows(3)})
    alone = teacher(settings, folder, tmp_path / "alone").answers({"input_ids": windows(3)[1:2]})
    assert all(torch.equal(value[1:2], alone[name]) for name, value in found.items())
    assert found.keys() == {"logits": {"values", "tokens"}, "hidden": {"hidden"}}.get(
        of, {"values", "tokens", "hidden"}
    )
    model = tiny()
    if of != "hidden":
        values, tokens = top_k_log_probs(logits(model, windows(3))[:, :-1], 7, 2.0)
        assert (found["values"].dtype, found["tokens"].dtype) == (torch.float16, torch.int32)
        torch.testing.assert_close(found["values"].float(), values, atol=0.01, rtol=1e-3)
        assert torch.equal(found["tokens"].long(), tokens)
    if of != "logits":
        with torch.no_grad(), recorded_outputs(model, [0, 1, 2]) as states:
            model(windows(3))
        assert found["hidden"].dtype == torch.bfloat16
        torch.testing.assert_close(found["hidden"].float(), torch.stack(states, 1)[:, :, :-1], atol=0.01, rtol=0.01)


def test_the_model_is_loaded_for_what_is_new_only_and_freed(folder: str, tmp_path: Path, monkeypatch) -> None:
    first = teacher(Distillation(), folder, tmp_path)
    first.prepare(one_by_one(3))
    assert first._model is None
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    known = TeacherModel(folder, fingerprint(tiny().named_parameters()), "float32")
    again = Teacher(Distillation(), known, "float32", torch.device("cpu"), tmp_path)
    monkeypatch.setattr(TeacherModel, "load", lambda *_: pytest.fail("loaded again"))
    again.prepare(one_by_one(3))
    some = {"input_ids": windows(2)}
    assert torch.equal(again.answers(some)["tokens"], first.answers(some)["tokens"])
    for other in (Distillation(top_k=3), Distillation(temperature=2.0), Distillation("both")):
        assert Teacher(other, known, "float32", torch.device("cpu"), tmp_path).folder != first.folder
    assert not list(tmp_path.rglob(".*"))
    apart = some | {"position_ids": torch.arange(16).remainder(6).expand(2, -1)}
    assert not any(again.file({name: each[:1] for name, each in apart.items()}) == file for file in files)


def test_every_window_is_asked_for_by_one_of_the_processes_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [["a", "b", "e", "f"], ["b", "c", "e", "f"], ["d"]]
    monkeypatch.setattr(distributed, "gather_objects", lambda own, group: asked)
    parts = []
    for rank, own in enumerate(asked):
        monkeypatch.setattr(distributed, "rank", lambda group, rank=rank: rank)
        parts.append(share(own, None))
    assert all(part <= set(own) for part, own in zip(parts, asked, strict=True))
    assert sorted(name for part in parts for name in part) == ["a", "b", "c", "d", "e", "f"]
    assert [len(part) for part in parts] in ([3, 2, 1], [2, 3, 1])


def test_random_numbers_are_as_without_a_teacher(folder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    teacher(Distillation(), folder, tmp_path).prepare(one_by_one(1))
    assert torch.equal(torch.rand(3), expected)


# ---- runs


def test_a_weight_of_zero_is_no_distillation(folder: str, text: str, tmp_path: Path) -> None:
    plain = run(tmp_path, folder, text)
    assert same(plain, run(tmp_path, folder, text, distill=Distillation(weight=0.0)))
    assert not (tmp_path / "teacher").exists()
    assert not same(plain, run(tmp_path, folder, text, distill=Distillation()))


def test_the_loss_is_shared_between_text_and_teacher(folder: str, tmp_path: Path, text: str) -> None:
    settings = Distillation("both", weight=0.3, top_k=5)
    module = run(tmp_path, folder, text, distill=settings, steps=1, gradient_checkpointing=True)
    batch = {"input_ids": windows(2, 24), "labels": labelled(windows(2, 24))}
    module.model.eval()
    dense, ids, labels = tiny(), batch["input_ids"], batch["labels"]
    with torch.no_grad(), recorded_outputs(module.model, [0, 1, 2]) as ours:
        own = module(ids)
    with torch.no_grad(), recorded_outputs(dense, [0, 1, 2]) as theirs:
        values, tokens = top_k_log_probs(dense(ids).logits[:, :-1], 5, 1.0)
    answers = {"values": values, "tokens": tokens, "hidden": torch.stack(theirs, 1)[:, :, :-1]}
    totals = loss_denominators(labels, answers)
    expected = (hidden_distances(ours, labels, answers["hidden"]) / totals[1:]).mean()
    expected += divergence(rows(own, labels), rows(values, labels), rows(tokens, labels), 1.0) / totals[0]
    assert module._objective.losses(batch, totals)["train_loss"].item() == pytest.approx(
        (0.7 * next_token_loss(own, labels) + 0.3 * expected).item(), rel=2e-3
    )


@pytest.mark.parametrize("of", ["logits", "hidden"])
def test_accumulated_batches_are_divided_by_what_counts_in_all_of_them(folder: str, tmp_path: Path, of: Any) -> None:
    """The labels differ in how many count, and in the first batch of two rows there are none."""
    ids = windows(8)
    labels = torch.where(torch.arange(16) > torch.tensor([15, 15, 2, 14, 8, 1, 12, 5])[:, None], ids, IGNORED)
    ends = []
    for size in (8, 2):
        torch.manual_seed(0)
        module = Recovery(folder, learning_rate=5e-3, distill=Distillation(of))
        shown = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        run = pl.Trainer(max_steps=3, accumulate_grad_batches=8 // size, default_root_dir=tmp_path, **shown)
        run.fit(module, DataLoader(TensorDataset(ids, labels), batch_size=size, collate_fn=cast(Any, collate)))
        ends.append(
            (trained(module), {name: run.callback_metrics[name] for name in ("train_loss", "distillation_loss")})
        )
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("of", ["logits", "both"])
def test_a_second_run_finds_all_answers_and_ends_with_the_same_weights(
    folder: str, text: str, tmp_path: Path, of: Any, monkeypatch
) -> None:
    settings = Distillation(of)
    first = run(tmp_path, folder, text, distill=settings)
    assert cast(Teacher, first._teacher)._model is None
    monkeypatch.setattr(TeacherModel, "load", lambda *_: pytest.fail("loaded again"))
    second = run(tmp_path, folder, text, distill=settings)
    assert same(first, second)


def test_all_windows_are_asked_for_before_training(folder: str, text: str, tmp_path: Path, monkeypatch) -> None:
    stages, own = [], Teacher._ask
    monkeypatch.setattr(Teacher, "_ask", lambda self, file, ids: stages.append(stage[-1]) or own(self, file, ids))
    stage = ["before"]

    class Begin(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            stage.append("training")

    run(tmp_path, folder, text, Begin(), steps=3, distill=Distillation())
    assert stages == ["before"] * 3 * 4


@pytest.mark.parametrize("stop", [-1, 0, 1])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    folder: str, text: str, tmp_path: Path, stop: int, monkeypatch
) -> None:
    """Stops within an epoch, at its last batch, and in the next one."""
    settings = Distillation("both")
    whole = run(tmp_path / "whole", folder, text, steps=8, distill=settings)
    stop += int(whole.trainer.num_training_batches)
    assert 1 < stop < 8
    save = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    with pytest.raises(Stopped):
        run(tmp_path / "parts", folder, text, save, StopAfter(stop), steps=8, distill=settings)
    monkeypatch.setattr(Teacher, "answers", _known(Teacher.answers))
    shutil.rmtree(tmp_path / "parts" / "teacher")
    path = tmp_path / "ckpt" / f"step={stop}.ckpt"
    assert same(whole, run(tmp_path / "parts", folder, text, steps=8, distill=settings, path=path))


def _known(answers: Any) -> Any:
    def call(self: Teacher, given: dict[str, Tensor]) -> Any:
        rows = [{name: each[i : i + 1] for name, each in given.items()} for i in range(len(given["input_ids"]))]
        assert all(self.file(row).exists() for row in rows), "not asked for before training"
        return answers(self, given)

    return call


def test_documents_are_kept_apart_in_training_and_by_the_teacher(folder: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Teacher, "answers", _known(Teacher.answers))
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    text = jsonl(tmp_path / "text.jsonl", [{"text": f"{i} and {i + 1}"} for i in range(100)])
    data = RecoveryData(text, seq_len=16, batch_size=2, intra_document_masking=True)
    module = Recovery(folder, distill=Distillation())
    pl.Trainer(max_steps=2, limit_val_batches=1, default_root_dir=tmp_path, **cast(Any, shown)).fit(module, data)
    batch = next(iter(data.train_dataloader()))
    assert (batch["position_ids"][:, 1:] == 0).any()
    assert module.run["data.intra_document_masking"]
    assert "position_ids" not in next(iter(data.val_dataloader()))


def test_other_data_is_asked_for_as_it_comes(folder: str, tmp_path: Path) -> None:
    module = Recovery(folder, distill=Distillation())
    rows = [(row, row) for row in windows(6)]
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    once = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **cast(Any, shown))
    once.fit(module, DataLoader(rows, batch_size=2, collate_fn=collate))  # type: ignore[arg-type]
    assert len(list((tmp_path / "teacher").rglob("*.safetensors"))) == 6
    assert cast(Teacher, module._teacher)._model is None


def test_the_teacher_of_a_pruned_folder_is_what_it_was_made_from(text: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    run(tmp_path / "first", folder, text, Export(str(tmp_path / "out")), steps=1)
    found = run(tmp_path / "second", str(tmp_path / "out"), text, steps=1, dtype="bfloat16", distill=Distillation())
    expected = fingerprint(tiny().named_parameters())
    assert cast(Teacher, found._teacher).source == TeacherModel(folder, expected, "float32")

    save_tiny(tmp_path / "model", seed=5)
    (tmp_path / "second" / "teacher").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"is not the model that was pruned.*model\.distill\.teacher"):
        run(tmp_path / "second", str(tmp_path / "out"), text, steps=1, distill=Distillation())
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"there is no teacher.*model\.distill\.teacher"):
        run(tmp_path / "second", str(tmp_path / "out"), text, steps=1, distill=Distillation())


def test_a_teacher_that_cannot_teach_is_refused_at_once(folder: str, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=2)
    Recovery(folder, distill=Distillation(teacher=other))
    for of, vocabulary in (("both", VOCABULARY), ("logits", 400)):
        other = save_tiny(tmp_path / of, num_hidden_layers=2, vocab_size=vocabulary)
        with pytest.raises(ValueError, match="cannot be the teacher, as its"):
            Recovery(folder, distill=Distillation(cast(Any, of), teacher=other))
    with pytest.raises(ValueError, match="does not exist"):
        Recovery(folder, distill=Distillation(teacher=str(tmp_path / "none")))
    stranger = Path(save_tiny(tmp_path / "stranger"))
    file = stranger / "tokenizer.json"
    file.write_text(file.read_text().replace('"</s>"', '"<end>"'))
    (stranger / "tokenizer_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"as its tokenizer is not the model's \('</?(s|end)>' is token 2 in only one of"
    ):
        Recovery(folder, distill=Distillation(teacher=str(stranger)))


def test_it_is_asked_for_on_the_command_line(folder: str, text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    options += [f"--model.name_or_path={folder}", f"--data.train={text}", "--data.seq_len=16", "--data.batch_size=2"]
    main(["fit", *options, "--model.distill.of=both", "--model.distill.top_k=3", "--model.train=consumers"])
    (file, _) = (tmp_path / "teacher").rglob("*.safetensors")
    assert load_file(file)["tokens"].shape == (15, 3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bfloat16(folder: str, text: str, tmp_path: Path, precision: Any) -> None:
    """Answers are kept in half precision, and hidden states as they are in the model."""
    module = Recovery(folder, dtype="bfloat16", distill=Distillation("both"))
    settings: Any = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = pl.Trainer(precision=precision, max_steps=1, default_root_dir=tmp_path, **settings)
    trainer.fit(module, datamodule=RecoveryData(text, seq_len=16, batch_size=2, num_samples=2))
    assert trainer.callback_metrics["distillation_loss"].isfinite()
    assert all(each.dtype != torch.float32 for f in tmp_path.rglob("*.safetensors") for each in load_file(f).values())


def test_the_cells_of_a_comparison_share_the_answers(folder: str, text: str, tmp_path: Path, monkeypatch) -> None:
    asked, own = [], Teacher._ask
    monkeypatch.setattr(Teacher, "_ask", lambda self, file, ids: asked.append(file) or own(self, file, ids))
    training = Training(text, 2, 16, 4, lora=LoRA(rank=2), distill=Distillation())
    sizes = {"num_samples": 2, "calibration_seq_len": 16, "protocol": Protocol(16, max_windows=2)}
    study = Study([folder], [FLAP(), CFSP()], [0.25], text, text, recover=training, **cast(Any, sizes))
    cells = compare(study, tmp_path)["cells"]
    assert [cell["stage"] for cell in cells] == ["dense", "pruned", "recovered", "pruned", "recovered"]
    assert len(asked) == len(set(asked)) == 2 * 4
    assert all(file.is_relative_to(tmp_path / "teacher") for file in asked)
