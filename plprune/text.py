"""Texts read from files, hubs and CPython itself, tokenised, packed into windows, and drawn from for calibration.

Rows hold a `text`; or `messages`, or `instruction`, `input` and `output`, or `prompt` and `completion`, which go
through the tokenizer's chat template and are trained on the answers only.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
Stream = tuple[Tensor, Tensor]  # token ids and labels of a whole text, [tokens] each
PYDOC = "pydoc_data.topics"
IGNORED = -100  # label of a token that no loss counts
QUESTIONS, ANSWERS = ("instruction", "prompt", "question"), ("output", "completion", "response", "answer")


def check_sizes(**sizes: int | None) -> None:
    """Raises ValueError for a size below 1."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, but must be at least 1")


def check_source(source: str | None) -> None:
    """Raises ValueError for a text that cannot be there, as far as that shows without reading it."""
    if source is None or source == PYDOC or Path(source.split(":")[0]).is_dir():
        return
    if Path(source).exists():
        if Path(source).suffix not in READERS:
            raise ValueError(f"{source} is of no known kind: give a {', '.join(READERS)} file")
    elif Path(source).suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} does not exist: give a {', '.join(READERS)} file, {PYDOC}, or ORG/NAME of a hub")


def read(source: str, limit: int | None = None) -> Iterator[Record]:
    """The rows of a text, `limit` of them at most.

    Raises:
        ValueError: The text is not there, empty, not UTF-8, or has a broken line.
    """
    check_source(source)
    rows = islice(_rows(source, limit), limit)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty: give a text")
    yield first
    yield from rows


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

    Raises:
        ValueError: The text cannot be read, or a row holds no text.
    """
    records = list(read(source, limit))
    try:
        if join is not None:
            join = join.replace("\\n", "\n")  # as a shell passes it on
            records = [{"text": join.join(to_text(record) for record in records)}]
        elif seed is not None:
            order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
            records = [records[i] for i in order]
        return encode(records, tokenizer)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def documents(
    source: str, tokenizer: PreTrainedTokenizerBase, join: str | None = None
) -> Iterator[tuple[str, list[int]]]:
    """What :func:`tokenised` puts one after the other: the text of each document, and the tokens that end it.

    Args:
        source: As for :class:`RecoveryData`.
        tokenizer: Its tokenizer.
        join: Put between the rows, which are then one document.

    Raises:
        ValueError: The text cannot be read, or a row holds no text.
    """
    records = list(read(source))
    try:
        if join is not None:
            records = [{"text": join.replace("\\n", "\n").join(to_text(record) for record in records)}]
        for record in records:
            if (messages := to_messages(record)) is None:
                yield to_text(record), _end(tokenizer)
            else:
                yield _render(messages, tokenizer), [] if tokenizer.chat_template else _end(tokenizer)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def encode(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> Stream:
    """Documents as one stream of tokens, each ended by the end-of-text token; labels of prompts are ignored."""
    documents: list[Stream] = []
    for is_chat, rows in groupby(records, lambda record: to_messages(record) is not None):
        if is_chat:
            documents += [encode_chat(cast(list, to_messages(row)), tokenizer) for row in rows]
        else:
            documents += _encode_texts([to_text(row) for row in rows], tokenizer)
    ids, labels = zip(*documents, strict=True)
    return torch.cat(ids), torch.cat(labels)


def to_text(record: Record) -> str:
    """The plain text of a row.

    Raises:
        ValueError: None of the known columns holds text.
    """
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        raise ValueError(
            f"a row with the columns {sorted(record)} has no text: it is needed in text, in messages, in instruction "
            "and output, or in prompt and completion"
        )
    return text


def to_messages(record: Record) -> list[dict[str, str]] | None:
    """A chat or instruction row as messages; None for plain text.

    Example:
        >>> to_messages({"instruction": "Add.", "input": "1 1", "output": "2"})
        [{'role': 'user', 'content': 'Add.\\n\\n1 1'}, {'role': 'assistant', 'content': '2'}]

    Raises:
        ValueError: A message has no role, or no text as its content.
    """
    if isinstance(messages := record.get("messages"), list):
        if not all(isinstance(m, dict) and {str} == {type(m.get("role")), type(m.get("content"))} for m in messages):
            raise ValueError("a row has messages without role or content: each needs both, as text")
        return messages
    question, answer = (
        next((record[key] for key in keys if isinstance(record.get(key), str)), None) for keys in (QUESTIONS, ANSWERS)
    )
    if question is None or answer is None:
        return None
    if isinstance(more := record.get("input"), str) and more:
        question = f"{question}\n\n{more}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Stream:
    """Token ids of a conversation, and labels that count in the assistant's turns only, their end included.

    Without a chat template the turns are put below each other, and the end-of-text token ends the last one. Of a turn
    that the template changes once others follow it (the reasoning of some models), only what stays as it was counts.
    """
    text = _render(messages, tokenizer)
    encoded = cast(Any, tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False))
    turns = _answers(messages, text, tokenizer)
    answered = [any(start in turn for turn in turns) for start, _ in encoded["offset_mapping"]]
    labels = [token if a else IGNORED for token, a in zip(encoded["input_ids"], answered, strict=True)]
    end = [] if tokenizer.chat_template else _end(tokenizer)
    return torch.tensor(encoded["input_ids"] + end, dtype=torch.long), torch.tensor(labels + end, dtype=torch.long)


def pack(stream: Stream, seq_len: int, what: str) -> TensorDataset:
    """A stream cut into windows [n, seq_len]; those without a token to predict and the rest at the end are dropped.

    Raises:
        ValueError: There is not even one window.
    """
    count = len(stream[0]) // seq_len
    if not count:
        raise ValueError(f"the {what} text has {len(stream[0])} tokens, but a window needs {seq_len}: give more text")
    ids, labels = (part[: count * seq_len].view(count, seq_len) for part in stream)
    useful = (labels[:, 1:] != IGNORED).any(1)  # the mean loss over no token is NaN
    if not useful.any():
        raise ValueError(f"no window of the {what} text has an answer to predict: raise seq_len, or give other text")
    return TensorDataset(ids[useful], labels[useful])


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


def _encode_texts(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Stream]:
    documents: list[Stream] = []
    for start in range(0, len(texts), 1000):  # ids as Python numbers take tens of bytes each
        encoded = tokenizer(texts[start : start + 1000], add_special_tokens=False, verbose=False)["input_ids"]
        for ids in cast(list[list[int]], encoded):
            tensor = torch.tensor(ids + _end(tokenizer), dtype=torch.long)
            documents.append((tensor, tensor))
    return documents


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = cast(int | None, tokenizer.eos_token_id)
    return [] if end is None else [end]


def _answers(messages: list[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerBase) -> list[range]:
    """Where the assistant's turns are in the text of a conversation."""
    turns = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:i], tokenizer, True) if i else text.partition(message["content"])[0]
            upto = text[: _common(text, _render(messages[: i + 1], tokenizer))]
            turns.append(range(_common(text, before), len(upto.rstrip())))
    return turns


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    """The text of a conversation; as a prompt it goes up to where the assistant begins to speak."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + ("\n\n" if prompt else "")
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses a row ({error}): mend or leave out the row") from error


def _rows(source: str, limit: int | None) -> Iterator[Record]:
    if source == PYDOC:
        return ({"text": text} for text in import_module(PYDOC).topics.values())
    path = Path(source)
    return READERS[path.suffix](path) if path.is_file() else _read_hub(source, limit)


def _read_txt(path: Path) -> Iterator[Record]:
    text = _decode(path)
    if text.strip():
        yield {"text": text}


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_decode(path).split("\n"), 1):  # JSON strings may hold what splitlines splits at
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{path}, line {number}, is not JSON ({reason}): mend or delete the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: one object per line is needed")
        yield row


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file ({error}): write it again") from error
    yield from table.to_pylist()


def _read_hub(source: str, limit: int | None) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, config, part = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=part or "train", streaming=limit is not None)
        yield from cast(Iterable[Record], rows)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"cannot load {source} ({reason}): check its name, configuration and split") from error


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
