"""A cache of results on disk, keyed by everything that a result depends on, the source code included."""

import ast
import functools
import hashlib
import importlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from plprune.io.atomic import file_lock, staged

T = TypeVar("T")
Key = dict[str, Any]  # everything that a result depends on, in JSON's types


class Cache:
    """A folder with one JSON file per result."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: Key, compute: Callable[[], T]) -> T:
        """The result for a key; on a miss, the value of `compute`, in JSON's types, is stored and returned."""
        file = self.file(key)
        if not file.exists():
            result = compute()
            with staged(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps({"of": key, "result": result}, indent=1) + "\n")
        return json.loads(file.read_text())["result"]

    def has(self, key: Key) -> bool:
        """Whether a result is stored."""
        return self.file(key).exists()

    def lock(self, key: Key, wait: bool = False) -> AbstractContextManager[bool]:
        """Holds the lock on a key during the context, and yields whether this process got it.

        With `wait` it always does, perhaps after another process that has stored the result.
        """
        return file_lock(self.folder / "locks" / digest(key), wait)

    def file(self, key: Key) -> Path:
        """The file of a result, stored or not."""
        return self.folder / f"{digest(key)}.json"


def digest(key: Key) -> str:
    """A short hash of a dictionary, whatever the order of its keys.

    Example:
        >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def source_digest(*names: str) -> str:
    """A short hash of the source of importable modules and of everything that they import from their neighbours.

    Neighbours are the modules of the same package or, unless the module is installed in site-packages, of the same
    folder. Installed packages count by their versions, which are part of the caller's key.

    Raises:
        ValueError: A module has no source file.
    """
    sources: dict[str, str] = {}
    for name in names:
        module, (top, *rest) = importlib.import_module(name), name.split(".")
        written = getattr(module, "__file__", None)  # a notebook has none
        if not written:
            raise ValueError(f"{name} has no source file, so its results cannot be cached: put it into a module")
        file = Path(written)
        root = file.parents[len(rest) + (file.stem == "__init__")]
        installed = root.name in ("site-packages", "dist-packages")
        _collect(file, root, root / top if installed or top == "plprune" else root, sources)
    return digest(sources)


def _collect(file: Path, root: Path, within: Path, sources: dict[str, str]) -> None:
    """Adds the source of a file, and of everything that it imports from the folder `within`, by path from the root."""
    place = file.relative_to(root).as_posix()
    if place in sources:
        return
    sources[place] = file.read_text(encoding="utf-8")
    for names in _imports(sources[place], tuple(place.removesuffix(".py").split("/"))):
        bare = [root.joinpath(*name) for name in names]
        paths = [path for each in bare for path in (each / "__init__.py", each.with_name(f"{each.name}.py"))]
        imported = next((path for path in paths if path.is_file() and path.is_relative_to(within)), None)
        if imported is not None:
            _collect(imported, root, within, sources)


@functools.lru_cache(maxsize=256)
def _imports(source: str, place: tuple[str, ...]) -> list[list[tuple[str, ...]]]:
    """The imports of a module, as parts of dotted names: for `from a import b`, a.b, or else a."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [[tuple(each.name.split("."))] for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            near = place[: len(place) - node.level] if node.level else ()
            base = near + tuple(node.module.split(".") if node.module else ())
            found += [[each for each in ((*base, alias.name), base) if each] for alias in node.names]
    return found
