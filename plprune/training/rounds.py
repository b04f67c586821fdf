"""Several rounds of pruning and recovery that together end at the sparsity and the steps of a single one.

`plprune fit --rounds` runs each round as a separate fit in a separate process, because the structure is settled before
a fit begins, and because launchers, strategies and signals then behave as they do without rounds. A round prunes and
recovers the model that the round before it exported.
"""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from plprune.io.atomic import check_output
from plprune.pruning.plan import PruningPlan
from plprune.training.preemption import AGAIN
from plprune.training.round_schedule import Round, schedule

Config = dict[str, Any]  # of a fit, as YAML has it
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends SIGUSR1 before it requeues a job


def run(config: Config, rounds: int) -> int:
    """Runs the rounds one after another, and stops at the first that fails or is interrupted.

    Args:
        config: The config of the whole. The rounds share its `trainer.max_steps`. The last round writes the outputs
            that it names; the others write to `round-1`, `round-2` and so on in its `default_root_dir`.
        rounds: The number of rounds.

    Returns:
        The exit code of the last round that ran.

    Raises:
        ValueError: The config cannot be run in rounds.
    """
    check(config, rounds)

    def remaining(index: int) -> float:
        if not index:
            return 1.0
        plans = PruningPlan.load(model_folder(config, index)).chain()
        return sum(plans[-1].after) / sum(plans[-index].before)

    for each in schedule(_method(config)["sparsity"], config["trainer"]["max_steps"], rounds, remaining):
        if code := fit(round_config(config, each, last=each.index == rounds - 1)):
            return code
    return 0


def check(config: Config, rounds: int) -> None:
    """Checks, before anything is done, that a fit can be divided into rounds.

    Raises:
        ValueError: It cannot.
    """
    trainer, target = config["trainer"], _prune(config).get("target") or {}
    if trainer["max_steps"] < rounds:
        raise ValueError(f"{rounds} rounds share trainer.max_steps, which is {trainer['max_steps']}: give more")
    if any(target.get(name) for name in ("parameters", "memory", "active_parameters")):
        raise ValueError("rounds divide a sparsity and cannot divide a target: give the method's sparsity instead")
    if trainer.get("fast_dev_run"):
        raise ValueError("a dry run saves no model for the next round to begin with: try it without --rounds")
    if config.get("ckpt_path"):
        raise ValueError("a checkpoint belongs to a single round: continue with --resume instead of --ckpt_path")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the second group would find the first one's keys
        raise ValueError(
            "under torchrun every round forms a process group of its own: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    for export in _callbacks(config, "Export"):
        if not config["resume"]:
            check_output(export["output"], export["overwrite"])


def round_config(config: Config, each: Round, last: bool) -> Config:
    """Derives the config of a round from the config of the whole."""
    result, exports = copy.deepcopy(config), _callbacks(config, "Export")
    result["rounds"] = 1
    result["trainer"]["max_steps"] = each.steps
    _method(result)["sparsity"] = each.sparsity
    if each.index:
        result["model"]["name_or_path"] = str(model_folder(config, each.index))
        _prune(result)["again"] = True
        if result["data"]["validation"]:  # else the order of the training text decides what is held out, and must stay
            result["data"]["seed"] += each.index
    if not last:
        output = model_folder(config, each.index + 1)
        result["trainer"]["default_root_dir"] = str(output.parent)
        for name, setting in (("Report", "output"), ("Checkpoint", "dirpath")):
            for callback in _callbacks(result, name):
                callback[setting] = None
        kept = [callback for callback in result["trainer"]["callbacks"] if not _is(callback, "Export")]
        settings = {"output": str(output), "overwrite": any(export["overwrite"] for export in exports)}
        result["trainer"]["callbacks"] = [*kept, {"class_path": "plprune.Export", "init_args": settings}]
    return result


def model_folder(config: Config, number: int) -> Path:
    """The folder to which round `number`, from 1, exports its model, unless it is the last."""
    return Path(config["trainer"]["default_root_dir"] or ".").expanduser() / f"round-{number}" / "model"


def fit(config: Config) -> int:
    """Fits in a subprocess, forwards signals to it, and returns its exit code."""
    command = [sys.executable, "-m", "plprune", "fit", "--config", yaml.safe_dump(config)]
    received: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to both processes
    try:
        children.append(subprocess.Popen(command))
        for number in received:
            children[0].send_signal(number)
        code = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received and code == -signal.SIGTERM:  # it came before the fit had set its handler
        return AGAIN
    return code if code >= 0 else 128 - code


def _method(config: Config) -> dict[str, Any]:
    """The settings of the method."""
    return _prune(config)["method"]["init_args"]


def _prune(config: Config) -> dict[str, Any]:
    """The settings of the only `Prune`.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = _callbacks(config, "Prune")
    if len(found) != 1:
        raise ValueError(f"rounds need one Prune among trainer.callbacks, and there are {len(found)}")
    return found[0]


def _callbacks(config: Config, name: str) -> list[dict[str, Any]]:
    """The settings of all callbacks of a class."""
    return [each.setdefault("init_args", {}) for each in config["trainer"]["callbacks"] or [] if _is(each, name)]


def _is(callback: dict[str, Any], name: str) -> bool:
    return callback["class_path"].rpartition(".")[2] == name
