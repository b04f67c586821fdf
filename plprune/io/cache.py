"""Results on disk, under the content of what they were made from: what was computed once is not computed again."""

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


class Cache:
    """A folder of results, one JSON file each; a file is there whole or not at all.

    Args:
        folder: Where; it is made when the first result is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, of: dict[str, Any], compute: Callable[[], T]) -> T:
        """A result, computed unless it is here.

        Args:
            of: Everything that the result depends on, in JSON's types.
            compute: Makes it, in JSON's types.
        """
        file = self.file(of)
        if not file.exists():
            self._keep(file, of, compute())
        return json.loads(file.read_text())["result"]

    def has(self, of: dict[str, Any]) -> bool:
        """Whether a result is here."""
        return self.file(of).exists()

    def lock(self, of: dict[str, Any], wait: bool = False) -> AbstractContextManager[bool]:
        """Whether this process alone computes something, for the time of the context: the others leave it, or wait.

        Args:
            of: What they know it by.
            wait: Whether to wait for whoever is at it, who may have kept the result then.
        """
        return file_lock(self.folder / "locks" / digest(of), wait)

    def file(self, of: dict[str, Any]) -> Path:
        """Where a result is, or would be."""
        return self.folder / f"{digest(of)}.json"

    def _keep(self, file: Path, of: dict[str, Any], result: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with staged(file, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": of, "result": result}, indent=1) + "\n")


def digest(of: dict[str, Any]) -> str:
    """A short hash of values in JSON's types, whatever the order of keys.

    Example:
        >>> digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


def source_digest(*names: str) -> str:
    """A short hash of the source of modules, and of all that they import from beside them.

    What is beside a module is in the same package, or in the same folder if that is not one of installed packages:
    these have versions.

    Args:
        names: Of modules that can be imported.

    Raises:
        ValueError: A module is not written in a file.
    """
    found: dict[str, str] = {}
    for name in names:
        module, (top, *rest) = importlib.import_module(name), name.split(".")
        written = getattr(module, "__file__", None)  # which a notebook has not
        if not written:
            raise ValueError(f"{name} is not written in a file, so no result of it can be kept: put it into a module")
        file = Path(written)
        root = file.parents[len(rest) + (file.stem == "__init__")]
        installed = root.name in ("site-packages", "dist-packages")
        _collect(file, root, root / top if installed or top == "plprune" else root, found)
    return digest(found)


def _collect(file: Path, root: Path, within: Path, found: dict[str, str]) -> None:
    """Adds a file, and those that it imports from below a folder, by their places below the root."""
    place = file.relative_to(root).as_posix()
    if place in found:
        return
    found[place] = file.read_text(encoding="utf-8")
    for names in _imported(found[place], tuple(place.removesuffix(".py").split("/"))):
        bare = [root.joinpath(*name) for name in names]
        paths = [path for each in bare for path in (each / "__init__.py", each.with_name(f"{each.name}.py"))]
        there = next((path for path in paths if path.is_file() and path.is_relative_to(within)), None)
        if there is not None:
            _collect(there, root, within, found)


@functools.lru_cache(maxsize=256)
def _imported(source: str, place: tuple[str, ...]) -> list[list[tuple[str, ...]]]:
    """What a module at a place imports, by the parts of its name: what is named within a module, or else the module."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [[tuple(each.name.split("."))] for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            near = place[: len(place) - node.level] if node.level else ()
            base = near + tuple(node.module.split(".") if node.module else ())
            found += [[each for each in ((*base, alias.name), base) if each] for alias in node.names]
    return found
