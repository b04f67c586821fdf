"""A report: one HTML file that opens from disk, and the same content as JSON beside it.

A record is plain data (JSON) of one of three kinds, `run`, `comparison` and `sensitivity`; any part of it may be
missing, and the page shows what there is. What is derived from a record, such as means over seeds, is added to it
before anything is written, so that the page has no number that the JSON has not.
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
from plprune.report.comparison import summarised
from plprune.report.page import MARK, readable

VERSION = 1
NAME = "report.html"
WRITTEN = '"written": "'  # near the head of a report's JSON, and of no other
PAGES = {"run": run.page, "comparison": comparison.page, "sensitivity": sensitivity.page}
DROPPED = {
    "tasks": ("scores", "examples", "parts"),
    "speed": ("widths", "attention_widths"),
}  # long, and known otherwise


def write(record: dict[str, Any], path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Writes a report and its JSON, each whole or not at all.

    Args:
        record: What is reported.
        path: A folder, which gets `report.html` and `report.json`; or an `.html` file, whose JSON is beside it.
        overwrite: Whether to replace what is there.

    Raises:
        FileExistsError: One of them is there already, and `overwrite` is not set.
        OSError: It could not be written.
        ValueError: The record is of no kind that is known.
    """
    page, whole = page_of(path), completed(record)
    texts = {page: html(whole), page.with_suffix(".json"): json.dumps(whole, indent=1, allow_nan=False) + "\n"}
    for file in texts:
        check_output_file(file, overwrite)
    for file, text in texts.items():
        with staged(file, overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="replace")  # names of files need not be UTF-8


def page_of(path: str | os.PathLike[str]) -> Path:
    """The page of a report that is asked for as a folder or as a file."""
    path = Path(path).expanduser()
    return path if path.suffix == ".html" else resolve_path(path) / NAME


def check_ours(page: str | os.PathLike[str]) -> None:
    """Makes sure that a page to be written anew, and the JSON beside it, are a report, if they are there.

    Raises:
        FileExistsError: Something else has such a name.
        OSError: Nothing can be written there.
    """
    for file, mark in ((Path(page), MARK), (Path(page).with_suffix(".json"), WRITTEN)):
        check_output_file(file, overwrite=True)
        if file.exists() and mark not in file.read_text(encoding="utf-8", errors="replace")[:400]:
            raise FileExistsError(f"{file} exists and is no report of plprune: choose another output, or move it away")


def html(record: dict[str, Any]) -> str:
    """A record as a page.

    Raises:
        ValueError: The record is of no kind that is known, or not as we write them.
    """
    kind = record.get("kind")
    if kind not in PAGES:
        raise ValueError(f"a report of the kind {kind!r} is unknown: give one of {', '.join(PAGES)}")
    whole = completed(record)
    with readable():
        return PAGES[kind](whole)


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON has it, with what is derived from it; completing it again changes nothing."""
    head = {"version": VERSION, "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
    with readable():
        plain: dict[str, Any] = head | _plain(record)
        if plain.get("kind") == "comparison":
            plain["summary"] = summarised(plain.get("cells") or [])
    return plain


def _plain(value: Any, within: str = "") -> Any:
    """A value of JSON's kinds: numbers that are not finite become words, and what is long and known is left out."""
    if isinstance(value, Mapping):
        left_out = DROPPED.get(within, ())
        return {str(k): _plain(v, str(k) if k in DROPPED else within) for k, v in value.items() if k not in left_out}
    if isinstance(value, list | tuple | set):
        return [_plain(each, within) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
