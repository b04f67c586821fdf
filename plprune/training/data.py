"""The LightningDataModule of a fit: windows to calibrate on, to train on and to evaluate on."""

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Sized
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.checkpoint.load import load_tokenizer
from plprune.io.checks import check_max_dropped, check_seed, check_sizes
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import IGNORED, MAX_DROPPED, TokenStream, bos_token, draw, hold_out, pack, tokenised
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import check_ids, check_masking
from plprune.pruning.plan import fingerprint


class RecoveryData(pl.LightningDataModule):
    """Cuts texts into windows for calibration, training and evaluation.

    A text is a `.txt`, `.jsonl`, `.json` or `.parquet` file; a dataset on the hub or in a folder, as `ORG/NAME`,
    `ORG/NAME:CONFIG` or `ORG/NAME:CONFIG:SPLIT` (the default split is `train`); or `pydoc_data.topics`, 110 thousand
    tokens of English about Python that come with CPython, which are enough to try things out.

    A row of a dataset holds a `text` or a conversation: `messages` or `conversations`, with the roles of OpenAI,
    ShareGPT or Gemma; `instruction`, `input` and `output`; or `prompt` and `completion`, as text or as messages.
    `system`, `history` and `tools` may be given too. Conversations go through the tokenizer's chat template, and only
    their answers are trained on. Rows without text are left out. Unusable rows are dropped: no answer, a message
    without role or content, or refused by the template. The log says how many rows were read, used and dropped.

    If the tokenizer begins texts with a BOS token, so does every window, even inside a document; the BOS token is one
    of the window's tokens. Documents are packed one after another, with the end-of-text token between them. Attention
    crosses from one document to the next, unless `intra_document_masking` is set.

    Args:
        train: The text to train on.
        validation: The text to evaluate on; if not given, the last `held_out` of `train`, which is then not trained on.
        test: The text of `trainer.test`; if not given, the validation text.
        calibration: The text to calibrate on; if not given, the part of `train` that is trained on.
        tokenizer: The name or path of a tokenizer; if not given, the model's.
        seq_len: Tokens in a training or validation window.
        batch_size: Windows in a batch.
        num_samples: The number of calibration windows.
        calibration_seq_len: Tokens in a calibration window; if not given, `seq_len`.
        calibration_batch_size: Calibration windows in a forward pass; the statistics do not depend on it.
        held_out: The fraction of `train` to hold out when `validation` is not given, in (0, 1).
        max_windows: The maximum number of held-out windows to evaluate on; if not given, all.
        max_documents: The maximum number of rows to read from each text; a hub dataset is then streamed. If not given,
            all.
        join: The string between the rows of the validation, test and calibration texts, which makes one document of
            each; "\\n\\n" is usual for WikiText. If not given, every row is a document, as in `train`.
        num_workers: Processes that load batches.
        seed: The seed for the order of documents and windows.
        bos: Whether each window begins with the BOS token; if not given, as the tokenizer does for a text.
        max_dropped: The fraction of a text's rows that may be unusable, in [0, 1].
        intra_document_masking: Whether a token of a training window attends to its own document only. Every document
            then begins at position 0, with a BOS token if windows do, and its first token is not learnt. Models that
            ignore the mask are refused. Calibration and evaluation do not mask, so that perplexities stay comparable.
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
        bos: bool | None = None,
        max_dropped: float = MAX_DROPPED,
        intra_document_masking: bool = False,
    ) -> None:
        super().__init__()
        check_max_dropped(max_dropped)
        check_seed(seed)
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
        self.bos, self.max_dropped = bos, max_dropped
        self.intra_document_masking = intra_document_masking
        self._train: TokenStream | None = None
        self._parts: dict[str, TensorDataset] = {}
        self._done = (0, 0)  # the epoch to resume, and the samples of it that all processes have trained on
        self._sampler: ResumableSampler | None = None
        for source in self.sources.values():
            check_text(source)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the texts, once."""
        if self._parts:
            return
        train, parts, cut = self._read("train"), {}, self._pack
        if self.sources["validation"]:
            parts["validation"] = cut(self._read("validation"), "validation")
        else:
            train, tail = hold_out(train, self.held_out)
            parts["validation"] = cut(tail[:2], "held-out")
        parts["train"] = cut(train, "training")
        parts["test"] = cut(self._read("test"), "test") if self.sources["test"] else parts["validation"]
        self._train, self._parts = train, parts

    def calibration(self) -> Calibration:
        """The calibration windows."""
        self.setup()
        ids, *_ = self._read("calibration") if self.sources["calibration"] else cast(TokenStream, self._train)
        bos = bos_token(self._tokenizer(), self.bos)
        windows = draw(ids, self.num_samples, self.calibration_seq_len, self.seed, bos)
        return Calibration(list(windows.split(self.calibration_batch_size)))

    def fingerprint(self) -> dict[str, str]:
        """Hashes of the training and the validation windows, which identify the text of a checkpoint."""
        self.setup()
        parts = {"train": self._parts["train"].tensors, "validation": (self._parts["validation"].tensors[0],)}
        return {
            part: fingerprint([(str(i), tensor) for i, tensor in enumerate(tensors)], values=1 << 40)
            for part, tensors in parts.items()
        }

    def held_out_windows(self) -> list[Tensor]:  # [1, seq_len] each
        """The windows to evaluate on."""
        self.setup()
        return list(self._parts["validation"].tensors[0][: self.max_windows].split(1))

    def train_dataloader(self) -> DataLoader:
        data = self._parts["train"]
        replicas, rank = self._replicas()
        if len(data) < replicas:
            raise ValueError(
                f"the training text gives {len(data)} windows, too few for {replicas} processes: "
                "give more text, or a smaller seq_len"
            )
        self._sampler = ResumableSampler(data, self.seed, *self._done, num_replicas=replicas, rank=rank)
        full = len(self._sampler) >= self.batch_size
        return self._loader(LateDataLoader, data, sampler=self._sampler, drop_last=full)

    def val_dataloader(self) -> DataLoader:
        return self._held_out_loader("validation")

    def test_dataloader(self) -> DataLoader:
        return self._held_out_loader("test")

    def state_dict(self) -> dict[str, Any]:
        """The place in the training text, from which any number of processes can continue."""
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"epoch": self.trainer.current_epoch, "samples": batches * self.batch_size * self._replicas()[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        run: Any = self.trainer
        if run is not None and run.overfit_batches and run.state.fn == "fit":
            raise ValueError(
                "trainer.overfit_batches begins every epoch with the same batch, also a resumed one: start without a "
                "checkpoint (without --resume)"
            )
        self._done = (state_dict["epoch"], state_dict["samples"])
        if self._sampler is not None:  # some strategies create the loader before the checkpoint is read
            self._sampler.begin(*self._done)

    def batches_done(self) -> int:
        """Batches of the current epoch before a resume, at this run's batch size and number of processes."""
        (replicas, _), (_, samples), count = self._replicas(), self._done, len(self._parts["train"])
        if count // replicas < self.batch_size:
            return int(samples > 0)
        return count // replicas // self.batch_size - max(0, count - samples) // replicas // self.batch_size

    def coming_windows(self, batches: int) -> list[dict[str, Tensor]]:  # [1, seq_len] each
        """The windows in the next batches of this process, in order; a window returns in every epoch."""
        assert self.trainer is not None
        sampler, size = copy.copy(cast(ResumableSampler, self._sampler)), self.batch_size
        epoch, of_epoch = self.trainer.current_epoch, int(self.trainer.num_training_batches)
        windows: list[dict[str, Tensor]] = []
        most = of_epoch - (self.batches_done() if epoch == self._done[0] else 0)
        while batches > 0:
            sampler.set_epoch(epoch)
            rows = list(sampler)[: min(most, batches) * size]
            if len(sampler) >= size:  # the loader then drops an incomplete batch
                rows = rows[: len(rows) // size * size]
            windows += [collate([self._parts["train"][row]]) for row in rows]
            batches -= -(-len(rows) // size)
            epoch, most = epoch + 1, of_epoch
        return windows

    def _replicas(self) -> tuple[int, int]:
        """The number of processes that share the data, and the index of this one."""
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return shares["num_replicas"], shares["rank"]

    def _held_out_loader(self, part: str) -> DataLoader:
        ids, labels = (tensor[: self.max_windows] for tensor in self._parts[part].tensors)
        missing = -len(ids) % self._replicas()[0]  # all processes need equally many; padding must not count
        if missing:
            ids = torch.cat([ids, ids[:1].expand(missing, -1)])
            labels = torch.cat([labels, torch.full_like(labels[:1], IGNORED).expand(missing, -1)])
        return self._loader(DataLoader, TensorDataset(ids, labels))

    def _loader(self, kind: type[DataLoader], data: TensorDataset, **kwargs: Any) -> DataLoader:
        # With a generator, creating an iterator does not advance the global random state.
        return kind(
            data,
            batch_size=self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=isinstance(getattr(self.trainer, "accelerator", None), CUDAAccelerator),
            **kwargs,
        )

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if isinstance(self.tokenizer, str):
            self.tokenizer = load_tokenizer(self.tokenizer)
        module = self.trainer and self.trainer.lightning_module
        tokenizer = self.tokenizer or getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("RecoveryData has no tokenizer: give `tokenizer`, or a module that has one")
        return tokenizer

    def _read(self, part: str) -> TokenStream:
        source, join = cast(str, self.sources[part]), None if part == "train" else self.join
        tokenizer, model = self._tokenizer(), self.trainer and getattr(self.trainer.lightning_module, "model", None)
        begin = None
        if part == "train" and self.intra_document_masking:
            begin = [] if (bos := bos_token(tokenizer, self.bos)) is None else [bos]
            if isinstance(model, PreTrainedModel):
                check_masking(model)
        stream = tokenised(source, tokenizer, join, self.max_documents, self.seed, self.max_dropped, begin)
        if isinstance(model, PreTrainedModel):
            check_ids(model, stream[:1], tokenizer)
        return stream

    def _pack(self, stream: TokenStream, what: str) -> TensorDataset:
        return pack(stream, self.seq_len, what, bos_token(self._tokenizer(), self.bos))


class ResumableSampler(DistributedSampler[int]):
    """Draws a new order for every epoch from the seed alone, and can start within an epoch.

    At the same global batch, several processes together see the batches that a single one would: each takes every n-th
    sample of the same order, and the remainder is left out. As a `DistributedSampler` it is left alone by Lightning,
    which would wrap any other sampler and lose the place in the epoch.

    Args:
        data: The dataset.
        seed: The seed of the orders.
        epoch: The first epoch.
        skip: Samples to skip in that epoch, counted over all processes.
        num_replicas: The number of processes that share the data.
        rank: The index of this process.
    """

    def __init__(
        self, data: Sized, seed: int, epoch: int = 0, skip: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(cast(Any, data), num_replicas, rank, seed=seed, drop_last=True)
        self.begin(epoch, skip)

    def begin(self, epoch: int, skip: int) -> None:
        """Sets the epoch of the next iteration, and the samples to skip in it."""
        self.epoch = epoch
        self._skip = {epoch: skip}

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(cast(Sized, self.dataset)), generator=generator)[self._skip.get(self.epoch, 0) :]
        return iter(
            order[: len(order) // self.num_replicas * self.num_replicas][self.rank :: self.num_replicas].tolist()
        )


class LateDataLoader(DataLoader):
    """A DataLoader that asks its sampler for nothing until the first batch is needed.

    Under DeepSpeed and FSDP2, Lightning creates the iterator before it reads where a resumed run continues.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Lookahead:
    """An iterator whose next items can be read before they are taken.

    Example:
        >>> letters = Lookahead(iter("abc"))
        >>> letters.peek(2), next(letters), letters.peek(9)
        (['a', 'b'], 'a', ['b', 'c'])
    """

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator, self._waiting = iterator, deque[Any]()

    def __iter__(self) -> "Lookahead":
        return self

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._iterator)

    def peek(self, count: int) -> list[Any]:
        """The next items, at most `count`, without taking them."""
        with contextlib.suppress(StopIteration):
            while len(self._waiting) < count:
                self._waiting.append(next(self._iterator))  # `iter` of a loader would begin anew
        return list(self._waiting)[: max(0, count)]


def collate(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Stacks windows into a batch: token ids, labels and, with `intra_document_masking`, positions."""
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=False)}
