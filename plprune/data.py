"""RecoveryData: calibration windows, training batches and held-out windows as a LightningDataModule."""

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import PreTrainedTokenizerBase

from plprune.calibration import Calibration
from plprune.checkpoint import load_tokenizer
from plprune.text import PYDOC, Stream, check_sizes, check_source, draw, pack, split, tokenised


class RecoveryData(pl.LightningDataModule):
    """Calibration windows, training batches and held-out windows from any text.

    A text is a `.txt`, `.jsonl` or `.parquet` file; a dataset on the hub or in a folder, as `ORG/NAME`,
    `ORG/NAME:CONFIG` or `ORG/NAME:CONFIG:SPLIT`, whose split is `train` if not given; or `pydoc_data.topics`, the 110
    thousand tokens of English about Python that come with CPython. Rows hold a `text`; or `messages`, or
    `instruction`, `input` and `output`, or `prompt` and `completion`, which go through the tokenizer's chat template
    and are trained on the answers only.

    Args:
        train: Text to recover on: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub or of
            a folder, or `pydoc_data.topics`.
        validation: Text to judge by; if not given, the last `held_out` of `train`, which is then not trained on.
        test: Text of `trainer.test`; the validation text if not given.
        calibration: Text to calibrate on; the part of `train` that is trained on if not given.
        tokenizer: Name or path of a tokenizer; the model's own if not given.
        seq_len: Tokens of a training or validation window.
        batch_size: Windows of a batch.
        num_samples: Calibration windows.
        calibration_seq_len: Tokens of a calibration window; `seq_len` if not given.
        calibration_batch_size: Calibration windows that are run at once; the statistics do not depend on it.
        held_out: The fraction of `train` to hold out when `validation` is not given, in (0, 1).
        max_windows: At most this many held-out windows are judged by; all if not given.
        max_documents: At most this many rows are read of each text; a hub dataset is then streamed. All if not given.
        join: Put between the rows of the validation, test and calibration texts, which are then one document each:
            "\\n\\n" is usual for WikiText. If not given, every row is a document, as those of `train` always are.
        num_workers: Processes that load batches.
        seed: Of the order of documents and windows.
    """

    def __init__(
        self,
        train: str = PYDOC,
        validation: str | None = None,
        test: str | None = None,
        calibration: str | None = None,
        tokenizer: str | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        num_samples: int = 128,
        calibration_seq_len: int | None = None,
        calibration_batch_size: int = 8,
        held_out: float = 0.1,
        max_windows: int | None = None,
        max_documents: int | None = None,
        join: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}, but it is a fraction in (0, 1): 0.1 holds out a tenth")
        check_sizes(seq_len=seq_len, batch_size=batch_size, num_samples=num_samples, max_windows=max_windows)
        check_sizes(calibration_seq_len=calibration_seq_len, calibration_batch_size=calibration_batch_size)
        check_sizes(max_documents=max_documents)
        self.sources = {"train": train, "validation": validation, "test": test, "calibration": calibration}
        self.tokenizer: PreTrainedTokenizerBase | str | None = tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.num_samples, self.calibration_seq_len = num_samples, calibration_seq_len or seq_len
        self.calibration_batch_size = calibration_batch_size
        self.held_out, self.max_windows, self.max_documents = held_out, max_windows, max_documents
        self.join, self.num_workers, self.seed = join, num_workers, seed
        self._train: Stream | None = None
        self._parts: dict[str, TensorDataset] = {}
        self._done = (0, 0)  # epoch, and batches of it that were trained on before a resume
        for source in self.sources.values():
            check_source(source)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the texts, once."""
        if self._parts:
            return
        train, parts = self._read("train"), {}
        if self.sources["validation"]:
            parts["validation"] = pack(self._read("validation"), self.seq_len, "validation")
        else:
            train, tail = split(train, self.held_out)
            parts["validation"] = pack(tail, self.seq_len, "held-out")
        parts["train"] = pack(train, self.seq_len, "training")
        parts["test"] = pack(self._read("test"), self.seq_len, "test") if self.sources["test"] else parts["validation"]
        self._train, self._parts = train, parts

    def calibration(self) -> Calibration:
        """The calibration windows."""
        self.setup()
        ids, _ = self._read("calibration") if self.sources["calibration"] else cast(Stream, self._train)
        windows = draw(ids, self.num_samples, self.calibration_seq_len, self.seed)
        return Calibration(list(windows.split(self.calibration_batch_size)))

    def held_out_windows(self) -> list[Tensor]:  # [1, seq_len] each
        """The windows to judge by, one by one."""
        self.setup()
        return list(self._parts["validation"].tensors[0][: self.max_windows].split(1))

    def train_dataloader(self) -> DataLoader:
        data, (epoch, batches) = self._parts["train"], self._done
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        sampler = ResumableSampler(data, self.seed, epoch, batches * self.batch_size, **shares)
        return self._loader(data, sampler=sampler, drop_last=len(sampler) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._held_out_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """How far training has come, so that a resumed run goes on with the next batch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"epoch": self.trainer.current_epoch, "batches": progress.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = (state_dict["epoch"], state_dict["batches"])

    def _held_out_loader(self, part: str) -> DataLoader:
        return self._loader(TensorDataset(*(tensor[: self.max_windows] for tensor in self._parts[part].tensors)))

    def _loader(self, data: TensorDataset, **kwargs: Any) -> DataLoader:
        # A generator of its own keeps the making of an iterator from moving the global random state.
        return DataLoader(
            data,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        module = self.trainer and self.trainer.lightning_module
        tokenizer = self.tokenizer or getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("RecoveryData has no tokenizer: give `tokenizer`, or train a module that has one")
        return tokenizer

    def _read(self, part: str) -> Stream:
        source, join = cast(str, self.sources[part]), None if part == "train" else self.join
        return tokenised(source, self._tokenizer(), join, self.max_documents, self.seed)


class ResumableSampler(DistributedSampler[int]):
    """A new order for every epoch that depends on nothing but the seed, and can start within one.

    Lightning leaves a `DistributedSampler` as it is; any other it would wrap, and lose the place in the epoch.

    Args:
        data: What is sampled.
        seed: Of the orders.
        epoch: The epoch to begin with.
        skip: Samples of that epoch to leave out, in this process.
        num_replicas: Processes that share the data.
        rank: Which of them this one is.
    """

    def __init__(
        self, data: Sized, seed: int, epoch: int = 0, skip: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(cast(Any, data), num_replicas, rank, seed=seed)
        self.epoch = epoch
        self._skip = {epoch: skip}

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self._skip.get(self.epoch, 0), None)


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of windows."""
    ids, labels = zip(*rows, strict=True)
    return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}
