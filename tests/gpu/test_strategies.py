"""The strategies that we ship, as they are, on one GPU; and two processes that share it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from plprune import load_pruned
from plprune.pruning.plan import PruningPlan
from tests.builders import logits, numbers, windows
from tests.gpu.models import save, unlike
from tests.ranks import free_port

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
IN_MEMORY = (
    "--trainer.strategy.init_args.offload_optimizer=false",
    "--trainer.strategy.init_args.offload_parameters=false",
)
RUNS: dict[str, tuple[str, ...]] = {  # with further options
    "one-process": (),
    "ddp": (),
    "zero1": (),
    "zero2": (),
    "zero3": (),
    "zero3 in memory": IN_MEMORY,
    "fsdp2": (),
    "two processes": (),
}
SECONDS = 90 if torch.cuda.is_available() else 500


class Run:
    """`plprune fit` of six steps of eight windows, in two batches, in a process of its own, or in two."""

    def __init__(self, source: Path, folder: Path, name: str, device: torch.device, *args: str, **changes: Any) -> None:
        self.folder, self.ranks = folder, 2 if name == "two processes" else 1
        folder.mkdir(exist_ok=True)
        callbacks: dict[str, Any] = {"tests.probes.Probe": {}, "Evaluate": {}}
        callbacks["Export"] = {"output": "out", "overwrite": True}
        callbacks["plprune.Checkpoint"] = {"every_n_train_steps": 3}
        callbacks["Prune"] = {"method": {"class_path": "FASP", "init_args": {"sparsity": 0.3}}}
        listed = [{"class_path": each, "init_args": given} for each, given in callbacks.items()]
        settings = {"max_steps": 6, "logger": False, "limit_val_batches": 1, "callbacks": listed}
        settings |= {"enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 0.5}
        data = {"train": str(source / "text.txt"), "seq_len": 32, "num_samples": 8, "batch_size": 4 // self.ranks}
        model = {"name_or_path": str(source / "model"), "learning_rate": 5e-3, "lora": {"rank": 4, "dropout": 0.0}}
        everything = {"trainer": settings | {"accumulate_grad_batches": 2}, "model": model | changes, "data": data}
        (folder / "fit.yaml").write_text(yaml.safe_dump(everything))
        command = [sys.executable, "-m", "plprune", "fit", "--config=fit.yaml", *_strategy(name, device), *args]
        port, paths = free_port(), os.environ.get("PYTHONPATH", "")
        self.processes = []
        for rank in range(self.ranks):  # each takes itself for a node of its own, as a node has a GPU only once
            group = {"RANK": rank, "NODE_RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}
            own = {k: str(v) for k, v in group.items()} | {"MASTER_ADDR": "127.0.0.1"} if self.ranks > 1 else {}
            with open(folder / f"log.{rank}", "w") as log:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=os.environ | {"PYTHONPATH": f"{ROOT}:{paths}", "PYTHONFAULTHANDLER": "1"} | own,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self.processes.append(process)

    def ended(self) -> list[dict[str, Any]]:
        """What each process has seen, once all have ended well."""
        for process in self.processes:
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        assert [process.returncode for process in self.processes] == [0] * self.ranks, self.output()
        return [torch.load(self.folder / "probe" / f"{rank}.pt") for rank in range(self.ranks)]

    def output(self) -> str:
        return "\n".join((self.folder / f"log.{rank}").read_text()[-6000:] for rank in range(self.ranks))

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _strategy(name: str, device: torch.device) -> list[str]:
    if name == "two processes":
        ddp = ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"]
        ddp += ["--trainer.strategy.process_group_backend=gloo", "--trainer.num_nodes=2", "--trainer.devices=1"]
        return [*ddp, f"--trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}"]
    file = name.partition(" ")[0]
    options = [f"--config={ROOT / 'configs/strategy' / file}.yaml"]
    if device.type == "cpu":
        options += ["--trainer.accelerator=cpu", "--trainer.devices=1"]
        if file.startswith("zero"):
            options.append("--trainer.strategy.class_path=plprune.training.strategies.CPUDeepSpeed")
    return options + list(RUNS[name])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    save(folder / "model")
    numbers(folder / "text.txt", stop=1200)
    return folder


@pytest.fixture(scope="module")
def runs(source: Path, tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Any:
    started: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in started:
            started[name] = Run(source, tmp_path_factory.mktemp(name.replace(" ", "-")), name, device)
        return started[name]

    if device.type == "cuda":  # to begin takes longest, and where there is a GPU there are cores
        for name in RUNS:
            run(name)
    yield run
    for each in started.values():
        each.kill()


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one-process"])
def test_every_strategy_ends_where_one_process_does(runs: Callable[[str], Run], name: str) -> None:
    (expected,), found = runs("one-process").ended(), runs(name).ended()
    for rank in found:
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert rank["plan"] == found[0]["plan"]
        for path, value in rank["adapters"].items():
            torch.testing.assert_close(value, expected["adapters"][path], rtol=0, atol=1e-3)
    one, other = (load_pruned(runs(each).folder / "out") for each in ("one-process", name))
    plan, wanted = (PruningPlan.load(runs(each).folder / "out") for each in (name, "one-process"))
    assert plan.digest == found[0]["plan"]
    assert unlike(plan, wanted) == 0  # two processes add up in another order, which the plan's figures show
    assert (plan.digest == wanted.digest) or len(found) > 1
    ids = windows(2, 32, seed=7)
    torch.testing.assert_close(logits(other, ids), logits(one, ids), rtol=0, atol=0.02)
    assert any(line.startswith(("dense ", "recovered ")) for line in runs(name).output().splitlines())


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    runs: Callable[[str], Run], source: Path, device: torch.device, name: str
) -> None:
    (expected,), folder = runs(name).ended(), runs(name).folder
    checkpoint = next(folder.rglob("step=*3.ckpt"))
    run = Run(source, folder, name, device, f"--ckpt_path={checkpoint}")
    try:
        (found,) = run.ended()
    finally:
        run.kill()
    assert found["losses"] == pytest.approx(expected["losses"][6:], rel=1e-5)
    for path, value in found["adapters"].items():
        torch.testing.assert_close(value, expected["adapters"][path], rtol=0, atol=1e-5)
