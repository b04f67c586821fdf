"""All uses of Lightning's private API, where no public API exists. When a release removes a name,
`tests/test_internals.py` reports it.
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
    """Makes Lightning call `note` on SIGTERM instead of its own handler, even if there is a handler already."""
    connector: Any = trainer._signal_connector
    others = connector._has_already_handler
    connector._sigterm_notifier_fn = note
    connector._has_already_handler = lambda number: number != signal.SIGTERM and others(number)


def cluster_environment(trainer: pl.Trainer) -> Any:
    """The environment that started a trainer's processes; strategies for one device do not expose it."""
    return trainer._accelerator_connector.cluster_environment


def fetcher(trainer: pl.Trainer) -> Any:
    """The data fetcher of the training batches."""
    return trainer.fit_loop._data_fetcher


def data_source(trainer: pl.Trainer) -> Any:
    """The module or data module that provides the training data."""
    return trainer.fit_loop._data_source.instance


def due_after_step(trainer: pl.Trainer) -> dict[str, bool]:
    """Whether a validation and the end of an epoch follow the current step."""
    loop = trainer.fit_loop.epoch_loop
    return {"validation": loop._should_check_val_fx(fetcher(trainer)), "epoch": loop._num_ready_batches_reached()}


def logs_are_due(trainer: pl.Trainer) -> bool:
    """Whether metrics that are logged in this step reach a logger."""
    return bool(trainer._logger_connector.should_update_logs and trainer.loggers)


def set_metrics(trainer: pl.Trainer, metrics: dict[str, Tensor]) -> None:
    """Adds to `trainer.callback_metrics`."""
    trainer._logger_connector._callback_metrics.update(metrics)


def end_epoch_for_monitors(trainer: pl.Trainer) -> None:
    """Calls `on_train_epoch_end` of callbacks that monitor a metric, like `EarlyStopping`."""
    _call_callback_hooks(trainer, "on_train_epoch_end", monitoring_callbacks=True)


def last_checkpoints(callback: ModelCheckpoint, trainer: pl.Trainer) -> set[str]:
    """The files that a callback would resume from as the last checkpoint."""
    return callback._find_last_checkpoints(trainer)


def limit_of(timer: Timer) -> float | None:
    """The time limit of a timer in seconds."""
    return timer._duration


def belongs_to_tuner(callback: pl.Callback) -> bool:
    """Whether a callback was added by Lightning's `Tuner`, which ends the run before training."""
    return getattr(callback, "_early_exit", False)


def allow_clipping(optimizer: Optimizer) -> None:
    """Lets Lightning clip the gradients of a fused optimizer, which it would refuse."""
    cast(Any, optimizer)._step_supports_amp_scaling = False


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Sets the number of processes that share the data, which is unknown when the strategy is created."""
    strategy._data_parallel_size = size


class OpenCLI(LightningCLI):
    """LightningCLI whose steps can be overridden under public names."""

    def make_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Creates the parser of a subcommand, which is a method of `klass`."""
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def trainer_arguments(self, subcommand: str) -> dict[str, Any]:
        """The arguments for the trainer's method."""
        return super()._prepare_subcommand_kwargs(subcommand)

    def run_subcommand(self, subcommand: str) -> None:
        """Calls the trainer's method, or the method of this class with the same name."""
        super()._run_subcommand(subcommand)

    def dump(self) -> str:
        """The config of the running subcommand as YAML."""
        name = cast(str, self.subcommand)
        return self._parser(name).dump(self.config[name], skip_none=False)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        return self.make_parser(klass, subcommand, **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return self.trainer_arguments(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Does nothing; Lightning would replace the user's options by hyperparameters from the checkpoint."""


class EpochBar(RichProgressBar):
    """Lightning's bar, without the `Epoch 0/-2` that it shows if `max_steps` ends the run."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"{f'epoch {current_epoch}':<{len(self.validation_description)}}"


class KeepingWriter(ExperimentWriter):
    """Writes metrics to a CSV file, and keeps the file if it exists."""

    def _check_log_dir_exists(self) -> None:
        pass


class OpenCSVLogger(CSVLogger):
    """A CSVLogger whose writer can be replaced."""

    def make_writer(self) -> ExperimentWriter:
        """Creates the writer of the file."""
        return ExperimentWriter(self.log_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = self.make_writer()
        return self._experiment
