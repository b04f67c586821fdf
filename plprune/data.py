"""Text for calibration, recovery and judgement: read, tokenised and packed into windows of `seq_len` tokens."""

import json
from collections.abc import Callable, Iterable, Iterator, Sized
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from transformers import PreTrainedTokenizerBase

from plprune.calibration import Calibration
from plprune.checkpoint import load_tokenizer

Record = dict[str, Any]
PYDOC = "pydoc_data.topics"
IGNORED = -100  # label of a token that no loss counts


class RecoveryData(pl.LightningDataModule):
    """Calibration windows, training batches and held-out windows from any text.

    A text is named in one of four ways: a `.txt`, `.jsonl` or `.parquet` file; a dataset on the hub, as `ORG/NAME`,
    `ORG/NAME:CONFIG` or `ORG/NAME:CONFIG:SPLIT`; or `pydoc_data.topics`, the 110 thousand tokens of English about
    Python that come with CPython. Rows hold a `text`; or `messages`, or `instruction`, `input` and `output`, or
    `prompt` and `completion`, which go through the tokenizer's chat template and are trained on the answers only.

    Args:
        train: Text to recover on.
        validation: Text to judge by; if not given, the last `held_out` of `train`, which is then not trained on.
        test: Text of `trainer.test`; the validation text if not given.
        calibration: Text to calibrate on; the part of `train` that is trained on if not given.
        tokenizer: The tokenizer, or the name or path of one; the model's own if not given.
        seq_len: Tokens of a training or validation window.
        batch_size: Windows of a batch.
        num_samples: Calibration windows.
        calibration_seq_len: Tokens of a calibration window; `seq_len` if not given.
        calibration_batch_size: Calibration windows that are run at once; the statistics do not depend on it.
        held_out: The fraction of `train` to hold out when `validation` is not given, in (0, 1).
        max_windows: At most this many held-out windows are judged by; all if not given.
        max_documents: At most this many rows are read of each text; a hub dataset is then streamed. All if not given.
        join: Put between the rows of a text, which are then one document: "\\n\\n" is usual for WikiText. If not
            given, every row is a document.
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
            raise ValueError(f"held_out is {held_out}, but it is a fraction in (0, 1)")
        self.sources = {"train": train, "validation": validation, "test": test, "calibration": calibration}
        self.tokenizer: PreTrainedTokenizerBase | str | None = tokenizer
        self.seq_len, self.batch_size = seq_len, batch_size
        self.num_samples, self.calibration_seq_len = num_samples, calibration_seq_len or seq_len
        self.calibration_batch_size = calibration_batch_size
        self.held_out, self.max_windows, self.max_documents = held_out, max_windows, max_documents
        self.join, self.num_workers, self.seed = join, num_workers, seed
        self._parts: dict[str, TensorDataset] = {}
        self._calibration: Tensor | None = None
        self._done = (0, 0)  # epoch, and batches of it that were trained on before a resume
        for source in self.sources.values():
            check_source(source)

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises all texts, once."""
        if self._parts:
            return
        stream = self._read("train")
        if self.sources["validation"]:
            self._parts["validation"] = pack(self._read("validation"), self.seq_len, "validation")
        else:
            stream, tail = split(stream, self.held_out)
            self._parts["validation"] = pack(tail, self.seq_len, "held-out")
        self._parts["train"] = pack(stream, self.seq_len, "training")
        self._parts["test"] = self._parts["validation"]
        if self.sources["test"]:
            self._parts["test"] = pack(self._read("test"), self.seq_len, "test")
        text = self._read("calibration") if self.sources["calibration"] else stream
        self._calibration = draw(text[0], self.num_samples, self.calibration_seq_len, self.seed)

    def calibration(self) -> Calibration:
        """The calibration windows."""
        if self._calibration is None:
            self.setup()
        assert self._calibration is not None
        return Calibration(list(self._calibration.split(self.calibration_batch_size)))

    def held_out_windows(self) -> list[Tensor]:  # [1, seq_len] each
        """The windows to judge by, one by one."""
        self.setup()
        return list(self._parts["validation"].tensors[0][: self.max_windows].split(1))

    def train_dataloader(self) -> DataLoader:
        data = self._parts["train"]
        sampler = ResumableSampler(data, self.seed, *self._done[:1], skip=self._done[1] * self.batch_size)
        return self._loader(data, sampler=sampler, drop_last=len(data) >= self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self._loader(TensorDataset(*(t[: self.max_windows] for t in self._parts["validation"].tensors)))

    def test_dataloader(self) -> DataLoader:
        return self._loader(TensorDataset(*(t[: self.max_windows] for t in self._parts["test"].tensors)))

    def state_dict(self) -> dict[str, Any]:
        """How far training has come, so that a resumed run goes on with the next batch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        return {"epoch": self.trainer.current_epoch, "batches": progress.ready}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = (state_dict["epoch"], state_dict["batches"])

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
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer = getattr(self.trainer and self.trainer.lightning_module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError("RecoveryData has no tokenizer: give `tokenizer`, or train a module that has one")
        return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer

    def _read(self, part: str) -> "Stream":
        source = cast(str, self.sources[part])
        return tokenised(source, self._tokenizer(), self.join, self.max_documents, self.seed)


Stream = tuple[Tensor, Tensor]  # token ids and labels of a whole text, [tokens] each


class ResumableSampler(Sampler[int]):
    """A new order for every epoch that depends on nothing but the seed, and can start within one.

    Args:
        data: What is sampled.
        seed: Of the orders.
        epoch: The epoch to begin with.
        skip: Samples of that epoch to leave out.
    """

    def __init__(self, data: Sized, seed: int, epoch: int = 0, skip: int = 0) -> None:
        self.data, self.seed, self.epoch = data, seed, epoch
        self._skip = {epoch: skip}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.data), generator=generator).tolist()
        return iter(order[self._skip.get(self.epoch, 0) :])

    def __len__(self) -> int:
        return len(self.data)


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of windows."""
    ids, labels = zip(*rows, strict=True)
    return {"input_ids": torch.stack(ids), "labels": torch.stack(labels)}


def check_source(source: str | None) -> None:
    """Raises ValueError for a text that cannot be there: a file that does not exist or is of an unknown kind."""
    if source is None or source == PYDOC or Path(source).exists():
        return
    if Path(source).suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} does not exist: give a {', '.join(READERS)} file, {PYDOC}, or ORG/NAME of a hub")


def read(source: str, limit: int | None = None) -> Iterator[Record]:
    """The rows of a text.

    Raises:
        ValueError: The text is empty, not UTF-8, or has a broken line.
    """
    path = Path(source)
    if path.exists() and path.suffix not in READERS:
        raise ValueError(f"{source} is of no known kind: give a {', '.join(READERS)} file")
    if source == PYDOC:
        rows: Iterable[Record] = ({"text": text} for text in import_module(PYDOC).topics.values())
    else:
        rows = READERS[path.suffix](path) if path.exists() else _read_hub(source, limit)
    count = 0
    for row in rows:
        if limit is not None and count == limit:
            return
        count += 1
        yield row
    if not count:
        raise ValueError(f"{source} is empty: give a text")


def tokenised(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    join: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Stream:
    """A text as one stream of tokens.

    Args:
        source: As for :class:`RecoveryData`.
        tokenizer: Its tokenizer.
        join: Put between the rows, which are then one document.
        limit: At most this many rows are read.
        seed: Of the order of the rows; as they come if not given. Rows that are joined keep their order.
    """
    records = list(read(source, limit))
    if join is not None:
        records = [{"text": join.join(to_text(record) for record in records)}]
    elif seed is not None:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
        records = [records[i] for i in order]
    return encode(records, tokenizer)


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Stream:
    """Documents as one stream of tokens, each ended by the end-of-text token; labels of prompts are ignored."""
    texts, ids, labels = [], [], []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for record in records:
        if (messages := to_messages(record)) is None:
            texts.append(to_text(record))
            continue
        chat_ids, chat_labels = encode_chat(messages, tokenizer)
        ids.append(torch.tensor(chat_ids + end))
        labels.append(torch.tensor(chat_labels + end))
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    ids += [torch.tensor(i + end, dtype=torch.long) for i in cast(list[list[int]], encoded)]
    labels += ids[len(labels) :]
    return torch.cat(ids), torch.cat(labels)


def to_text(record: Record) -> str:
    """The plain text of a row.

    Raises:
        ValueError: The row has none of the known columns.
    """
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        raise ValueError(
            f"a row has columns {sorted(record)}, but text is needed in one of: text; messages; "
            "instruction and output; prompt and completion"
        )
    return text


def to_messages(record: Record) -> list[dict[str, str]] | None:
    """A chat or instruction row as messages; None for plain text.

    Example:
        >>> to_messages({"instruction": "Add.", "input": "1 1", "output": "2"})
        [{'role': 'user', 'content': 'Add.\\n\\n1 1'}, {'role': 'assistant', 'content': '2'}]
    """
    if isinstance(record.get("messages"), list):
        return record["messages"]
    question = record.get("instruction", record.get("prompt"))
    answer = next((record[k] for k in ("output", "completion", "response", "answer") if k in record), None)
    if not isinstance(question, str) or not isinstance(answer, str):
        return None
    question = "\n\n".join(part for part in (question, record.get("input")) if part)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and labels that count in the assistant's turns only."""
    template = _template(tokenizer)
    ids = template(messages, False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            start, stop = len(template(messages[:i], True)), len(template(messages[: i + 1], False))
            labels[start:stop] = ids[start:stop]
    return ids, labels


def pack(stream: Stream, seq_len: int, what: str) -> TensorDataset:
    """A stream cut into windows [n, seq_len]; a rest that does not fill one is dropped.

    Raises:
        ValueError: There is not even one window.
    """
    count = len(stream[0]) // seq_len
    if not count:
        raise ValueError(f"the {what} text has {len(stream[0])} tokens, but a window needs {seq_len}: give more text")
    return TensorDataset(*(part[: count * seq_len].view(count, seq_len) for part in stream))


def split(stream: Stream, held_out: float) -> tuple[Stream, Stream]:
    """The stream without its last part, and that part."""
    cut = int(len(stream[0]) * (1 - held_out))
    return (stream[0][:cut], stream[1][:cut]), (stream[0][cut:], stream[1][cut:])


def draw(ids: Tensor, num_samples: int, seq_len: int, seed: int) -> Tensor:  # [tokens] -> [num_samples, seq_len]
    """Windows drawn without replacement.

    Raises:
        ValueError: The text is shorter than that.
    """
    count = len(ids) // seq_len
    if count < num_samples:
        raise ValueError(
            f"the calibration text has {count} windows of {seq_len} tokens, but num_samples is {num_samples}: "
            "give more text, or lower num_samples"
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:num_samples]
    return ids[: count * seq_len].view(count, seq_len)[chosen]


def _template(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]], bool], list[int]]:
    if tokenizer.chat_template is None:
        return lambda messages, _: cast(
            list[int],
            tokenizer("".join(f"{m['content']}\n\n" for m in messages), add_special_tokens=False)["input_ids"],
        )

    def apply(messages: list[dict[str, str]], prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return cast(list[int], tokenizer(cast(str, text), add_special_tokens=False)["input_ids"])

    return apply


def _read_txt(path: Path) -> Iterator[Record]:
    text = _decode(path)
    if text.strip():
        yield {"text": text}


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_decode(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}): mend or delete the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: one object per line is needed")
        yield row


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({error}): write it again") from error
    yield from table.to_pylist()


def _read_hub(source: str, limit: int | None) -> Iterable[Record]:
    from datasets import load_dataset

    name, config, part = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=part or "train", streaming=limit is not None)
        return cast(Iterable[Record], rows)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the dataset {source}: {str(error).splitlines()[0]}") from error


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
