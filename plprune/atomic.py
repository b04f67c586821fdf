"""Files and folders that appear whole or not at all: written beside their place under another name, then renamed."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Makes sure, before hours of work, that :func:`staged` will be able to write to `path`.

    Raises:
        FileExistsError: Something would be lost, an empty folder aside, and `overwrite` is not set.
        OSError: The place cannot be renamed, or nothing can be written beside it.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another output, or pass --overwrite")
    if path.is_mount() or Path.cwd().is_relative_to(path.resolve()):
        raise OSError(f"{path} cannot be replaced as a whole: name a folder inside it")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"cannot write to {parent}: choose another output")


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which takes the name `path` when the context ends well.

    Raises:
        FileExistsError: `path` is there already, and `overwrite` is not set.
        OSError: It could not be written, for want of space for example; nothing is left behind.
    """
    check_free(path, overwrite)
    path = Path(os.path.abspath(path))
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield room / path.name
        if path.is_dir() or (path.exists() and (room / path.name).is_dir()):  # these a rename does not replace
            os.replace(path, room / "old")
        os.replace(room / path.name, path)
    except Exception as error:
        if getattr(error, "errno", None) or isinstance(error, SafetensorError) or type(error) is Exception:
            reason = " ".join(str(error).split())  # a bare Exception is what tokenizers raises when it cannot write
            raise OSError(f"cannot write {path} ({reason}): check the space and the rights there") from error
        raise
    finally:
        if not path.exists() and (room / "old").exists():
            os.replace(room / "old", path)
        shutil.rmtree(room, ignore_errors=True)
        with contextlib.suppress(OSError):  # of folders, only those that are empty go
            for folder in created:
                folder.rmdir()
