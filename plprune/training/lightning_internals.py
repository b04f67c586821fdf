"""The private parts of Lightning that are used, as it has no public way to them: no other module touches one.

A new release may remove any of them; `tests/test_internals.py` then says by name which is gone.
"""

import signal
from collections.abc import Callable
from typing import Any, cast

import lightning.pytorch as pl
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.call import _call_callback_hooks
from torch import Tensor
from torch.optim import Optimizer


def on_sigterm(trainer: pl.Trainer, note: Callable[[int, Any], None]) -> None:
    """Has `note` called where Lightning would call its own handler of SIGTERM, even if there is one already."""
    connector: Any = trainer._signal_connector
    others = connector._has_already_handler
    connector._sigterm_notifier_fn = note
    connector._has_already_handler = lambda number: number != signal.SIGTERM and others(number)


def cluster_environment(trainer: pl.Trainer) -> Any:
    """What a trainer's processes were started by; strategies of one device do not say."""
    return trainer._accelerator_connector.cluster_environment


def fetcher(trainer: pl.Trainer) -> Any:
    """What brings the training batches."""
    return trainer.fit_loop._data_fetcher


def data_source(trainer: pl.Trainer) -> Any:
    """The object that the training data come from: a module or a data module."""
    return trainer.fit_loop._data_source.instance


def due_after_step(trainer: pl.Trainer) -> dict[str, bool]:
    """Whether validation and the end of an epoch come after the step that is done."""
    loop = trainer.fit_loop.epoch_loop
    return {"validation": loop._should_check_val_fx(fetcher(trainer)), "epoch": loop._num_ready_batches_reached()}


def logs_are_due(trainer: pl.Trainer) -> bool:
    """Whether what is logged at this step reaches a logger."""
    return bool(trainer._logger_connector.should_update_logs and trainer.loggers)


def set_metrics(trainer: pl.Trainer, metrics: dict[str, Tensor]) -> None:
    """Adds to what callbacks find in `trainer.callback_metrics`."""
    trainer._logger_connector._callback_metrics.update(metrics)


def end_epoch_for_monitors(trainer: pl.Trainer) -> None:
    """Calls the hook by which callbacks that monitor, like `EarlyStopping`, decide."""
    _call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)


def last_checkpoints(callback: ModelCheckpoint, trainer: pl.Trainer) -> set[str]:
    """What a callback of Lightning would go on with as the last."""
    return callback._find_last_checkpoints(trainer)


def limit_of(timer: Timer) -> float | None:
    """The seconds that a timer allows."""
    return timer._duration


def is_tuners(callback: pl.Callback) -> bool:
    """Whether a callback is one of Lightning's `Tuner`, whose run ends before there is a fit."""
    return getattr(callback, "_early_exit", False)


def allow_clipping(optimizer: Optimizer) -> None:
    """Has Lightning clip the gradients of a fused optimizer, which it would refuse."""
    cast(Any, optimizer)._step_supports_amp_scaling = False


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Has a strategy share the data among so many processes, which are not known when it is made."""
    strategy._data_parallel_size = size


class OpenCLI(LightningCLI):
    """LightningCLI with the steps of a subcommand under names that may be overridden."""

    def parser_of(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Makes the parser of a subcommand, which is a method of a class."""
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def arguments_of(self, subcommand: str) -> dict[str, Any]:
        """What the trainer's method is called with."""
        return super()._prepare_subcommand_kwargs(subcommand)

    def run_subcommand(self, subcommand: str) -> None:
        """Calls the trainer's method, or the one of this class that has its name."""
        super()._run_subcommand(subcommand)

    def dumped(self) -> str:
        """The configuration of the subcommand that runs, as YAML."""
        name = cast(str, self.subcommand)
        return self._parser(name).dump(self.config[name], skip_none=False)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return self.parser_of(klass, subcommand, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.arguments_of(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Lightning's own would have what a checkpoint says of hyperparameters replace what the user has said."""


class OpenBar(RichProgressBar):
    """Rich's bar with what it says before its steps."""

    def train_description(self, epoch: int) -> str:
        """What stands before the bar in training."""
        return super()._get_train_description(epoch)

    def _get_train_description(self, current_epoch: int) -> str:
        return self.train_description(current_epoch)


class OpenWriter(ExperimentWriter):
    """The writer of a CSV file, with what it does about a file that is there."""

    def begin(self) -> None:
        """Makes room for the file."""
        super()._check_log_dir_exists()

    def _check_log_dir_exists(self) -> None:
        self.begin()


class OpenCSVLogger(CSVLogger):
    """Metrics in a CSV file, with a writer of one's choice."""

    def writer(self) -> ExperimentWriter:
        """Makes what writes the file."""
        return ExperimentWriter(self.log_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self.writer()
        return self._experiment
