"""Where text comes from: files, the hub, and Python's own documentation."""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, cast

from plprune.io.chats import Record

Placed = tuple[str, Record]  # where a row is in its text, and the row
PYDOC = "pydoc_data.topics"


def check_text(source: str | None) -> None:
    """Raises ValueError for a text that cannot be there, as far as that shows without reading it."""
    if source is not None and not source.split(":")[0]:
        raise ValueError(f"a text has no name: give a {', '.join(READERS)} file, {PYDOC}, or ORG/NAME of a hub")
    if source is None or source == PYDOC or Path(source.split(":")[0]).is_dir():
        return
    if Path(source).exists():
        if Path(source).suffix not in READERS:
            raise ValueError(f"{source} is of no known kind: give a {', '.join(READERS)} file")
    elif Path(source).suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} does not exist: give a {', '.join(READERS)} file, {PYDOC}, or ORG/NAME of a hub")


def read_rows(source: str, limit: int | None = None) -> Iterator[Placed]:
    """The rows of a text, `limit` of them at most, each with its place there.

    Raises:
        ValueError: The text is not there, empty, not UTF-8, or has a broken line.
    """
    check_text(source)
    rows = islice(_rows(source, limit), limit)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty: give a text")
    yield first
    yield from rows


def _rows(source: str, limit: int | None) -> Iterator[Placed]:
    path = Path(source)
    if source != PYDOC and path.is_file():
        return READERS[path.suffix](path)
    topics = ({"text": text} for text in import_module(PYDOC).topics.values()) if source == PYDOC else None
    return _numbered(topics or _read_hub(source, limit))


def _numbered(rows: Iterable[Record]) -> Iterator[Placed]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_txt(path: Path) -> Iterator[Placed]:
    text = _decode(path)
    if text.strip():
        yield "line 1", {"text": text}


def _read_json(path: Path) -> Iterator[Placed]:
    """A row on every line, or an array of rows."""
    text = _decode(path)
    if text.lstrip().startswith("["):
        rows = _parsed(text, str(path))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is an array of something else than JSON objects: one object per row is needed")
        yield from _numbered(rows)
        return
    for number, line in enumerate(text.split("\n"), 1):  # JSON strings may hold what splitlines splits at
        if not line.strip():
            continue
        row = _parsed(line, f"{path}, line {number},")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: one object per line is needed")
        yield f"line {number}", row


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where} is not JSON ({reason}): mend or delete the line") from error


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is no Parquet file ({error}): write it again") from error
    yield from _numbered(rows)


def _read_hub(source: str, limit: int | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, config, part = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=part or "train", streaming=limit is not None)
        yield from cast(Iterable[Record], rows)
    except Exception as error:  # of whatever kind, it is not there, or is no data set
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"cannot load {source} ({reason}): check its name, configuration and split") from error


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv") from error


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
