"""Files and folders that appear whole or not at all, even if the process that writes them is killed.

A writer works in a staging folder beside the output and renames the result into place. It holds a lock on the staging
folder, which the system releases when the process ends. A staging folder without a lock was left behind by a killed
writer; the next writer to the same output removes it.
"""

import contextlib
import fnmatch
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows nothing is locked or flushed, and the leftovers of killed writers stay
    fcntl = None

OLD = "old"  # in a staging folder: the previous output
SUFFIX = ".partial"


@contextlib.contextmanager
def write_errors(path: Path, resumable: bool = True) -> Iterator[None]:
    """Turns errors of writing to `path` into an OSError of one line that says what to do, --resume if `resumable`."""
    try:
        yield
    except Exception as error:
        # Errors of the system have a number; tokenizers raises a bare Exception. Ours have neither, and are clear.
        if not (getattr(error, "errno", None) or isinstance(error, SafetensorError) or type(error) is Exception):
            raise
        resume = ", and continue with --resume; finished work is kept" if resumable else ""
        reason = " ".join(str(error).split())
        raise OSError(f"cannot write {path} ({reason}): check free space and permissions{resume}") from error


def resolve_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path that an output is written to: `~` is expanded, symbolic links are followed.

    Raises:
        OSError: The path goes through a link to a missing target.
        ValueError: The path is empty.
    """
    if not os.fspath(path):
        raise ValueError("the output path is empty: give a path, or leave the option out if it has a default")
    path = Path(os.path.abspath(os.path.expanduser(path)))
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise OSError(f"{each} links to {os.readlink(each)}, which does not exist: create it, or remove the link")
    return Path(os.path.realpath(path))


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Checks, before hours of work, that :func:`staged` will be able to write to `path`.

    Raises:
        FileExistsError: `path` is a file or a folder that is not empty, and `overwrite` is not set.
        OSError: `path` cannot be renamed, its parent is not writable, or it is a link to a missing target.
    """
    path = resolve_path(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another output, or pass --overwrite")
    if path.is_mount() or Path.cwd().is_relative_to(path):
        raise OSError(f"{path} cannot be replaced as a whole: name a folder inside it")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"cannot write to {parent}: choose another output")


def check_output_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Like :func:`check_output`, for an output that is a file: it never replaces a folder, not even an empty one.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    if resolve_path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file, for example one inside it")
    check_output(path, overwrite)


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False, keep: bool = True) -> Iterator[Path]:
    """A temporary path for a file or a folder, which is renamed to `path` if the context ends without an error.

    Args:
        path: The output.
        overwrite: Whether to replace what is there.
        keep: Whether to keep what was written; otherwise `path` stays as it is, as in a dry run.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is not set.
        OSError: Writing failed, for example because the disk is full; nothing is left behind.
    """
    check_output(path, overwrite)
    path = resolve_path(path)
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    staging, handle = _staging_folder(path)
    try:
        with write_errors(path, resumable=False):
            yield staging / path.name
            if keep:
                _move_into_place(staging, path)
    finally:
        _discard(staging, path)
        _unlock(handle)
        with contextlib.suppress(OSError):  # rmdir removes empty folders only
            for folder in created:
                folder.rmdir()


def remove_leftovers(folder: str | os.PathLike[str], names: str = "*") -> None:
    """Removes what killed writers left in a folder, for outputs whose names match a pattern."""
    for staging in Path(folder).glob(f".*.*{SUFFIX}"):
        name = staging.name[1:].removesuffix(SUFFIX).rpartition(".")[0]
        if not fnmatch.fnmatchcase(name, names) or not staging.is_dir() or staging.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another process writes there, or has just removed it
            handle = _lock_folder(staging)
            _discard(staging, staging.parent / name)
            _unlock(handle)


@contextlib.contextmanager
def file_lock(file: str | os.PathLike[str], wait: bool = False) -> Iterator[bool]:
    """Holds an exclusive lock on a file during the context, and yields whether this process got it.

    The file is created, stays empty, and is not removed. Several machines can share the lock if their file system
    passes `flock` on, as NFS does. On a file system without locks every process gets it, and work may be done twice.
    """
    file, acquired = Path(file), True
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as handle:  # NFS locks only files that are open for writing
        try:
            lock(handle.fileno(), wait)
        except BlockingIOError:
            acquired = False
        except OSError:
            pass  # the file system has no locks
        yield acquired


def lock(handle: int, wait: bool = False) -> None:
    """Locks an open file or folder until it is closed or the process ends; does nothing on Windows.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file or a folder at once: if killed midway, :func:`remove_leftovers` removes the rest."""
    path = Path(path)
    staging = path.with_name(f".{path.name}.removed{SUFFIX}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    os.replace(path, staging / "removed")
    shutil.rmtree(staging)


def flush(path: str | os.PathLike[str]) -> None:
    """Writes a file, or a folder with everything in it, to the disk, so that it survives a loss of power."""
    path = Path(path)
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync(each)


def _sync(path: Path) -> None:
    if fcntl is not None:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _move_into_place(staging: Path, path: Path) -> None:
    written = staging / path.name
    _apply_umask(written)
    flush(written)
    if path.is_dir() or (path.exists() and written.is_dir()):  # a rename does not replace these
        os.replace(path, staging / OLD)
    os.replace(written, path)
    _sync(path.parent)


def _apply_umask(path: Path) -> None:
    """Gives files the usual permissions of new files: safetensors makes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            each.chmod(each.stat().st_mode | 0o666 & ~mask)


def _discard(staging: Path, path: Path) -> None:
    """Removes a staging folder; an output that it was about to replace is put back."""
    if not path.exists() and (staging / OLD).exists():
        os.replace(staging / OLD, path)
    shutil.rmtree(staging, ignore_errors=True)


def _staging_folder(path: Path) -> tuple[Path, int | None]:
    """A new staging folder beside a path, and its lock, or None if the file system has no locks."""
    while True:
        staging, handle = Path(tempfile.mkdtemp(SUFFIX, f".{path.name}.", path.parent)), None
        try:
            handle = _lock_folder(staging)
        except BlockingIOError:
            continue  # remove_leftovers in another process was faster than this lock
        except OSError:
            pass
        if staging.exists():
            return staging, handle
        _unlock(handle)


def _lock_folder(folder: Path) -> int | None:
    """Raises OSError if another process holds the lock."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle)
    except OSError:
        os.close(handle)
        raise
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
