"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Raises FileExistsError when something would be lost by writing to `path`, an empty folder aside."""
    path = Path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another output, or pass --overwrite")


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which takes the name `path` when the context ends well.

    Raises:
        FileExistsError: `path` is there already, and `overwrite` is not set.
    """
    path = Path(path)
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield room / path.name
        if path.is_dir():
            os.replace(path, room / "old")
        os.replace(room / path.name, path)
    finally:
        if not path.exists() and (room / "old").exists():
            os.replace(room / "old", path)
        shutil.rmtree(room, ignore_errors=True)
