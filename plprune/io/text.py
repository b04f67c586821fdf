"""Texts read from files, hubs and CPython itself, tokenised, packed into windows, and drawn from for calibration.

Rows hold a `text`, or a conversation (:mod:`plprune.io.chats`), which goes through the tokenizer's chat template and is
trained on the answers only. A row that cannot be used is dropped, counted and reported; of too many, nothing is used.

Where a tokenizer begins texts with a BOS token, every window does, wherever in a document it starts, as models that
were trained so depend on it. It has the place of a token, and is put nowhere else, but by chat templates.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import PreTrainedTokenizerBase

from plprune.io.chats import Record, UnusableRow, render_chat, to_chat
from plprune.io.readers import Placed, read_rows

log = logging.getLogger(__name__)
TokenStream = tuple[Tensor, ...]  # token ids and labels of a whole text, and where each document starts: [tokens] each
IGNORED = -100  # label of a token that no loss counts
BATCH = 1000  # texts that are tokenised at once
MAX_DROPPED = 0.1  # the share of rows that may be unusable, unasked


@dataclass(frozen=True)
class Document:
    """A row as a text.

    Args:
        text: All of it.
        answers: The characters that the loss counts; all if None.
        ends: Whether the end-of-text token follows, of a tokenizer that has one.
    """

    text: str
    answers: list[range] | None = None
    ends: bool = True


@dataclass
class Tally:
    """How many rows of a text were used, and why not the others.

    Args:
        source: The text.
        endless: Whether nothing stands between its documents.
    """

    source: str
    endless: bool = False
    rows: int = 0
    empty: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # the places, by the reason

    def check(self, max_dropped: float) -> None:
        """Raises ValueError if more than a share of the rows was dropped, or nothing is left."""
        lost = sum(map(len, self.dropped.values()))
        if lost + self.empty == self.rows:
            raise ValueError(f"{self.source}: none of its {self.rows:,} rows can be used: {self._why()}")
        if lost > max_dropped * self.rows:
            raise ValueError(
                f"{self.source}: {lost:,} of its {self.rows:,} rows cannot be used, and max_dropped is {max_dropped}: "
                f"{self._why()}"
            )

    def report(self, tokens: int, counted: int) -> None:
        """Says what was used."""
        used = self.rows - self.empty - sum(map(len, self.dropped.values()))
        said = f"{self.source}: {self.rows:,} rows read, {used:,} used; {tokens:,} tokens, {counted:,} counted"
        said += "; documents run together, as the tokenizer has no end-of-text token" * (self.endless and used > 1)
        log.log(logging.WARNING if self.dropped else logging.INFO, "%s", f"{said}; {self._why()}".removesuffix("; "))

    def _why(self) -> str:
        reasons = sorted(self.dropped.items(), key=lambda item: -len(item[1]))
        parts = [f"{len(places):,} dropped, as {reason} (first at {places[0]})" for reason, places in reasons[:3]]
        if others := sum(len(places) for _, places in reasons[3:]):
            parts.append(f"{others:,} dropped for other reasons")
        return "; ".join([f"{self.empty:,} empty"] * bool(self.empty) + parts)


def tokenised(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    join: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    max_dropped: float = MAX_DROPPED,
    begin: list[int] | None = None,
) -> TokenStream:
    """A text as one stream of tokens; how much of it was used is logged.

    Args:
        source: As for :class:`RecoveryData`.
        tokenizer: Its tokenizer.
        join: Put between the rows, which are then one document.
        limit: At most this many rows are read.
        seed: Of the order of the rows; as they come if not given. Rows that are joined keep their order.
        max_dropped: The share of rows that may be unusable.
        begin: As for :func:`encode`.

    Raises:
        ValueError: The text cannot be read, or too many rows cannot be used.
    """
    rows = list(read_rows(source, limit))
    if join is None and seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[i] for i in order]
    tally = Tally(source, join is None and not _end(tokenizer))
    used = list(to_documents(rows, tokenizer, tally, join))
    tally.check(max_dropped)
    stream = encode(used, tokenizer, begin)
    tally.report(len(stream[0]), int((stream[1] != IGNORED).sum()))
    return stream


def to_documents(
    rows: Iterable[Placed], tokenizer: PreTrainedTokenizerBase, tally: Tally, join: str | None = None
) -> Iterator[Document]:
    """The rows that can be used, as documents; the tally has the others.

    Args:
        rows: With their places.
        tokenizer: Its tokenizer.
        tally: Is kept on.
        join: Put between the rows, which are then one document.
    """
    texts: list[str] = []
    for place, record in rows:
        tally.rows += 1
        try:
            made = to_document(record, tokenizer) if join is None else _checked(Document(to_text(record)))
        except UnusableRow as reason:
            tally.dropped.setdefault(str(reason), []).append(place)
            continue
        if join is not None:
            texts.append(made.text)
        elif made.text.strip():
            yield made
        else:
            tally.empty += 1
    if join is not None and texts:
        yield Document(join.replace("\\n", "\n").join(texts))  # as a shell passes it on


def to_document(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    """A row as a document.

    Raises:
        UnusableRow: It cannot be one.
    """
    chat = to_chat(record)
    if chat is None:
        return _checked(Document(to_text(record)))
    made = _checked(Document(*render_chat(chat, tokenizer), ends=tokenizer.chat_template is None))
    if not tokenizer.is_fast:
        _counted(made, _ids(made.text, tokenizer), None, tokenizer)
    return made


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, begin: list[int] | None = None
) -> TokenStream:
    """Documents as one stream of tokens; labels of what the loss does not count are ignored.

    Args:
        documents: The documents.
        tokenizer: Their tokenizer.
        begin: If each is to be read by itself, what it begins with, unless it does so already. Nothing stands before
            its first token, which is then not learnt, and the stream has where each starts.
    """
    parts: list[TokenStream] = []
    for partly, run in groupby(documents, lambda each: each.answers is not None):
        told = partly and bool(tokenizer.is_fast)
        while batch := list(islice(run, BATCH)):  # ids as Python numbers take tens of bytes each
            texts = [each.text for each in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=told, verbose=False)
            offsets = cast(list[Any], encoded["offset_mapping"] if told else [None] * len(batch))
            for each, own, places in zip(batch, cast(list[list[int]], encoded["input_ids"]), offsets, strict=True):
                first = begin if begin and own[: len(begin)] != begin else []
                ids = torch.tensor(first + own + end_tokens(each, tokenizer), dtype=torch.long)
                labels = ids
                if partly:
                    labels = ids.clone()
                    labels[len(first) : len(first + own)][~_counted(each, own, places, tokenizer)] = IGNORED
                if begin is None:
                    parts.append((ids, labels))
                else:
                    starts = torch.arange(len(ids)) == 0
                    parts.append((ids, labels.masked_fill(starts, IGNORED), starts))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def end_tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a document."""
    return _end(tokenizer) if document.ends else []


def to_text(record: Record) -> str:
    """The plain text of a row.

    Raises:
        UnusableRow: None of the known columns holds text.
    """
    text = next((record[key] for key in ("text", "content") if isinstance(record.get(key), str)), None)
    if text is None:
        raise UnusableRow(
            f"a row with the columns {sorted(record)} has no text: it is needed in text, in messages, in instruction "
            "and output, or in prompt and completion"
        )
    return text


def bos_token(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """The BOS token, if windows are to begin with it; None if not.

    Args:
        tokenizer: The model's.
        bos: Whether they are to; None for what the tokenizer itself does with a text.

    Raises:
        ValueError: It is wanted, and there is none.
    """
    token = cast(int | None, tokenizer.bos_token_id)
    if bos and token is None:
        raise ValueError("the tokenizer has no BOS token: leave out bos")
    own = token is not None and list(tokenizer("a").input_ids)[:1] == [token]
    return token if (own if bos is None else bos) else None


def needs_bos(ids: Tensor, start: int, bos: int | None) -> bool:
    """Whether the BOS token is put before a window: not where the text has it, as chat templates write it."""
    return bos is not None and int(ids[start]) != bos


def window_slices(ids: Tensor, seq_len: int, bos: int | None = None) -> list[slice]:
    """Where full windows are in a text, one after the other; each has the BOS token before it, if there is one."""
    found, start = [], 0
    while start < len(ids) and (stop := start + seq_len - needs_bos(ids, start, bos)) <= len(ids):
        found.append(slice(start, stop))
        start = stop
    return found


def pack(stream: TokenStream, seq_len: int, what: str, bos: int | None = None) -> TensorDataset:
    """A stream cut into windows [n, seq_len]; those without a token to predict and the rest at the end are dropped.

    Where the stream has the starts of documents, each token's position in its document, or what is there of it, goes
    with the windows.

    Raises:
        ValueError: There is not even one window.
    """
    ids, labels, *starts = stream
    places = window_slices(ids, seq_len, bos)
    if not places:
        raise ValueError(f"the {what} text has {len(ids)} tokens, but a window needs {seq_len}: give more text")
    ids, labels = _stacked(ids, places, seq_len, bos), _stacked(labels, places, seq_len, IGNORED)
    useful = (labels[:, 1:] != IGNORED).any(1)  # the mean loss over no token is NaN
    if not useful.any():
        raise ValueError(f"no window of the {what} text has an answer to predict: raise seq_len, or give other text")
    windows = [ids, labels, *(document_positions(_stacked(each, places, seq_len, 0)) for each in starts)]
    return TensorDataset(*(each[useful] for each in windows))


def document_positions(starts: Tensor) -> Tensor:  # [n, s]
    """Positions that begin anew at each start.

    Example:
        >>> restarting(torch.tensor([[False, False, True, False, True]]))
        tensor([[0, 1, 0, 1, 0]])
    """
    places = torch.arange(starts.shape[1]).expand_as(starts)
    return places - (places * starts).cummax(1).values


def hold_out(stream: TokenStream, held_out: float) -> tuple[TokenStream, TokenStream]:
    """The stream without its last part, and that part."""
    size = int(len(stream[0]) * (1 - held_out))
    return tuple(each[:size] for each in stream), tuple(each[size:] for each in stream)


def draw(
    ids: Tensor, num_samples: int, seq_len: int, seed: int, bos: int | None = None
) -> Tensor:  # [tokens] -> [num_samples, seq_len]
    """Windows drawn without replacement, each with the BOS token before it, if it is given.

    Raises:
        ValueError: The text is shorter than that.
    """
    places = window_slices(ids, seq_len, bos)
    if len(places) < num_samples:
        raise ValueError(
            f"the calibration text has {len(places)} windows of {seq_len} tokens, but num_samples is {num_samples}: "
            "give more text, or lower num_samples"
        )
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    return _stacked(ids, [places[i] for i in chosen], seq_len, bos)


def _stacked(values: Tensor, places: list[slice], seq_len: int, first: int | None) -> Tensor:  # [n, seq_len]
    """Windows of a stream, with another value before those that have room for it."""
    before = values.new_tensor([] if first is None else [first])
    return torch.stack([torch.cat([before, values[place]])[-seq_len:] for place in places])


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = cast(int | None, tokenizer.eos_token_id)
    return [] if end is None else [end]


def _checked(document: Document) -> Document:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("its text has half of a surrogate pair") from error
    return document


def _counted(
    document: Document, ids: list[int], offsets: Any, tokenizer: PreTrainedTokenizerBase
) -> Tensor:  # [tokens]
    """Which tokens begin within an answer; without offsets, by how many tokens the text before has."""
    counted = torch.zeros(len(ids), dtype=torch.bool)
    starts = None if offsets is None else torch.tensor(offsets, dtype=torch.long).view(-1, 2)[:, 0]
    for answer in document.answers or []:
        if starts is not None:
            counted |= (starts >= answer.start) & (starts < answer.stop)
            continue
        before, upto = (_ids(document.text[:place], tokenizer) for place in (answer.start, answer.stop))
        if ids[: len(before)] != before or ids[: len(upto)] != upto:
            raise UnusableRow("its tokens reach from one turn into another, and the tokenizer does not say how far")
        counted[len(before) : len(upto)] = True
    return counted
