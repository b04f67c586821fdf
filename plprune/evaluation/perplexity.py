"""Perplexity and bits per byte of a text under a model.

A perplexity means little without its protocol: the length of the windows, their overlap, whether they begin with a BOS
token, and the number of tokens counted. A :class:`Passage` is a text cut into windows by a :class:`Protocol`.

Perplexity is per token, so it cannot be compared between tokenizers. Bits per byte can: they are the cost of the text's
tokens over its bytes in UTF-8. A token that ends a document has no bytes; it counts in the perplexity only.

Symbols: b windows of a batch, s tokens of a window, v the vocabulary.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from plprune.io import distributed
from plprune.io.checks import check_sizes
from plprune.io.progress import Progress
from plprune.io.readers import read_rows
from plprune.io.text import MAX_DROPPED, Tally, bos_token, end_tokens, needs_bos, to_documents
from plprune.pruning.forward import check_ids, evaluating
from plprune.pruning.losses import next_token_loss

BYTE = re.compile("<0x[0-9A-F]{2}>")  # how SentencePiece spells the bytes of characters without a token
ENDS = -1  # stands for the bytes of a token that ends a document


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows.

    Args:
        seq_len: Tokens of a window, including the BOS token.
        stride: Tokens from the start of one window to that of the next. Every token counts once, in the first window
            that holds it, with the tokens before it in that window as context; the last window may be shorter. Without
            a stride windows do not overlap, and tokens at the end that do not fill a window are left out.
        bos: Whether a BOS token is put before each window that does not begin with one; None for the tokenizer's
            default. Without it the first token of a window is context only.
        max_windows: At most this many windows from the start of the text; all if not given.

    Raises:
        ValueError: A size is out of range.
    """

    seq_len: int = 512
    stride: int | None = None
    bos: bool | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        check_sizes(seq_len=self.seq_len, stride=self.stride, max_windows=self.max_windows)
        room = self.seq_len - bool(self.bos)
        if self.seq_len < 2:
            raise ValueError(f"seq_len is {self.seq_len}, but a window needs a token of context and one to predict")
        if self.stride and self.stride > room:
            raise ValueError(f"stride is {self.stride}, but a window has {room} tokens of text: tokens would be missed")


@dataclass(frozen=True)
class Passage:
    """A text cut into windows.

    Args:
        source: Name of the text.
        protocol: How it was cut; `bos` is not None.
        windows: Token ids, [1, s] each.
        counts: How many tokens at the end of each window count.
        sizes: For each window, the bytes of text of each counted token, or :data:`ENDS` if it ends a document; None
            if the tokenizer gives no offsets.
    """

    source: str
    protocol: Protocol
    windows: list[Tensor]
    counts: list[int]
    sizes: list[Tensor] | None

    @property
    def tokens(self) -> int:
        """The number of tokens that count."""
        return sum(self.counts)

    @property
    def bytes(self) -> int | None:
        """The bytes of text of these tokens; None if unknown."""
        return None if self.sizes is None else sum(int(each[each != ENDS].sum()) for each in self.sizes)

    def as_dict(self) -> dict[str, Any]:
        """The protocol and the sizes that resulted, in JSON's types."""
        sizes = {"windows": len(self.windows), "tokens": self.tokens, "bytes_of_text": self.bytes}
        return {"text": self.source} | asdict(self.protocol) | sizes

    def __str__(self) -> str:
        how = self.protocol
        overlap = f"a stride of {how.stride}" if how.stride else "no overlap"
        size = "" if self.bytes is None else f", {self.bytes:,} bytes"
        return (
            f"{self.source}: {len(self.windows)} windows of {how.seq_len} tokens, {overlap}, "
            f"{'BOS' if how.bos else 'no BOS'}; {self.tokens:,} tokens counted{size}"
        )


@dataclass(frozen=True)
class Quality:
    """How well a model predicts a passage.

    Args:
        perplexity: Per token.
        bits_per_byte: Of the text; None if the tokenizer gives no offsets.
        tokens: The number of tokens counted.
    """

    perplexity: float
    bits_per_byte: float | None
    tokens: int


def passage(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol,
    join: str | None = None,
    max_dropped: float = MAX_DROPPED,
) -> Passage:
    """Cuts a text into windows.

    Args:
        source: A text as for :class:`RecoveryData`; no more of it is tokenised than needed.
        tokenizer: The model's.
        protocol: How to cut.
        join: Separator that makes one document of all rows.
        max_dropped: The share of rows that may be unusable.

    Raises:
        ValueError: The text cannot be read or is too short, or there is no BOS token although one is asked for.
    """
    bos = bos_token(tokenizer, protocol.bos)
    protocol = Protocol(protocol.seq_len, protocol.stride, bos is not None, protocol.max_windows)
    most, stride = protocol.max_windows or math.inf, protocol.stride
    needed = protocol.seq_len + (most - 1) * (stride or protocol.seq_len)
    ids, sizes = _tokens(source, tokenizer, join, needed, max_dropped)
    windows: list[Tensor] = []
    spans, start, reached = [], 0, 0  # spans of the tokens that count
    while start < len(ids) and len(spans) < most:
        first = needs_bos(ids, start, bos)
        room = protocol.seq_len - first
        end = min(start + room, len(ids))
        reached = max(reached, start + (not first))  # without BOS the first token is context
        if end <= reached or (not stride and end < start + room):
            break
        windows.append(torch.cat([ids.new_tensor([bos] * first), ids[start:end]])[None])
        spans.append((reached, end))
        reached, start = end, start + (stride or room)
    if not spans:
        needed = 2 if stride else protocol.seq_len - bool(protocol.bos)
        raise ValueError(f"the evaluation text has {len(ids)} tokens, but a window needs {needed}: give more text")
    counts = [end - begin for begin, end in spans]
    counted = None if sizes is None else [sizes[begin:end] for begin, end in spans]
    return Passage(source, protocol, windows, counts, counted)


def judge(model: PreTrainedModel, passage: Passage, group: distributed.ProcessGroup = None) -> Quality:
    r"""Perplexity and bits per byte of a model on a passage.

    .. math:: \mathrm{bits} = -\frac{1}{\mathrm{bytes}} \sum_{t\ \text{of the text}} \log_2 p(x_t \mid x_{<t})

    Args:
        model: A causal language model.
        passage: The text, cut for its tokenizer.
        group: The processes that share the windows; each gets the result over all.
    """
    in_text = None if passage.sizes is None else [each != ENDS for each in passage.sizes]
    total, of_text = _cost(model, passage.windows, passage.counts, in_text, group)
    bits = of_text / passage.bytes / math.log(2) if passage.bytes else None
    return Quality(_exp(total / passage.tokens), bits, passage.tokens)


def perplexity(model: PreTrainedModel, windows: Iterable[Tensor], group: distributed.ProcessGroup = None) -> float:
    r"""Perplexity over windows of token ids, the first token of each as context.

    .. math:: \exp\Bigl(-\frac1N \sum_{w} \sum_{t > 1} \log p(x_{w,t} \mid x_{w,<t})\Bigr)

    Args:
        model: A causal language model.
        windows: Token ids, [b, s] each, without padding.
        group: The processes that share the windows; each gets the perplexity over all. All run equally many forward
            passes, as shards of one model must.

    Raises:
        ValueError: There is no token to predict.
    """
    windows = list(windows)
    counts = [ids.shape[1] - 1 for ids in windows]
    tokens = sum(len(ids) * count for ids, count in zip(windows, counts, strict=True))
    if not tokens:
        raise ValueError("no text to measure perplexity on: give windows of at least two tokens")
    return _exp(_cost(model, windows, counts, None, group)[0] / tokens)


@torch.no_grad()
def _cost(
    model: PreTrainedModel,
    windows: Sequence[Tensor],  # [b, s] each
    counts: Sequence[int],
    in_text: Sequence[Tensor] | None,  # [count] each
    group: distributed.ProcessGroup,
) -> tuple[float, float]:
    """The negative log-likelihood in nats of the last `counts` tokens of windows: of all, and of those in the text."""
    check_ids(model, windows)
    mine = distributed.shard(range(len(windows)), group)
    total = torch.zeros(2, dtype=torch.float64)
    steps = -(-len(windows) // distributed.size(group))  # equal for all processes, as shards of a model need
    quiet = distributed.rank(group) > 0
    with evaluating(model), Progress(steps, "measuring perplexity", "window", quiet=quiet) as progress:
        for step in range(steps):
            i = mine[step] if step < len(mine) else 0
            losses = _losses(model, windows[i], counts[i])
            if step < len(mine):
                part = losses[:, in_text[i].to(losses.device)] if in_text else losses
                total += torch.stack([losses.sum(), part.sum()]).double().cpu()
            progress.update()
    first, second = distributed.all_reduce_sum(total, group).tolist()
    return first, second


def _losses(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:  # [b, s] -> [b, count]
    """The negative log-likelihood of the last `count` tokens, in nats."""
    ids = ids.to(model.device)
    fewer = {"logits_to_keep": count + 1} if count + 1 < ids.shape[1] else {}  # the head takes time for each
    logits = model(input_ids=ids, use_cache=False, **fewer).logits[:, -count - 1 :]
    return next_token_loss(logits, ids[:, -count - 1 :], "none").view(len(ids), -1)


def _tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, join: str | None, needed: float, max_dropped: float
) -> tuple[Tensor, Tensor | None]:
    """The first `needed` tokens of a text, and the bytes of each."""
    ids: list[int] = []
    sizes: list[int] = []
    exact, tally = cast(bool, tokenizer.is_fast), Tally(source, join is None and tokenizer.eos_token_id is None)
    for document in to_documents(read_rows(source), tokenizer, tally, join):
        end, text = end_tokens(document, tokenizer), document.text
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=exact, verbose=False)
        ids += encoded.input_ids + end
        if exact:
            pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids)
            sizes += byte_counts(text, encoded.offset_mapping, cast(list[str], pieces)) + [ENDS] * len(end)
        if len(ids) >= needed:
            break
    stop = int(min(needed, len(ids)))
    tally.check(max_dropped)
    tally.report(stop, stop)
    return torch.tensor(ids[:stop], dtype=torch.long), torch.tensor(sizes[:stop]) if exact else None


def byte_counts(text: str, offsets: Sequence[tuple[int, int]], pieces: Sequence[str]) -> list[int]:
    """The bytes of UTF-8 of each token of a text; they add up to the end of the last token.

    Characters between two tokens, such as a space that the tokenizer drops, belong to the later one. Tokens that share
    a character each have the bytes of it that they spell.

    Args:
        text: The text.
        offsets: Start and end of each token, in characters.
        pieces: The spelling of each token in the vocabulary.

    Example:
        >>> byte_counts("né!", [(0, 1), (1, 2), (1, 2), (2, 3)], ["n", "Ã", "©", "!"])
        [1, 1, 1, 1]
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
    place = np.concatenate([[0], np.cumsum(widths)])
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.maximum.accumulate(ends)
    before = np.concatenate([[0], reached[:-1]])[: len(reached)]
    sizes = (place[reached] - place[before]).tolist()
    shared = np.concatenate([[False], starts < before, [False]]).astype(np.int8)  # with the token before
    begins, stops = (np.flatnonzero(np.diff(shared) == change).tolist() for change in (1, -1))
    for begin, stop in zip(begins, stops, strict=True):
        sizes[begin - 1 : stop] = _spelled(sum(sizes[begin - 1 : stop]), pieces[begin - 1 : stop])
    return sizes


def _spelled(size: int, pieces: Sequence[str]) -> list[int]:
    """The bytes of each of several tokens that share characters, by byte-level or SentencePiece spelling."""
    letters = [len(piece) for piece in pieces]  # in a byte-level vocabulary each letter is a byte
    if sum(letters) == size:
        return letters
    sizes = [1 if BYTE.fullmatch(piece) else len(piece.replace("▁", " ").encode()) for piece in pieces]
    sizes[0] -= sum(sizes) == size + 1 and pieces[0].startswith("▁")  # a space that the text does not have
    return sizes if sum(sizes) == size else [size] + [0] * (len(pieces) - 1)


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())  # inf where math.exp overflows
