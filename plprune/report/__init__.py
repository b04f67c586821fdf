"""Reports: one HTML file that opens from disk, with the same content as JSON beside it.

A record is plain JSON data of one of three kinds, `run`, `comparison` and `sensitivity`. Any part of it may be missing;
the page shows what there is. Derived values, such as means over seeds, are added to the record before anything is
written, so that every number on the page is in the JSON too.
"""

import datetime
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plprune.io.atomic import check_output_file, resolve_path, staged
from plprune.report import comparison, run, sensitivity
from plprune.report.page import MARK, readable
from plprune.report.summary import summarised

VERSION = 1
NAME = "report.html"
WRITTEN = '"written": "'  # near the start of a report's JSON, and of no other JSON
PAGES = {"run": run.page, "comparison": comparison.page, "sensitivity": sensitivity.page}
DROPPED = {"tasks": ("scores", "examples", "parts"), "speed": ("widths", "attention_widths")}  # long or redundant


def write(record: dict[str, Any], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Writes a report and its JSON, each whole or not at all.

    Args:
        record: The record.
        path: A folder, which gets `report.html` and `report.json`; or an `.html` file, with its JSON beside it.
        overwrite: Whether to replace existing files.

    Raises:
        FileExistsError: One of the files exists, and `overwrite` is not set.
        OSError: A file cannot be written.
        ValueError: The kind of the record is unknown.
    """
    page, whole = page_path(path), completed(record)
    texts = {page: html(whole), page.with_suffix(".json"): json.dumps(whole, indent=1, allow_nan=False) + "\n"}
    for file in texts:
        check_output_file(file, overwrite)
    for file, text in texts.items():
        with staged(file, overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # file names need not be UTF-8


def page_path(path: str | os.PathLike[str]) -> Path:
    """The HTML file of a report, for its folder or the file itself."""
    path = Path(path).expanduser()
    return path if path.suffix == ".html" else resolve_path(path) / NAME


def check_replaceable(page: str | os.PathLike[str]) -> None:
    """Makes sure that a page, and the JSON beside it, can be written and would replace nothing but a report.

    Raises:
        FileExistsError: Another file has one of these names.
        OSError: The files cannot be written.
    """
    for file, mark in ((Path(page), MARK), (Path(page).with_suffix(".json"), WRITTEN)):
        check_output_file(file, overwrite=True)
        if file.exists() and mark not in file.read_text(encoding="utf-8", errors="replace")[:400]:
            raise FileExistsError(f"{file} exists and is no report of plprune: choose another output, or move it away")


def html(record: dict[str, Any]) -> str:
    """The page of a record.

    Raises:
        ValueError: The kind of the record is unknown, or the record is malformed.
    """
    kind = record.get("kind")
    if kind not in PAGES:
        raise ValueError(f"a report of the kind {kind!r} is unknown: give one of {', '.join(PAGES)}")
    whole = completed(record)
    with readable():
        return PAGES[kind](whole)


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record in JSON's types with its derived values; completing it again changes nothing."""
    head = {"version": VERSION, "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    with readable():
        plain: dict[str, Any] = head | _plain(record)
        if plain.get("kind") == "comparison":
            plain["summary"] = summarised(plain.get("cells") or [])
    return plain


def _plain(value: Any, within: str = "") -> Any:
    """A value in JSON's types: numbers that are not finite become text, and fields in `DROPPED` are left out."""
    if isinstance(value, Mapping):
        left_out = DROPPED.get(within, ())
        return {str(k): _plain(v, str(k) if k in DROPPED else within) for k, v in value.items() if k not in left_out}
    if isinstance(value, list | tuple | set):
        return [_plain(each, within) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
