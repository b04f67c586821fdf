"""Turns texts into token ids: rows become documents, documents one stream of tokens, and the stream windows.

A row holds a `text`, or a conversation (:mod:`plprune.io.chats`), which goes through the tokenizer's chat template and
is trained on its answers only. Unusable rows are dropped, counted and reported; too many of them are an error.

If the tokenizer begins texts with a BOS token, every window begins with one, wherever in a document it starts, because
models that were trained so depend on it. It counts towards the window's length. Apart from that, only chat templates
write BOS tokens.
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
TokenStream = tuple[Tensor, ...]  # token ids, labels, and optionally whether a document starts: [tokens] each
IGNORED = -100  # label of a token that no loss counts
BATCH = 1000  # documents per call of the tokenizer
MAX_DROPPED = 0.1  # default share of rows that may be unusable


@dataclass(frozen=True)
class Document:
    """The text of a row."""

    text: str
    answers: list[range] | None = None  # characters that the loss counts; None for all
    ends: bool = True  # whether the tokenizer's end-of-text token follows


@dataclass
class Tally:
    """Counts the rows of a text that are used, empty, and dropped."""

    source: str
    endless: bool = False  # whether no token separates the documents
    rows: int = 0
    empty: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # places by reason

    @property
    def lost(self) -> int:
        return sum(map(len, self.dropped.values()))

    def check(self, max_dropped: float) -> None:
        """Raises ValueError if no row is used, or a larger share than `max_dropped` is dropped."""
        if self.lost + self.empty == self.rows:
            raise ValueError(f"{self.source}: none of its {self.rows:,} rows can be used: {self._reasons()}")
        if self.lost > max_dropped * self.rows:
            raise ValueError(
                f"{self.source}: {self.lost:,} of its {self.rows:,} rows cannot be used, and max_dropped is "
                f"{max_dropped}: {self._reasons()}"
            )

    def report(self, tokens: int, counted: int) -> None:
        """Logs how many rows and tokens are used, and how many tokens the loss counts."""
        used = self.rows - self.empty - self.lost
        line = f"{self.source}: {self.rows:,} rows read, {used:,} used; {tokens:,} tokens, {counted:,} counted"
        line += "; documents run together, as the tokenizer has no end-of-text token" * (self.endless and used > 1)
        line = f"{line}; {self._reasons()}".removesuffix("; ")
        log.log(logging.WARNING if self.dropped else logging.INFO, "%s", line)

    def _reasons(self) -> str:
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
    """Reads and tokenises a text, and logs how much of it is used.

    Args:
        source: A file, a data set on the hub, or `pydoc_data.topics`.
        tokenizer: The model's tokenizer.
        join: Separator that joins the rows into one document; if None, every row is a document.
        limit: The number of rows to read; all if None.
        seed: Seed that shuffles the documents; their order is kept if None, or if rows are joined.
        max_dropped: The share of rows that may be unusable.
        begin: As for :func:`encode`.

    Raises:
        ValueError: The text cannot be read, or too many rows are unusable.
    """
    rows = list(read_rows(source, limit))
    if join is None and seed is not None:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        rows = [rows[i] for i in order]
    tally = Tally(source, join is None and tokenizer.eos_token_id is None)
    documents = list(to_documents(rows, tokenizer, tally, join))
    tally.check(max_dropped)
    stream = encode(documents, tokenizer, begin)
    tally.report(len(stream[0]), int((stream[1] != IGNORED).sum()))
    return stream


def to_documents(
    rows: Iterable[Placed], tokenizer: PreTrainedTokenizerBase, tally: Tally, join: str | None = None
) -> Iterator[Document]:
    """The documents of usable rows; `tally` counts all rows, and `join` is as for :func:`tokenised`."""
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
        yield Document(join.replace("\\n", "\n").join(texts))  # a shell passes \n on as two characters


def to_document(record: Record, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Converts a row to a document, or raises UnusableRow."""
    chat = to_chat(record)
    if chat is None:
        return _checked(Document(to_text(record)))
    made = _checked(Document(*render_chat(chat, tokenizer), ends=tokenizer.chat_template is None))
    if not tokenizer.is_fast:
        _counted(made, _ids(made.text, tokenizer), None, tokenizer)
    return made


def to_text(record: Record) -> str:
    """The plain text of a row; raises UnusableRow if no known column holds text."""
    text = next((record[key] for key in ("text", "content") if isinstance(record.get(key), str)), None)
    if text is None:
        raise UnusableRow(
            f"a row with the columns {sorted(record)} has no text: it is needed in text, in messages, in instruction "
            "and output, or in prompt and completion"
        )
    return text


def encode(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, begin: list[int] | None = None
) -> TokenStream:
    """Tokenises documents into one stream; tokens outside of answers get the label `IGNORED`.

    Args:
        documents: The documents.
        tokenizer: The model's tokenizer.
        begin: For windows in which each document attends to itself only: the tokens that begin each document, unless it
            begins with them already. The first token of each then gets the label `IGNORED`, because nothing precedes
            it, and the stream marks the starts.
    """
    parts: list[TokenStream] = []
    for partly, run in groupby(documents, lambda each: each.answers is not None):
        with_offsets = partly and bool(tokenizer.is_fast)
        while batch := list(islice(run, BATCH)):  # ids as Python numbers take tens of bytes each
            texts = [each.text for each in batch]
            encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=with_offsets, verbose=False)
            offsets = cast(list[Any], encoded["offset_mapping"] if with_offsets else [None] * len(batch))
            for each, tokens, places in zip(batch, cast(list[list[int]], encoded["input_ids"]), offsets, strict=True):
                first = begin if begin and tokens[: len(begin)] != begin else []
                ids = torch.tensor(first + tokens + end_tokens(each, tokenizer), dtype=torch.long)
                labels = ids
                if partly:
                    labels = ids.clone()
                    labels[len(first) : len(first + tokens)][~_counted(each, tokens, places, tokenizer)] = IGNORED
                if begin is None:
                    parts.append((ids, labels))
                else:
                    starts = torch.arange(len(ids)) == 0
                    parts.append((ids, labels.masked_fill(starts, IGNORED), starts))
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def end_tokens(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens to append to a document: the end-of-text token, or none."""
    end = cast(int | None, tokenizer.eos_token_id)
    return [end] if document.ends and end is not None else []


def bos_token(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> int | None:
    """The BOS token, if windows begin with it, and None if not. If `bos` is None, the tokenizer decides.

    Raises:
        ValueError: `bos` is true, and the tokenizer has no BOS token.
    """
    token = cast(int | None, tokenizer.bos_token_id)
    if bos and token is None:
        raise ValueError("the tokenizer has no BOS token: leave out bos")
    if bos is None:
        bos = token is not None and list(tokenizer("a").input_ids)[:1] == [token]
    return token if bos else None


def needs_bos(ids: Tensor, start: int, bos: int | None) -> bool:
    """Whether to put the BOS token before a window, which is not so where a chat template has written it."""
    return bos is not None and int(ids[start]) != bos


def window_slices(ids: Tensor, seq_len: int, bos: int | None = None) -> list[slice]:
    """The slices of consecutive full windows; with a BOS token to put before them, they are one token shorter."""
    slices, start = [], 0
    while start < len(ids) and (stop := start + seq_len - needs_bos(ids, start, bos)) <= len(ids):
        slices.append(slice(start, stop))
        start = stop
    return slices


def pack(stream: TokenStream, seq_len: int, what: str, bos: int | None = None) -> TensorDataset:
    """Cuts a stream into windows; the rest at the end and windows without a token to predict are dropped.

    Returns:
        Token ids and labels, [n, seq_len] each; if the stream marks the starts of documents, also each token's position
        in its document, counted from the window's start where the document began earlier.

    Raises:
        ValueError: There is not even one window.
    """
    ids, labels, *starts = stream
    slices = window_slices(ids, seq_len, bos)
    if not slices:
        raise ValueError(f"the {what} text has {len(ids)} tokens, but a window needs {seq_len}: give more text")
    ids, labels = _stacked(ids, slices, seq_len, bos), _stacked(labels, slices, seq_len, IGNORED)
    useful = (labels[:, 1:] != IGNORED).any(1)  # the mean loss over no token is NaN
    if not useful.any():
        raise ValueError(f"no window of the {what} text has an answer to predict: raise seq_len, or give other text")
    windows = [ids, labels, *(document_positions(_stacked(each, slices, seq_len, 0)) for each in starts)]
    return TensorDataset(*(each[useful] for each in windows))


def document_positions(starts: Tensor) -> Tensor:  # [n, s]
    """Positions that restart at each start of a document.

    Example:
        >>> document_positions(torch.tensor([[False, False, True, False, True]]))
        tensor([[0, 1, 0, 1, 0]])
    """
    places = torch.arange(starts.shape[1]).expand_as(starts)
    return places - (places * starts).cummax(1).values


def hold_out(stream: TokenStream, fraction: float) -> tuple[TokenStream, TokenStream]:
    """Splits a stream into its first part and the held-out fraction at its end."""
    size = int(len(stream[0]) * (1 - fraction))
    return tuple(each[:size] for each in stream), tuple(each[size:] for each in stream)


def draw(ids: Tensor, num_samples: int, seq_len: int, seed: int, bos: int | None = None) -> Tensor:
    """Draws windows [num_samples, seq_len] of a text [tokens] at random, without replacement.

    Raises:
        ValueError: The text has fewer windows.
    """
    slices = window_slices(ids, seq_len, bos)
    if len(slices) < num_samples:
        raise ValueError(
            f"the calibration text has {len(slices)} windows of {seq_len} tokens, but num_samples is {num_samples}: "
            "give more text, or lower num_samples"
        )
    chosen = torch.randperm(len(slices), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    return _stacked(ids, [slices[i] for i in chosen], seq_len, bos)


def _stacked(values: Tensor, slices: list[slice], seq_len: int, first: int | None) -> Tensor:  # [n, seq_len]
    """Windows of a stream; those that are one token short begin with `first`."""
    before = values.new_tensor([] if first is None else [first])
    return torch.stack([torch.cat([before, values[each]])[-seq_len:] for each in slices])


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _checked(document: Document) -> Document:
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRow("its text has half of a surrogate pair") from error
    return document


def _counted(
    document: Document, ids: list[int], offsets: Any, tokenizer: PreTrainedTokenizerBase
) -> Tensor:  # [tokens]
    """Which tokens begin within an answer; without offsets, prefixes of the text are tokenised to find out."""
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
