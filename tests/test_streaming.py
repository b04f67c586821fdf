"""A model that streams from disk against the same model in memory, whole runs against stopped and killed ones."""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from plprune import CFSP, PruningMethod, PruningPlan, TwoSSP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model
from plprune.checkpoint.stored import Dtype
from plprune.checkpoint.weights import INDEX, SINGLE
from plprune.cli import main
from plprune.methods import Request
from plprune.pruning import surgery
from plprune.pruning.allocation import top_k
from plprune.pruning.attention_search import AttentionSearch
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import run_block
from plprune.pruning.statistics import Norms
from plprune.pruning.stream import observe, stream
from plprune.pruning.surgery import Surgery
from plprune.streaming import journal_path, open_streamed, prune_streamed
from tests.builders import FAMILIES, METHODS, REPAIRED, logits, method, numbers, save_tiny, tiny, tokenizer, windows
from tests.runs import KILLS, context
from tests.zoo import build

FOUR = ("FLAP AL-AM", "FASP value_channels", "CFSP relative", "TwoSSP")
BATCHES = Calibration(list(windows().split(2)))


def in_memory(folder: Path, how: PruningMethod, dtype: Dtype = "float32") -> tuple[PreTrainedModel, PruningPlan]:
    model = load_model(str(folder), dtype)
    return model, prune(model, how, BATCHES, seed=3)


def streamed(
    folder: Path, how: PruningMethod, output: Path, dtype: Dtype = "float32", offload: Any = None, **options: Any
) -> PruningPlan:
    calibration = dataclasses.replace(BATCHES, offload=offload)
    return prune_streamed(
        open_streamed(str(folder), dtype), Request(how), calibration, output, tokenizer(), 3, **options
    )


def assert_same(output: Path, model: PreTrainedModel, plan: PruningPlan) -> None:
    again = load_pruned(output)
    assert surgery.plan_of(again).digest == plan.digest  # type: ignore[union-attr]
    assert torch.equal(logits(again), logits(model))
    assert not journal_path(output).exists()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="module")
def unequal(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose FFNs have unequal widths: once some have left, the others are cut again."""
    folder = tmp_path_factory.mktemp("models") / "unequal"
    save_pruned(in_memory(llama, CFSP(0.2, a=6.0))[0], folder, tokenizer())
    return folder


# ---- the same as in memory


STREAMED = [name for name in (*METHODS, *REPAIRED) if not name.startswith("LearnedGates")]  # it needs the whole model


@pytest.mark.parametrize("name", STREAMED)
def test_every_method_gives_the_plan_and_the_weights_it_gives_in_memory(name: str, llama: Path, tmp_path: Path) -> None:
    model, plan = in_memory(llama, method(name))
    assert streamed(llama, method(name), tmp_path / "out", offload="disk").digest == plan.digest
    assert_same(tmp_path / "out", model, plan)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
@pytest.mark.parametrize("name", ["FLAP AL-AM", "FASP value_channels", "TwoSSP"])
def test_every_family_streams(family: str, name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family)
    model, plan = in_memory(tmp_path / "model", method(name))
    streamed(tmp_path / "model", method(name), tmp_path / "out")
    assert_same(tmp_path / "out", model, plan)


def test_what_needs_the_whole_model_says_so(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole model: leave out --stream, or take another"):
        streamed(llama, method("LearnedGates"), tmp_path / "out")


@pytest.mark.parametrize("name", FOUR)
def test_in_bfloat16_too(name: str, llama: Path, tmp_path: Path) -> None:
    model, plan = in_memory(llama, method(name), "bfloat16")
    streamed(llama, method(name), tmp_path / "out", "bfloat16", offload="cpu")
    assert_same(tmp_path / "out", model, plan)
    assert load_pruned(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_as_one_saved_from_memory(tied: bool, tmp_path: Path) -> None:
    """But for the shards: one a block, and one for the rest."""
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    model, _ = in_memory(tmp_path / "model", method("FASP kv_heads"))
    save_pruned(model, tmp_path / "whole", tokenizer())
    streamed(tmp_path / "model", method("FASP kv_heads"), tmp_path / "out")
    for file in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "whole" / file).read_text()
    whole, index = load_file(tmp_path / "whole/model.safetensors"), json.loads((tmp_path / "out" / INDEX).read_text())
    shards = {file: load_file(tmp_path / "out" / file) for file in set(index["weight_map"].values())}
    assert sorted(shards) == [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert {name: file for file, shard in shards.items() for name in shard} == index["weight_map"]
    together = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    others = {path.name for path in (tmp_path / "whole").iterdir()} - {"model.safetensors"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*shards, INDEX, *others}
    assert (tmp_path / "out/README.md").read_text() == (tmp_path / "whole/README.md").read_text()


def test_sharded_folders_and_names_without_a_prefix(llama: Path, tmp_path: Path) -> None:
    model, plan = in_memory(llama, method("CFSP relative"))
    load_model(str(llama)).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copytree(llama, tmp_path / "bare")
    weights = load_file(llama / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in weights.items()}, tmp_path / "bare/model.safetensors")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for name in ("sharded", "bare"):
        again = streamed(tmp_path / name, method("CFSP relative"), tmp_path / "out", overwrite=True)
        assert again.origin["weights"] == plan.origin["weights"]
        assert torch.equal(logits(load_pruned(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("first", ["FASP value_channels", "TwoSSP", "FLAP AL-AM"])
def test_a_pruned_model_streams_too(first: str, llama: Path, tmp_path: Path) -> None:
    streamed(llama, method(first, 0.15), tmp_path / "first")
    model, plan = in_memory(tmp_path / "first", method("FLAP AL-AM", 0.15))
    streamed(tmp_path / "first", method("FLAP AL-AM", 0.15), tmp_path / "out")
    assert_same(tmp_path / "out", model, plan)
    assert plan.previous is not None


def test_a_name_on_the_hub_is_looked_up_there(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--tiny/snapshots/abc"
    shutil.copytree(llama, snapshot)
    (tmp_path / "models--org--tiny/refs").mkdir()
    (tmp_path / "models--org--tiny/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = open_streamed("org/tiny")
    assert model.config.name_or_path == "org/tiny"
    assert torch.equal(model.lm_head.weight, load_model(str(llama)).lm_head.weight)  # type: ignore[arg-type,union-attr]


# ---- one block at a time


def test_no_more_than_one_block_is_in_memory(llama: Path) -> None:
    model = open_streamed(str(llama))

    def here() -> list[int]:
        return [b.index for b in blocks_of(model) if not all(p.is_meta for p in b.module.parameters())]

    assert here() == []
    for block, inputs in stream(model, BATCHES):
        assert here() == [block.index]
        observe(block, inputs, Norms)
        assert here() == [block.index]
    assert here() == []
    with blocks_of(model)[1].present(), blocks_of(model)[1].present():
        assert here() == [1]
    assert here() == []


def test_without_a_journal_a_change_is_refused_rather_than_lost(llama: Path) -> None:
    model = open_streamed(str(llama))
    with pytest.raises(ValueError, match="only prune_streamed, or --stream"):
        prune(model, method("CFSP relative"), BATCHES)


def test_the_second_stage_says_beforehand_how_slow_it_is(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        streamed(llama, method("TwoSSP"), tmp_path / "out")
        in_memory(llama, method("TwoSSP"))
    lines = [r.getMessage() for r in caplog.records if "2SSP stage 2" in r.getMessage()]
    assert lines[0].startswith("2SSP stage 2 loads blocks up to 6 times, ")
    assert sum("loads blocks" in line for line in lines) == 1


@dataclasses.dataclass(frozen=True)
class Magnitude(PruningMethod):
    """As in plprune/methods/README.md: no activations, no loop over the stream."""

    sparsity: float = 0.2

    def prune(self, model, batches) -> PruningPlan:
        surgery = Surgery(model)
        for block in surgery.blocks:
            for group in block.groups():
                score = block.weight(group).square().sum((0, 2))
                surgery.keep(block, group, top_k(score, round(len(group) * (1 - self.sparsity))))
        return surgery.plan("Magnitude", dataclasses.asdict(self), torch.ones(len(surgery.blocks)))


@dataclasses.dataclass(frozen=True)
class Twice(PruningMethod):
    """Walks over the blocks twice, and prunes in both walks and between them."""

    sparsity: float = 0.2

    def prune(self, model, batches) -> PruningPlan:
        surgery = Surgery(model)
        for block, inputs in stream(model, batches):
            for group, norms in observe(block, inputs, Norms)[:1]:
                score = norms.pooled[group.consumer.index].sum(1)
                surgery.keep(block, group, top_k(score, len(group) - 1))
        with blocks_of(model)[1].present(), torch.no_grad():
            next(blocks_of(model)[1].module.parameters()).mul_(2)  # not by way of the surgery
        scores = []
        for block, inputs in stream(model, batches):
            ((group, norms),) = observe(block, inputs, Norms, "none")
            scores.append((block, group, norms.mean))
        for block, group, score in scores:
            surgery.keep(block, group, top_k(score, len(group) // 2))
        return surgery.plan("Twice", dataclasses.asdict(self), torch.ones(len(surgery.blocks)))


OTHERS: dict[str, PruningMethod] = {"Magnitude": Magnitude(), "Twice": Twice()}


def called(name: str) -> PruningMethod:
    return OTHERS.get(name) or method(name)


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_of_ones_own_needs_nothing_for_it(name: str, llama: Path, tmp_path: Path) -> None:
    model, plan = in_memory(llama, called(name))
    streamed(llama, called(name), tmp_path / "out")
    assert_same(tmp_path / "out", model, plan)


# ---- stopped and started again


class Stop(BaseException):
    pass


@contextlib.contextmanager
def stopping(count: int) -> Iterator[None]:
    """Stops what runs in the context after so many renamings; all that lasts is renamed."""
    real, left = os.replace, itertools.count(count - 1, -1)

    def replace(*args: Any) -> None:
        real(*args)
        if next(left) == 0:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", replace)
        yield


def goes_on(
    folder: Path, how: Callable[[], PruningMethod], counts: Iterable[int], room: Path, offload: Any = None
) -> None:
    """Runs that stop at each of these renamings, and again soon after they were resumed, end as one in memory."""
    model, plan = in_memory(folder, how())
    for count in counts:
        output = room / str(count)
        if not stops(lambda to=output: streamed(folder, how(), to, offload=offload), count):
            break
        stops(lambda to=output: streamed(folder, how(), to, offload=offload, resume=True, overwrite=True), 2)
        streamed(folder, how(), output, offload=offload, resume=True, overwrite=True)
        assert_same(output, model, plan)
    assert count > 8


def stops(run: Callable[..., Any], count: int) -> bool:
    try:
        with stopping(count):
            run()
    except Stop:
        return True
    return False


@pytest.mark.parametrize(
    ("name", "offload"),
    [
        ("FASP value_channels", "disk"),
        ("CFSP reconstruct", "disk"),
        pytest.param("FASP reconstruct", None, marks=pytest.mark.slow),
        pytest.param("FLAP AL-AM", "disk", marks=pytest.mark.slow),
        pytest.param("TwoSSP", "cpu", marks=pytest.mark.slow),
        pytest.param("FLAP restore", "disk", marks=pytest.mark.slow),
        pytest.param("TwoSSP restore", "cpu", marks=pytest.mark.slow),
        pytest.param("FASP value_channels", None, marks=pytest.mark.slow),
        pytest.param("Magnitude", None, marks=pytest.mark.slow),
        pytest.param("Twice", "disk", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_wherever_it_was_stopped(name: str, offload: Any, llama: Path, tmp_path: Path) -> None:
    goes_on(llama, lambda: called(name), itertools.count(1), tmp_path, offload)


@pytest.mark.slow
def test_a_run_that_drops_ffns_goes_on(unequal: Path, tmp_path: Path) -> None:
    goes_on(unequal, lambda: TwoSSP(0.5, drop_attentions=1, drop_ffns=1), itertools.count(1), tmp_path, "disk")


def test_a_resumed_run_runs_no_block_again(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    monkeypatch.setattr("plprune.pruning.forward.run_block", lambda b, *a: runs.append(b.index) or run_block(b, *a))
    for name in ("FLAP AL-AM", "FASP kv_heads"):
        output = tmp_path / name
        runs.clear()
        assert stops(lambda to=output, how=method(name): streamed(llama, how, to), 1 + 2 * (1 + ("FASP" in name)))
        assert max(runs) == 1
        runs.clear()
        streamed(llama, method(name), output, resume=True)
        assert set(runs) == {2}


def test_what_the_second_stage_has_found_is_not_searched_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[int] = []
    real = AttentionSearch._search
    monkeypatch.setattr(AttentionSearch, "_search", lambda self, c, w: searched.append(len(c)) or real(self, c, w))
    how = TwoSSP(0.4, drop_attentions=2)
    model, plan = in_memory(llama, how)
    assert searched == [3, 2]
    searched.clear()
    renamings = 1 + 3 + 3 + 2 + 1  # what was asked, the blocks of the first stage, their versions, a drop, what is next
    assert stops(lambda: streamed(llama, how, tmp_path / "out"), renamings)
    assert searched == [3, 2]
    streamed(llama, how, tmp_path / "out", resume=True)
    assert searched == [3, 2]
    assert_same(tmp_path / "out", model, plan)


def test_whole_ffns_leave_a_streamed_model(unequal: Path, tmp_path: Path) -> None:
    how = TwoSSP(0.35, drop_ffns=1)
    model, plan = in_memory(unequal, how)
    streamed(unequal, how, tmp_path / "out", offload="disk")
    assert_same(tmp_path / "out", model, plan)
    again, more = in_memory(tmp_path / "out", method("FLAP AL-AM"))
    streamed(tmp_path / "out", method("FLAP AL-AM"), tmp_path / "more")
    assert_same(tmp_path / "more", again, more)


def test_blocks_do_not_leave_a_streamed_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`drop_blocks` needs the whole model in memory: leave out --stream"):
        streamed(llama, TwoSSP(0.5, drop_blocks=1), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == []  # no journal either


def test_a_method_that_looks_past_what_is_kept_is_told_so(llama: Path, tmp_path: Path) -> None:
    how = Peeking()
    assert stops(lambda: streamed(llama, how, tmp_path / "out"), 2)
    with pytest.raises(ValueError, match=r"`hidden` of block 0 is not kept.*start again by --overwrite"):
        streamed(llama, how, tmp_path / "out", resume=True)


@dataclasses.dataclass(frozen=True)
class Peeking(Magnitude):
    def prune(self, model, batches) -> PruningPlan:
        assert all(len(inputs.hidden) for _, inputs in stream(model, batches))
        return super().prune(model, batches)


# ---- on the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and a text, which is the current one."""
    save_tiny(tmp_path / "model", num_hidden_layers=4)
    numbers(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name: str, *more: str) -> list[str]:
    where = ["prune", "model", "--output=out", "--text=text.txt", "--num_samples=6", "--seq_len=12", "--batch_size=2"]
    return [*where, f"--method={name}", "--method.sparsity=0.3", *more]


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert stopped.value.code not in (None, 0)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rstrip().splitlines()[-1].removeprefix("plprune: error: ")


def test_the_command_goes_on_and_knows_when_it_is_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = command("FLAP", "--stream", "--offload=disk")
    main(command("FLAP"))
    whole = PruningPlan.load("out").digest
    shutil.rmtree("out")
    assert stops(lambda: main(run), 4)
    said = complaint(capsys, *run)
    assert said.endswith(".out.progress: continue it by --resume, or start again by --overwrite")
    said = complaint(capsys, *command("CFSP", "--stream", "--resume"))
    assert "has another method (FLAP, now CFSP): give the same command" in said
    said = complaint(capsys, *command("FLAP"))
    assert said.endswith("continue it by --stream --resume, or remove that folder")
    main([*run, "--resume"])
    assert PruningPlan.load("out").digest == whole
    for again in (run, command("FLAP")):
        capsys.readouterr()
        main([*again, "--resume"])
        assert capsys.readouterr().out.startswith("this run is finished: FLAP removed")
    said = complaint(capsys, *command("CFSP", "--stream", "--resume"))
    assert said.endswith("out exists and is not empty: choose another output, or pass --overwrite")
    main([*command("CFSP"), "--resume", "--overwrite"])  # nothing of it is there: it simply starts
    assert PruningPlan.load("out").method == "CFSP"


def test_starting_again_forgets_what_was_done(here: Path) -> None:
    assert stops(lambda: main(command("FLAP", "--stream")), 4)
    main(command("CFSP", "--stream", "--overwrite"))
    assert PruningPlan.load("out").method == "CFSP"
    assert not journal_path("out").exists()


def test_what_there_was_is_replaced_only_at_the_end(here: Path) -> None:
    main(command("CFSP"))
    assert stops(lambda: main(command("FLAP", "--stream", "--overwrite")), 4)
    assert PruningPlan.load("out").method == "CFSP"
    main(command("FLAP", "--stream", "--overwrite", "--resume"))
    assert PruningPlan.load("out").method == "FLAP"


def test_a_run_that_could_do_nothing_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(here.iterdir())
    complaint(capsys, *command("CFSP", "--stream", "--method.sparsity=0.99"))
    assert set(here.iterdir()) == before


def test_a_run_whose_numbers_are_not_finite_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file("model/model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, "model/model.safetensors", {"format": "pt"})
    before = set(here.iterdir())
    assert "NaN or infinity" in complaint(capsys, *command("CFSP", "--stream"))
    assert set(here.iterdir()) == before


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The system's own limit: what is written beyond it fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 8000, 20_000, 40_000])  # hidden states, statistics, blocks, embeddings
def test_a_full_disk_loses_nothing(size: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_file_larger_than(size):
        said = complaint(capsys, *command("FLAP", "--stream"))
    assert said.startswith("cannot write ")
    assert "check free space and permissions, and continue with --resume" in said
    done = sorted(path.name for path in journal_path("out").glob("passes/0/*"))
    main(command("FLAP", "--stream", "--resume"))
    plan = PruningPlan.load("out")
    main(command("FLAP", "--overwrite"))
    assert PruningPlan.load("out").digest == plan.digest
    assert size < 20_000 or done


# ---- refused


def remove_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def misshape_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 3)}, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)


def other_format(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def damage_index(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text("{}")


def lose_a_shard(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (remove_one, r"model\.layers\.1\.mlp\.up_proj\.weight is absent in the files and \(48, 32\) in the model"),
        (misshape_one, r"model\.layers\.1\.mlp\.up_proj\.weight is \(3, 3\) in the files and \(48, 32\) in the model"),
        (truncate, r"model\.safetensors is missing, truncated or corrupted \(.*\): get or save the model again"),
        (other_format, r"is not in safetensors, .*: convert it .*save_pruned\(load_model\(NAME\), FOLDER"),
        (damage_index, r"index\.json is damaged: get the model again"),
        (lose_a_shard, r"gone\.safetensors is missing, truncated or corrupted"),
    ],
)
def test_a_folder_that_cannot_stream_is_refused(
    harm: Callable[[Path], None], said: str, llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(ValueError, match=said) as raised:
        open_streamed(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


def test_a_gguf_file_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is not in safetensors, which streaming needs"):
        open_streamed(str(tmp_path / "model.gguf"))


def test_several_processes_are_refused(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process only: start the command without torchrun"):
        streamed(llama, method("CFSP relative"), tmp_path / "out")


def test_hidden_states_of_a_model_in_memory_do_not_wait_on_disk() -> None:
    with pytest.raises(ValueError, match="`offload` disk is only for a model that streams from disk"):
        prune(tiny(), method("CFSP relative"), dataclasses.replace(BATCHES, offload="disk"))


# ---- killed


def run_in(folder: str, args: list[str]) -> None:
    os.chdir(folder)
    main(args)


def started(folder: Path, args: list[str]) -> Any:
    """A process that runs a command."""
    process = context.Process(target=run_in, args=(str(folder), args), daemon=True)
    process.start()
    return process


def killed_at_random(folder: Path, name: str, trials: int, seed: int) -> None:
    """Kills a run at moments drawn over its length, up to three times, and lets it end; the result must be the same."""
    args = command(name, "--stream", "--offload=disk")
    for _ in range(2):  # the first start of the server takes longer
        shutil.rmtree(folder / "out", ignore_errors=True)
        begin = time.monotonic()
        process = started(folder, args)
        process.join(100)
        length = time.monotonic() - begin
        assert process.exitcode == 0
    expected = {file.name: file.read_bytes() for file in (folder / "out").iterdir()}
    dice, kills = random.Random(seed), 0
    for trial in range(3 * trials):  # more than once each if too few kills hit, as other processes change the speed
        if trial >= trials and kills >= trials:
            break
        shutil.rmtree(folder / "out")
        for resume in ([], ["--resume"], ["--resume"], ["--resume"])[: dice.randint(2, 4)]:
            process = started(folder, args + resume)
            process.join(dice.uniform(0, 0.9) * length)
            process.kill()
            process.join(100)
            kills += process.exitcode == -signal.SIGKILL
        process = started(folder, [*args, "--resume"])
        process.join(100)
        assert process.exitcode == 0, (name, seed, trial)
        assert {file.name: file.read_bytes() for file in (folder / "out").iterdir()} == expected, (name, seed, trial)
        assert not journal_path(folder / "out").exists()
    assert kills >= trials


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FLAP", "FASP", "CFSP", "TwoSSP"])
def test_a_run_that_is_killed_at_many_moments(name: str, here: Path) -> None:
    killed_at_random(here, name, trials=max(1, KILLS // 3), seed=sum(map(ord, name)) + 1)


# ---- mixtures of experts


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two mixtures, by the names of published checkpoints; the router of the second has a buffer."""
    folder = tmp_path_factory.mktemp("mixtures")
    for kind in ("qwen2_moe", "deepseek_v3"):
        build(kind).save_pretrained(folder / kind)
    save_pruned(tiny("gpt_oss"), folder / "gpt_oss")
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen2_moe", "REAP"),
        pytest.param("deepseek_v3", "REAP", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "CFSP activation", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "FLAP AL-AM", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "FLAP experts", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "FASP kv_heads", marks=pytest.mark.slow),
        ("gpt_oss", "FLAP restore"),
        pytest.param("qwen2_moe", "CFSP reconstruct", marks=pytest.mark.slow),
    ],
)
def test_mixtures_stream(kind: str, name: str, mixtures: Path, tmp_path: Path) -> None:
    model, plan = in_memory(mixtures / kind, method(name))
    assert streamed(mixtures / kind, method(name), tmp_path / "out", offload="disk").digest == plan.digest
    assert_same(tmp_path / "out", model, plan)
    save_pruned(model, tmp_path / "saved")
    names = [set().union(*map(load_file, (tmp_path / each).glob("model*.safetensors"))) for each in ("out", "saved")]
    assert names[0] == names[1]
    second = method("FASP none", 0.15)
    streamed(tmp_path / "out", second, tmp_path / "again")
    expected, plan = in_memory(tmp_path / "out", second)
    assert_same(tmp_path / "again", expected, plan)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("deepseek_v3", "REAP"),
        pytest.param("gpt_oss", "FASP none", marks=pytest.mark.slow),
        pytest.param("gpt_oss", "FLAP restore", marks=pytest.mark.slow),
    ],
)
def test_experts_go_on_wherever_a_run_was_stopped(kind: str, name: str, mixtures: Path, tmp_path: Path) -> None:
    goes_on(mixtures / kind, lambda: method(name), itertools.count(1, 3 if name == "REAP" else 5), tmp_path)
