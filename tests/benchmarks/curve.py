"""What recovery brings over tokens: perplexity over the dense model's, at several counts of tokens of each run.

    python -m tests.benchmarks.curve OUTPUT --text WIKITEXT --counts 32768 100000 300000 -- --recipe balanced
        --sparsity 0.25 MODEL --data TEXT [other options of a fit]

What follows `--` is a fit, whose length is the last count. It is measured before and after pruning, and whenever it has
trained on a further count of tokens, with its adapters merged. MODEL may be a folder that was pruned before, for
several curves from one start; `--data.num_samples` and `--data.calibration_seq_len` are then those of its pruning. Each
point is a line in OUTPUT/points.jsonl as soon as it is measured. The same command goes on with a fit that was stopped.
`--write` adds the points of OUTPUT to those that recipes foretell by, `configs/recipes/curve.json`, in place of earlier
ones of the same settings.

The learning rate falls to 0 at the end of the run, so that the last point of a run is lower than one on the way at the
same count would be. A point therefore says how long its run was.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import yaml

from plprune.architecture.modules import on_device
from plprune.checkpoint.load import load_model
from plprune.cli import main as plprune
from plprune.evaluation.perplexity import Passage, Protocol, judge, passage
from plprune.pruning.plan import FILE
from plprune.pruning.surgery import plan_of
from plprune.recovery.lora import merged
from plprune.training.recipes import Point, expanded, folder, points, recovery_kind

LINES = "points.jsonl"


class Curve(pl.Callback):
    """Measures the model of a `Recovery` before and after pruning, and at counts of tokens. List it before `Prune`.

    Args:
        output: The folder of the points.
        text: The text to measure on.
        counts: The numbers of tokens to measure after, in ascending order.
        names: What to call the model and the text.
        seq_len: Tokens of a window.
        windows: The number of windows.
        join: What stands between the rows of the text.
    """

    def __init__(
        self, output: str, text: str, counts: list[int], names: list[str], seq_len: int, windows: int, join: str | None
    ) -> None:
        self.file, self.text, self.counts, self.names, self.join = Path(output) / LINES, text, counts, names, join
        self.protocol = Protocol(seq_len, max_windows=windows)
        self._dense = 0.0
        self._passage: Passage | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        plan, dense, data = plan_of(pl_module.model), pl_module.model, cast(Any, trainer).datamodule
        if plan is not None:
            if plan.origin["tokens"] != data.num_samples * data.calibration_seq_len:
                raise ValueError("give --data.num_samples and --data.calibration_seq_len of the pruning")
            dense = load_model(plan.chain()[0].origin["model"])
        with on_device(dense, trainer.strategy.root_device):
            self._dense = self._perplexity(pl_module, dense)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.global_step:
            self._measure(trainer, pl_module, 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        before, tokens = (_tokens(trainer, trainer.global_step - i) for i in (1, 0))
        if any(before < count <= tokens for count in self.counts):
            self._measure(trainer, pl_module, tokens)

    def _measure(self, trainer: Any, module: Any, tokens: int) -> None:
        plan, data, (model, text) = plan_of(module.model), trainer.datamodule, self.names
        assert plan is not None
        point = Point(
            model, text, plan.method, plan.settings.get("repair", "none"),
            round(1 - sum(plan.after) / sum(plan.before), 3), f"{data.num_samples} x {data.calibration_seq_len}",
            recovery_kind(module.trains, bool(module.distill)), tokens, _tokens(trainer, trainer.max_steps),
            0.0, data.seed,
        )  # fmt: skip
        if any(settings(point) == settings(each) for each in read(self.file)):
            return  # measured before the run was stopped
        with merged(module.model):
            ratio = self._perplexity(module, module.model) / self._dense
        with self.file.open("a") as lines:
            lines.write(json.dumps(dataclasses.asdict(dataclasses.replace(point, ratio=round(ratio, 4)))) + "\n")

    def _perplexity(self, module: Any, model: Any) -> float:
        self._passage = self._passage or passage(self.text, module.tokenizer, self.protocol, self.join)
        return judge(model, self._passage).perplexity


def _tokens(trainer: Any, steps: int) -> int:
    """The tokens of some steps, of one batch each."""
    return steps * trainer.datamodule.batch_size * trainer.datamodule.seq_len


def settings(point: Point) -> Point:
    """A point without its result."""
    return dataclasses.replace(point, ratio=0.0)


def read(file: Path) -> list[Point]:
    """The points that were measured."""
    return [Point(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def write(found: list[Point]) -> None:
    """Adds points to those that recipes foretell by."""
    every = {settings(point): point for point in [*points(), *found]}
    rows = [json.dumps(dataclasses.asdict(point)) for point in sorted(every.values(), key=dataclasses.astuple)]
    (folder() / "curve.json").write_text("[\n" + ",\n".join(f"  {row}" for row in rows) + "\n]\n")


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", help="to measure perplexity on")
    parser.add_argument("--join", default="\n\n", help="between rows of the text")
    parser.add_argument("--counts", type=int, nargs="+", default=[32768, 100_000, 300_000, 1_000_000])
    parser.add_argument("--names", nargs=2, help="of the model and the text, in the points", metavar=("MODEL", "TEXT"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--write", action="store_true", help="adds the points to curve.json, and measures nothing")
    every = sys.argv[1:] if args is None else args
    cut = every.index("--") if "--" in every else len(every)
    given = parser.parse_args(every[:cut])
    if given.write:
        write(read(given.output / LINES))
        return
    given.output.mkdir(parents=True, exist_ok=True)
    config = resolved(every[cut + 1 :])
    data, trainer = config["data"], config["trainer"]
    trainer["max_steps"] = -(-max(given.counts) // (data["batch_size"] * data["seq_len"]))
    trainer |= {"accumulate_grad_batches": 1, "default_root_dir": str(given.output)}
    data["calibration_seq_len"] = data["calibration_seq_len"] or data["seq_len"]
    own = {"output": str(given.output), "text": given.text, "counts": sorted(given.counts), "join": given.join}
    own |= {"names": given.names or [config["model"]["name_or_path"], given.text]}
    own |= {"seq_len": given.length, "windows": given.windows}
    needed = ["Checkpoint"] if (Path(config["model"]["name_or_path"]) / FILE).exists() else ["Checkpoint", "Prune"]
    kept = [each for each in trainer["callbacks"] if each["class_path"].rpartition(".")[2] in needed]
    trainer["callbacks"] = [{"class_path": "tests.benchmarks.curve.Curve", "init_args": own}, *kept]
    plprune(["fit", f"--config={yaml.safe_dump(config)}", "--resume"])


def resolved(options: list[str]) -> dict[str, Any]:
    """The config of a fit with all of its options."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        plprune([*expanded(["fit", *options]), "--print_config"])
    return yaml.safe_load(printed.getvalue())


if __name__ == "__main__":
    main()
