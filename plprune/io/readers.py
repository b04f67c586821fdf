"""Reads the rows of a text from files, the hub, and Python's own documentation."""

import json
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, cast

from plprune.io.chats import Record

Placed = tuple[str, Record]  # the place of a row in its text, and the row
PYDOC = "pydoc_data.topics"


def check_text(source: str | None) -> None:
    """Checks, without reading it, that a text may exist; raises ValueError if not."""
    known = f"give a {', '.join(READERS)} file"
    if source is not None and not source.split(":")[0]:
        raise ValueError(f"a text has no name: {known}, {PYDOC}, or ORG/NAME of a hub")
    if source is None or source == PYDOC or Path(source.split(":")[0]).is_dir():
        return
    if Path(source).exists():
        if Path(source).suffix not in READERS:
            raise ValueError(f"{source} is of no known kind: {known}")
    elif Path(source).suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} does not exist: {known}, {PYDOC}, or ORG/NAME of a hub")


def read_rows(source: str, limit: int | None = None) -> Iterator[Placed]:
    """The first `limit` rows of a text, or all, each with its place for messages.

    Raises:
        ValueError: The text does not exist, is empty or not UTF-8, or has a broken line.
    """
    check_text(source)
    rows = islice(_rows(source, limit), limit)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty: give a text")
    yield first
    yield from rows


def _rows(source: str, limit: int | None) -> Iterator[Placed]:
    if source == PYDOC:
        return _numbered({"text": text} for text in import_module(PYDOC).topics.values())
    path = Path(source)
    return READERS[path.suffix](path) if path.is_file() else _numbered(_read_hub(source, limit))


def _numbered(rows: Iterable[Record]) -> Iterator[Placed]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_txt(path: Path) -> Iterator[Placed]:
    text = _decode(path)
    if text.strip():
        yield "line 1", {"text": text}


def _read_json(path: Path) -> Iterator[Placed]:
    """Reads JSON Lines, or an array of objects."""
    text = _decode(path)
    if text.lstrip().startswith("["):
        rows = _parse(text, str(path))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is not an array of JSON objects: write one object per row")
        yield from _numbered(rows)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split inside JSON strings
        if not line.strip():
            continue
        row = _parse(line, f"{path}, line {number},")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is not a JSON object: write one object per line")
        yield f"line {number}", row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{where} is not JSON ({reason}): correct or delete the line") from error


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): write it again") from error
    yield from _numbered(rows)


def _read_hub(source: str, limit: int | None) -> Iterator[Record]:
    from datasets import load_dataset

    name, config, split = [*source.split(":"), "", ""][:3]
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=limit is not None)
        yield from cast(Iterable[Record], rows)
    except Exception as error:  # hubs, scripts and file formats raise errors of many types
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
