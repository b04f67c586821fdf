"""Results on disk: found by all that they depend on, and by nothing else."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from plprune.io.cache import Cache, digest, source_digest


def never() -> Any:
    pytest.fail("computed again")


def test_a_result_is_computed_once(tmp_path: Path) -> None:
    cache, of = Cache(tmp_path / "made" / "later"), {"text": "a", "sizes": [1, 2]}
    assert not cache.has(of)
    assert cache.get(of, lambda: {"loss": [0.5, None]}) == {"loss": [0.5, None]}
    assert cache.has(of)
    assert Cache(cache.folder).get({"sizes": [1, 2], "text": "a"}, never) == {"loss": [0.5, None]}
    assert json.loads(cache.file(of).read_text())["of"] == of


@pytest.mark.parametrize("other", [{"a": 2}, {"a": "1"}, {"a": 1, "b": None}, {"b": 1}, {"a": [1]}])
def test_another_key_is_another_result(other: dict[str, Any], tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    assert cache.get({"a": 1}, lambda: "one") == "one"
    assert not cache.has(other)
    assert cache.get(other, lambda: "other") == "other"
    assert cache.get({"a": 1}, never) == "one"


def test_what_fails_or_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with pytest.raises(ZeroDivisionError):
        cache.get({"a": 1}, lambda: 1 / 0)
    with pytest.raises(TypeError):
        cache.get({"a": 1}, lambda: {1, 2})
    assert not cache.has({"a": 1})
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".json"] == []
    assert cache.get({"a": 1}, lambda: "whole") == "whole"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of which `kept.first` imports by every form, further modules by further ones, and one not at all."""
    folder = tmp_path / "kept"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "first.py").write_text("import json\nimport kept.plain\nfrom kept import named\nfrom .near import x\n")
    (folder / "near.py").write_text("def x():\n    from kept.inner import late\n    from .first import y\n")
    (folder / "plain.py").write_text("")
    (folder / "named.py").write_text("")
    (folder / "inner" / "__init__.py").write_text("from . import deep\n")
    (folder / "inner" / "late.py").write_text("")
    (folder / "inner" / "deep.py").write_text("")
    (folder / "apart.py").write_text("from kept import first\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == folder.name]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["first", "near", "plain", "named", "inner/late"])
def test_a_change_in_what_is_imported_is_seen(name: str, package: Path) -> None:
    before = source_digest("kept.plain", "kept.near")
    assert source_digest("kept.plain", "kept.near") == before
    (package / f"{name}.py").write_text((package / f"{name}.py").read_text() + "# another\n")
    assert source_digest("kept.plain", "kept.near") != before


def test_a_change_elsewhere_is_not(package: Path) -> None:
    before = source_digest("kept.near")
    (package / "apart.py").write_text("# another\n")
    assert source_digest("kept.near") == before
    assert source_digest("kept.plain") != source_digest("kept.named")  # by their places, as their text is the same


def test_what_is_in_no_file_has_no_source() -> None:
    with pytest.raises(ValueError, match="builtins has no source file, so its results cannot be cached"):
        source_digest("builtins")


def test_a_digest_is_short_and_of_the_values() -> None:
    assert digest({"b": 1, "a": {"d": 2, "c": 3}}) == digest({"a": {"c": 3, "d": 2}, "b": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert len(digest({})) == 16
