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

from plprune.atomic import check_free, staged
from plprune.report import comparison, run, sensitivity
from plprune.report.comparison import summarised
from plprune.report.page import MARK

VERSION = 1
NAME = "report.html"
PAGES = {"run": run.page, "comparison": comparison.page, "sensitivity": sensitivity.page}
DROPPED = {"tasks": ("scores", "examples"), "speed": ("widths", "attention_widths")}  # long, and known otherwise


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
        check_free(file, overwrite)
    for file, text in texts.items():
        with staged(file, overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")


def page_of(path: str | os.PathLike[str]) -> Path:
    """The page of a report that is asked for as a folder or as a file."""
    return Path(path) if Path(path).suffix == ".html" else Path(path) / NAME


def check_ours(page: str | os.PathLike[str]) -> None:
    """Makes sure that a page to be written anew is a report, if there is one.

    Raises:
        FileExistsError: Something else has its name.
        OSError: Nothing can be written there.
    """
    page = Path(page)
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace")[:400]:
        raise FileExistsError(f"{page} exists and is no report of plprune: choose another output, or move it away")
    check_free(page, overwrite=True)


def html(record: dict[str, Any]) -> str:
    """A record as a page.

    Raises:
        ValueError: The record is of no kind that is known.
    """
    kind = record.get("kind")
    if kind not in PAGES:
        raise ValueError(f"a report of the kind {kind!r} is unknown: give one of {', '.join(PAGES)}")
    return PAGES[kind](completed(record))


def completed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON has it, with what is derived from it; completing it again changes nothing."""
    plain: dict[str, Any] = _plain(record)
    plain = {"version": VERSION, "written": datetime.datetime.now().astimezone().isoformat(timespec="seconds")} | plain
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
