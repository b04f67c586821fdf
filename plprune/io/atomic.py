"""Files and folders that appear whole or not at all: written beside their place under another name, then renamed.

The other name is that of a folder, the room, which its writer keeps locked. A lock ends with its process, however that
ends: rooms without one are what killed writers have left, and the next writer removes them.
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
except ImportError:  # Windows, where nothing is locked or flushed, and what a killed writer leaves stays
    fcntl = None

OLD = "old"  # in a room: what was there before
SUFFIX = ".partial"


class CannotWrite(OSError):
    """Something could not be written; what was written before is kept."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong with writing to `path` into a line that says what to do."""
    try:
        yield
    except Exception as error:
        plain = type(error) is Exception  # which is what tokenizers raises when it cannot write
        if isinstance(error, CannotWrite) or not (plain or isinstance(error, OSError | SafetensorError)):
            raise
        reason = " ".join(str(error).split())
        raise CannotWrite(
            f"cannot write {path} ({reason}): check the space and the rights there, and go on with --resume; "
            "what was done is kept"
        ) from error


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where a path leads, `~` and symbolic links followed: a link stays, and what it names is written or replaced.

    Raises:
        OSError: A link leads nowhere.
        ValueError: The path is empty.
    """
    if not os.fspath(path):
        raise ValueError("an output has no name: give one, or leave the option out if it has a default")
    path = Path(os.path.abspath(os.path.expanduser(path)))
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise OSError(f"{each} is a link to {os.readlink(each)}, which is not there: make that, or remove the link")
    return Path(os.path.realpath(path))


def check_free(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Makes sure, before hours of work, that :func:`staged` will be able to write to `path`.

    Raises:
        FileExistsError: Something would be lost, an empty folder aside, and `overwrite` is not set.
        OSError: The place cannot be renamed, nothing can be written beside it, or it is a link that leads nowhere.
    """
    path = resolved(path)
    if path.exists() and not overwrite and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty: choose another output, or pass --overwrite")
    if path.is_mount() or Path.cwd().is_relative_to(path):
        raise OSError(f"{path} cannot be replaced as a whole: name a folder inside it")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OSError(f"cannot write to {parent}: choose another output")


def check_file(path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """As :func:`check_free`, of what is to be a file: no folder is replaced by one, not even an empty one.

    Raises:
        OSError: There is a folder, or as above.
    """
    if resolved(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file, as one inside it")
    check_free(path, overwrite)


@contextlib.contextmanager
def staged(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary path to write a file or a folder to, which takes the name `path` when the context ends well.

    Raises:
        FileExistsError: `path` is there already, and `overwrite` is not set.
        OSError: It could not be written, for want of space for example; nothing is left behind.
    """
    check_free(path, overwrite)
    path = resolved(path)
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path.parent, glob.escape(path.name))
    room, handle = _new_room(path)
    try:
        yield room / path.name
        _open_to_readers(room / path.name)
        flush(room / path.name)
        if path.is_dir() or (path.exists() and (room / path.name).is_dir()):  # these a rename does not replace
            os.replace(path, room / OLD)
        os.replace(room / path.name, path)
        _sync(path.parent)
    except Exception as error:
        if getattr(error, "errno", None) or isinstance(error, SafetensorError) or type(error) is Exception:
            reason = " ".join(str(error).split())  # a bare Exception is what tokenizers raises when it cannot write
            raise OSError(f"cannot write {path} ({reason}): check the space and the rights there") from error
        raise
    finally:
        _discard(room, path)
        _unlock(handle)
        with contextlib.suppress(OSError):  # of folders, only those that are empty go
            for folder in created:
                folder.rmdir()


@contextlib.contextmanager
def rehearsed(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As :func:`staged`, but what was written is removed when the context ends, and `path` stays as it is."""
    with contextlib.suppress(_Rehearsed), staged(path, overwrite=True) as temporary:
        yield temporary
        raise _Rehearsed


class _Rehearsed(Exception):
    """All went well."""


def clear(folder: str | os.PathLike[str], names: str = "*") -> None:
    """Removes what killed writers have left in a folder, of files and folders whose names match a pattern."""
    for room in Path(folder).glob(f".*.*{SUFFIX}"):
        name = room.name[1:].removesuffix(SUFFIX).rpartition(".")[0]
        if not fnmatch.fnmatchcase(name, names) or not room.is_dir() or room.is_symlink():
            continue
        with contextlib.suppress(OSError):  # someone writes there, or was faster
            handle = _lock(room)
            _discard(room, room.parent / name)
            _unlock(handle)


@contextlib.contextmanager
def alone(file: str | os.PathLike[str], wait: bool = False) -> Iterator[bool]:
    """Whether this process has what a file stands for to itself, for the time of the context.

    The file is made, stays, and is empty. The lock on it, by `flock`, ends with its process, however that ends. Between
    machines it needs a file system that passes such locks on, as NFS does. Where there are none, each process has
    everything to itself: what they do may be done twice, and must not be harmed by it.

    Args:
        file: What all name who do the same.
        wait: Whether to wait for whoever has it.
    """
    file, own = Path(file), True
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab") as handle:  # NFS locks nothing that cannot be written to
        try:
            lock(handle.fileno(), wait)
        except BlockingIOError:
            own = False
        except OSError:
            pass  # there are no locks
        yield own


def lock(handle: int, wait: bool = False) -> None:
    """Locks an open file or folder until it is closed or the process ends; on Windows, nothing is locked.

    Args:
        handle: The open file.
        wait: Whether to wait for another process that has it.

    Raises:
        BlockingIOError: Another process has it.
        OSError: The file system has no locks.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file or a folder at once: what is killed meanwhile leaves something that :func:`clear` removes."""
    path = Path(path)
    room = path.with_name(f".{path.name}.removed{SUFFIX}")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    os.replace(path, room / "removed")
    shutil.rmtree(room)


def flush(path: str | os.PathLike[str]) -> None:
    """Has a file, or a folder with all that is in it, written to the disk, so that it survives a loss of power."""
    path = Path(path)
    for each in [*path.rglob("*"), path] if path.is_dir() else [path]:
        _sync(each)


def _open_to_readers(path: Path) -> None:
    """Gives files the rights that new ones have here: safetensors makes its own for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            each.chmod(each.stat().st_mode | 0o666 & ~mask)


def _sync(path: Path) -> None:
    if fcntl is None:
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _discard(room: Path, path: Path) -> None:
    """Removes a room, and puts back what it had been about to replace."""
    if not path.exists() and (room / OLD).exists():
        os.replace(room / OLD, path)
    shutil.rmtree(room, ignore_errors=True)


def _new_room(path: Path) -> tuple[Path, int | None]:
    """A room beside a path, and its lock, if the file system has locks."""
    while True:
        room, handle = Path(tempfile.mkdtemp(SUFFIX, f".{path.name}.", path.parent)), None
        try:
            handle = _lock(room)
        except BlockingIOError:
            continue  # someone who clears was faster, and took it for what a killed writer has left
        except OSError:
            pass
        if room.exists():
            return room, handle
        _unlock(handle)


def _lock(room: Path) -> int | None:
    """Raises OSError if another process has it."""
    if fcntl is None:
        return None
    handle = os.open(room, os.O_RDONLY)
    try:
        lock(handle)
    except OSError:
        os.close(handle)
        raise
    return handle


def _unlock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
