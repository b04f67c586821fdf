import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from plprune.io import atomic
from plprune.io.atomic import check_output, check_output_file, file_lock, remove, remove_leftovers, resolve_path, staged


def tree(folder: Path) -> dict[str, str]:
    """All that is in a folder, hidden files too."""
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "" for p in folder.rglob("*")}


def write_file(path: Path) -> None:
    path.write_text("new")


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "new").write_text("new")


WRITERS: list[Any] = [pytest.param(write_file, id="file"), pytest.param(write_folder, id="folder")]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_what_is_written_takes_the_place_of_all_that_was_there(
    tmp_path: Path, write: Callable[[Path], None], before: str
) -> None:
    path = tmp_path / "a" / "b"
    if before != "nothing":
        path.parent.mkdir()
        write_file(path) if before == "file" else write_folder(path)
        (path if before == "file" else path / "old").write_text("old")
    with staged(path, overwrite=True) as temporary:
        write(temporary)
    expected = tmp_path / "alone"
    write(expected)
    assert [p.name for p in path.parent.iterdir()] == ["b"]
    assert (tree(path), path.is_file()) == (tree(expected), expected.is_file())


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_a_fault_leaves_everything_as_it_was(
    tmp_path: Path, write: Callable[[Path], None], fault: type[BaseException]
) -> None:
    write_folder(tmp_path / "there")
    before = tree(tmp_path)
    for path in (tmp_path / "there", tmp_path / "not" / "there"):
        with pytest.raises(fault), staged(path, overwrite=True) as temporary:  # noqa: PT012
            write(temporary)
            raise fault
        assert tree(tmp_path) == before


def test_a_fault_in_the_last_step_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "there")
    before, replace = tree(tmp_path), os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == "there" and source.parent != tmp_path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"), staged(tmp_path / "there", overwrite=True) as temporary:
        write_folder(temporary)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "no space"), SafetensorError("no space"), Exception("no\nspace")])
def test_the_errors_of_all_writers_become_one_line_with_the_path(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match="no space") as raised, staged(tmp_path / "out"):
        raise error
    assert str(tmp_path / "out") in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_fault_of_the_caller_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path / "out"):
        raise KeyError("name")


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder")
    write_file(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(FileExistsError, match="--overwrite"):
            check_output(tmp_path / name)
        with pytest.raises(FileExistsError), staged(tmp_path / name):
            pass
        check_output(tmp_path / name, overwrite=True)
    check_output(tmp_path / "empty")
    check_output(tmp_path / "not" / "there")
    assert tree(tmp_path) == before


def test_a_place_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    write_file(tmp_path / "file")
    monkeypatch.chdir(tmp_path / "here")
    for path in (".", "..", tmp_path, "/"):  # replacing these would pull the ground from under the process
        with pytest.raises(OSError, match="name a folder inside"):
            check_output(path, overwrite=True)
    with pytest.raises(OSError, match="choose another output"):
        check_output(tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="choose another output"):
        check_output(tmp_path / "out")


def test_a_path_may_be_relative_and_have_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with staged("../there/../out") as temporary:
        write_folder(temporary)
    assert tree(tmp_path) == {"here": "", "out": "", "out/new": "new"}


# ---- killed writers


def half_write(path: Path, writing: Any) -> None:
    with staged(path, overwrite=True) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("half")
        writing.set()
        time.sleep(60)


@contextlib.contextmanager
def writer(path: Path) -> Iterator[BaseProcess]:
    """A process in the middle of its writing."""
    context = multiprocessing.get_context("fork")
    writing = context.Event()
    process = context.Process(target=half_write, args=(path, writing))
    process.start()
    try:
        assert writing.wait(30)
        yield process
    finally:
        process.kill()
        process.join()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    before = tree(tmp_path)
    with writer(tmp_path / "out") as process:
        process.kill()
        process.join()
        assert tree(tmp_path) != before
    with staged(tmp_path / "out", overwrite=True) as temporary:
        write_folder(temporary)
    assert tree(tmp_path) == before


def test_what_others_write_or_have_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.original").mkdir()
    (tmp_path / ".other.12345678.partial").mkdir()
    with writer(tmp_path / "out"):
        before = tree(tmp_path)
        remove_leftovers(tmp_path, "out")
        assert tree(tmp_path) == before
    remove_leftovers(tmp_path, "o*")
    assert tree(tmp_path) == {".out.original": ""}


def test_a_writer_killed_between_its_renames_loses_nothing(tmp_path: Path) -> None:
    room = tmp_path / ".out.12345678.partial"
    room.mkdir()
    write_folder(room / "old")
    remove_leftovers(tmp_path)
    assert tree(tmp_path) == {"out": "", "out/new": "new"}


@pytest.mark.parametrize("write", WRITERS)
def test_removing_leaves_nothing(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "out")
    (tmp_path / ".out.removed.partial").mkdir()  # an earlier attempt
    remove(tmp_path / "out")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("write", WRITERS)
def test_all_is_flushed_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    flushed: list[str] = []

    def fsync(file: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{file}"))
        assert (tmp_path / "out").exists() == (flushed[-1] == str(tmp_path))

    monkeypatch.setattr(os, "fsync", fsync)
    with staged(tmp_path / "out") as temporary:
        write(temporary)
    assert {Path(name).name for name in flushed} >= {"out", tmp_path.name}
    assert len(flushed) == (3 if write is write_folder else 2)


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "disk").mkdir()
    write_folder(tmp_path / "disk" / "there")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "there")
    (tmp_path / "inside").symlink_to(tmp_path / "disk")
    for path, target in (("link", "there"), ("inside/other", "other")):
        with staged(tmp_path / path, overwrite=True) as temporary:
            assert temporary.parent.parent == tmp_path / "disk"
            write(temporary)
        write(expected := tmp_path / f"alone {target}")
        assert tree(tmp_path / "disk" / target) == tree(expected)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["other", "there"]


@pytest.mark.parametrize("path", ["link", "link/inside"])
def test_a_link_to_nothing_is_refused_before_any_work(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match=r"link links to .*gone, which does not exist"):
        check_output(tmp_path / path, overwrite=True)
    assert not (tmp_path / "gone").exists()


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/out") == tmp_path / "out"
    with staged("~/out") as temporary:
        write_file(temporary)
    assert tree(tmp_path) == {"out": "new"}


def test_a_file_takes_the_place_of_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    check_output(tmp_path / "there")
    with pytest.raises(IsADirectoryError, match="there is a folder: name a file"):
        check_output_file(tmp_path / "there", overwrite=True)
    check_output_file(tmp_path / "there" / "file")


def test_an_output_without_a_name() -> None:
    with pytest.raises(ValueError, match="the output path is empty"):
        resolve_path("")


def test_what_one_has_alone_others_leave_or_wait_for(tmp_path: Path) -> None:
    file = tmp_path / "locks" / "a"
    with file_lock(file) as own, file_lock(file) as others, file_lock(tmp_path / "b") as another:
        assert (own, others, another) == (True, False, True)
    with file_lock(file, wait=True) as own:
        assert own
    assert file.read_bytes() == b""


def test_what_a_killed_process_had_alone_is_free(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe(duplex=False)

    def keep() -> None:
        with file_lock(tmp_path / "a"):
            there.send(None)
            time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=keep)
    child.start()
    here.recv()
    with file_lock(tmp_path / "a") as own:
        assert not own
    threading.Timer(0.05, child.kill).start()
    with file_lock(tmp_path / "a", wait=True) as own:
        assert own


def test_a_room_that_is_cleared_as_it_begins_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, cleared = atomic._lock_folder, []

    def late(room: Path) -> int | None:
        if not cleared:
            cleared.append(room)
            remove_leftovers(tmp_path)
        return lock(room)

    monkeypatch.setattr(atomic, "_lock_folder", late)
    with staged(tmp_path / "a") as temporary:
        write_file(temporary)
    assert cleared
    assert tree(tmp_path) == {"a": "new"}
