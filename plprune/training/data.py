"""RecoveryData: calibration windows, training batches and held-out windows as a LightningDataModule."""

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
    """Calibration windows, training batches and held-out windows from any text.

    A text is a `.txt`, `.jsonl`, `.json` or `.parquet` file; a dataset on the hub or in a folder, as `ORG/NAME`,
    `ORG/NAME:CONFIG` or `ORG/NAME:CONFIG:SPLIT`, whose split is `train` if not given; or `pydoc_data.topics`, the 110
    thousand tokens of English about Python that come with CPython: enough to try things, while a model that is to speak
    of more wants other text. Rows hold a `text`; or a conversation, which goes through the tokenizer's chat template
    and is trained on the answers only: `messages` or `conversations`, with the roles that OpenAI, ShareGPT or Gemma
    name; `instruction`, `input` and `output`; or `prompt` and `completion`, as text or as messages. `system`, `history`
    and `tools` may stand beside.

    What was read, used and dropped, and why, is said at the start. Rows without any text are left out, and those that
    cannot be used are dropped: no text, no answer, a message without role or content, a template that refuses it.

    Where the tokenizer begins texts with a BOS token, every window begins with it, also those that start within a
    document; it is one of the window's tokens.

    Documents are packed: they stand one after the other in a window, with the end-of-text token between them, and
    attention reaches back over it. `intra_document_masking` keeps it within each.

    Args:
        train: Text to recover on: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the
            hub or of a folder, or `pydoc_data.topics`.
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
        bos: Whether the BOS token is put before each window; as the tokenizer does with a text if not given.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used: in [0, 1].
        intra_document_masking: Whether each token of a training window attends to its own document only, which begins
            at position 0, with the BOS token if windows do, and whose first token is not learnt. A model that does not
            heed it is refused. What is calibrated on and judged by is not masked: perplexities stay comparable.
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
        self._done = (0, 0)  # epoch, and samples of it that all processes together were trained on before a resume
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
        """Hashes of what is trained on and of what is judged by, for what a checkpoint belongs to."""
        self.setup()
        parts = {"train": self._parts["train"].tensors, "validation": (self._parts["validation"].tensors[0],)}
        return {
            part: fingerprint([(str(i), tensor) for i, tensor in enumerate(tensors)], values=1 << 40)
            for part, tensors in parts.items()
        }

    def held_out_windows(self) -> list[Tensor]:  # [1, seq_len] each
        """The windows to judge by, one by one."""
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
        """How far training has come, so that a resumed run goes on with the next sample, in any number of processes."""
        assert self.trainer is not None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"epoch": self.trainer.current_epoch, "samples": batches * self.batch_size * self._replicas()[0]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        run: Any = self.trainer
        if run is not None and run.overfit_batches and run.state.fn == "fit":
            raise ValueError(
                "trainer.overfit_batches has every epoch begin with the same batch, also one that is gone on with: "
                "start without a checkpoint (without --resume)"
            )
        self._done = (state_dict["epoch"], state_dict["samples"])
        if self._sampler is not None:  # some strategies make the loader first
            self._sampler.begin(*self._done)

    def batches_done(self) -> int:
        """Batches of the current epoch that were trained on before a resume, had their size always been this run's."""
        (replicas, _), (_, samples), count = self._replicas(), self._done, len(self._parts["train"])
        if count // replicas < self.batch_size:
            return int(samples > 0)
        return count // replicas // self.batch_size - max(0, count - samples) // replicas // self.batch_size

    def coming_windows(self, batches: int) -> list[dict[str, Tensor]]:  # [1, seq_len] each
        """What this process will be trained on in its next batches, in order; a window comes again in every epoch."""
        assert self.trainer is not None
        sampler, size = copy.copy(cast(ResumableSampler, self._sampler)), self.batch_size
        epoch, of_epoch = self.trainer.current_epoch, int(self.trainer.num_training_batches)
        found: list[dict[str, Tensor]] = []
        most = of_epoch - (self.batches_done() if epoch == self._done[0] else 0)
        while batches > 0:
            sampler.set_epoch(epoch)
            rows = list(sampler)[: min(most, batches) * size]
            if len(sampler) >= size:  # the loader then drops what does not fill a batch
                rows = rows[: len(rows) // size * size]
            found += [collate([self._parts["train"][row]]) for row in rows]
            batches -= -(-len(rows) // size)
            epoch, most = epoch + 1, of_epoch
        return found

    def _replicas(self) -> tuple[int, int]:
        """How many processes share the data, and which of them this one is."""
        shares = (self.trainer and self.trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        return shares["num_replicas"], shares["rank"]

    def _held_out_loader(self, part: str) -> DataLoader:
        ids, labels = (tensor[: self.max_windows] for tensor in self._parts[part].tensors)
        missing = -len(ids) % self._replicas()[0]  # every process needs as many, and none may count twice
        if missing:
            ids = torch.cat([ids, ids[:1].expand(missing, -1)])
            labels = torch.cat([labels, torch.full_like(labels[:1], IGNORED).expand(missing, -1)])
        return self._loader(DataLoader, TensorDataset(ids, labels))

    def _loader(self, kind: type[DataLoader], data: TensorDataset, **kwargs: Any) -> DataLoader:
        # A generator of its own keeps the making of an iterator from moving the global random state.
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
            raise ValueError("RecoveryData has no tokenizer: give `tokenizer`, or train a module that has one")
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
    """A new order for every epoch that depends on nothing but the seed, and can start within one.

    At the same global batch, several processes see together, batch by batch, what one would: each takes every n-th
    sample of the same order, and what is left over at the end is left out. Lightning leaves a `DistributedSampler` as
    it is; any other it would wrap, and lose the place in the epoch.

    Args:
        data: What is sampled.
        seed: Of the orders.
        epoch: The epoch to begin with.
        skip: Samples of that epoch to leave out, of all processes together.
        num_replicas: Processes that share the data.
        rank: Which of them this one is.
    """

    def __init__(
        self, data: Sized, seed: int, epoch: int = 0, skip: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(cast(Any, data), num_replicas, rank, seed=seed, drop_last=True)
        self.begin(epoch, skip)

    def begin(self, epoch: int, skip: int) -> None:
        """Sets where the next iteration starts."""
        self.epoch = epoch
        self._skip = {epoch: skip}

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(cast(Sized, self.dataset)), generator=generator)[self._skip.get(self.epoch, 0) :]
        return iter(
            order[: len(order) // self.num_replicas * self.num_replicas][self.rank :: self.num_replicas].tolist()
        )


class LateDataLoader(DataLoader):
    """A DataLoader that asks its sampler for nothing until the first batch is wanted.

    Under DeepSpeed and FSDP2, Lightning makes the iterator before it knows where a resumed run goes on.
    """

    def __iter__(self) -> Any:
        yield from super().__iter__()


class Ahead:
    """An iterator that can be looked into.

    Args:
        of: What it gives, one by one.

    Example:
        >>> letters = Ahead(iter("abc"))
        >>> letters.coming(2), next(letters), letters.coming(9)
        (['a', 'b'], 'a', ['b', 'c'])
    """

    def __init__(self, of: Iterator[Any]) -> None:
        self._of, self._waiting = of, deque[Any]()

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> Any:
        return self._waiting.popleft() if self._waiting else next(self._of)

    def coming(self, count: int) -> list[Any]:
        """What comes next, `count` at most; it still comes."""
        with contextlib.suppress(StopIteration):
            while len(self._waiting) < count:
                self._waiting.append(next(self._of))  # `iter` of a loader would begin anew
        return list(self._waiting)[: max(0, count)]


def collate(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """A batch of windows: token ids, labels and, where documents are apart, positions."""
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.stack(part) for name, part in zip(names, zip(*rows, strict=True), strict=False)}
