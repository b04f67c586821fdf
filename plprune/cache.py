"""Results on disk, under the content of what they were made from: what was computed once is not computed again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from plprune.atomic import staged

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

    def known(self, of: dict[str, Any]) -> bool:
        """Whether a result is here."""
        return self.file(of).exists()

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
