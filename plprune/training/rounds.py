"""Several rounds of pruning and recovery, which together end at the sparsity and the steps of one.

Each round is a fit of its own, as the structure is settled before a fit begins, and in a process of its own, so that
launchers, strategies and signals find what they would find without rounds. A round prunes and recovers what the one
before it has exported, and how much it has to remove is reckoned from what that has really reached. Where there is a
validation text each round sees the training text in another order; else the order decides what is held out, and stays.
"""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from plprune.io.atomic import check_free
from plprune.pruning.allocation import largest_remainder, next_sparsity
from plprune.pruning.plan import PruningPlan
from plprune.training.preemption import AGAIN

Config = dict[str, Any]  # of a fit, as YAML has it
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)  # SLURM asks by the latter


def run(config: Config, rounds: int) -> int:
    """Runs the rounds one after another, up to one that fails or is stopped.

    Args:
        config: Of the whole: `trainer.max_steps` is shared among the rounds, and the last writes what it names. The
            others write to `round-1`, `round-2` and so on in its `default_root_dir`.
        rounds: How many.

    Returns:
        The exit code of the last one that ran.

    Raises:
        ValueError: The config does not say enough for rounds.
    """
    check(config, rounds)
    sparsity, left = _method(config)["sparsity"], 1.0
    steps = largest_remainder([1.0] * rounds, config["trainer"]["max_steps"])
    for i in range(rounds):
        if i:
            plans = PruningPlan.load(exported(config, i)).chain()
            left = sum(plans[-1].after) / sum(plans[-i].before)
        own = config_of(config, i, rounds, next_sparsity(sparsity, left, i + 1, rounds), steps[i])
        if code := fit(own):
            return code
    return 0


def check(config: Config, rounds: int) -> None:
    """Makes sure, before anything is done, that a fit can be done in rounds.

    Raises:
        ValueError: It cannot.
    """
    trainer, target = config["trainer"], _prune(config).get("target") or {}
    if trainer["max_steps"] < rounds:
        raise ValueError(f"{rounds} rounds share trainer.max_steps, which is {trainer['max_steps']}: give more")
    if target.get("parameters") or target.get("memory"):
        raise ValueError("rounds share a sparsity: give that in the place of a target")
    if trainer.get("fast_dev_run"):
        raise ValueError("a dry run saves no model for the next round to begin with: try it without --rounds")
    if config.get("ckpt_path"):
        raise ValueError("a checkpoint is of one round: go on with --resume in the place of --ckpt_path")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # the second group would find the first one's keys
        raise ValueError("rounds under torchrun form a group each: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    for each in _callbacks(config, "Export"):
        if not config["resume"]:
            check_free(each["output"], each["overwrite"])


def config_of(config: Config, i: int, rounds: int, sparsity: float, steps: int) -> Config:
    """The config of round i, counted from 0."""
    own = copy.deepcopy(config)
    own["rounds"] = 1
    own["trainer"]["max_steps"] = steps
    _method(own)["sparsity"] = sparsity
    if i:
        own["model"]["name_or_path"] = str(exported(config, i))
        _prune(own)["again"] = True
        own["data"]["seed"] += i if own["data"]["validation"] else 0
    if i < rounds - 1:
        own["trainer"]["default_root_dir"] = str(exported(config, i + 1).parent)
        for each in _callbacks(own, "Report"):
            each["output"] = None
        for each in _callbacks(own, "Checkpoint"):
            each["dirpath"] = None
        own["trainer"]["callbacks"] = [each for each in own["trainer"]["callbacks"] if not _is(each, "Export")]
        export = {"output": str(exported(config, i + 1)), "overwrite": _overwrites(config)}
        own["trainer"]["callbacks"].append({"class_path": "plprune.Export", "init_args": export})
    return own


def exported(config: Config, number: int) -> Path:
    """Where the model of a round is, counted from 1, that is not the last."""
    return Path(config["trainer"]["default_root_dir"] or ".").expanduser() / f"round-{number}" / "model"


def fit(config: Config) -> int:
    """Fits in a process of its own, which is told of the signals that this one gets; its exit code."""
    command = [sys.executable, "-m", "plprune", "fit", "--config", yaml.safe_dump(config)]
    noted: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        noted.append(number)
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # a terminal tells both
    try:
        children.append(subprocess.Popen(command))
        for number in noted:
            children[0].send_signal(number)
        code = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if noted and code == -signal.SIGTERM:  # it came before the fit listened to it
        return AGAIN
    return code if code >= 0 else 128 - code


def _overwrites(config: Config) -> bool:
    return any(each["overwrite"] for each in _callbacks(config, "Export"))


def _method(config: Config) -> dict[str, Any]:
    """The settings of the method."""
    return _prune(config)["method"]["init_args"]


def _prune(config: Config) -> dict[str, Any]:
    """The settings of the pruning.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = _callbacks(config, "Prune")
    if len(found) != 1:
        raise ValueError(f"rounds need one Prune among trainer.callbacks, and there are {len(found)}")
    return found[0]


def _callbacks(config: Config, name: str) -> list[dict[str, Any]]:
    """The settings of the callbacks of a class."""
    return [each.setdefault("init_args", {}) for each in config["trainer"]["callbacks"] or [] if _is(each, name)]


def _is(callback: dict[str, Any], name: str) -> bool:
    return callback["class_path"].rpartition(".")[2] == name
