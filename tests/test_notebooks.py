"""The notebooks are kept without outputs, and run from the first cell to the last, with smaller numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import builders
from tests.shared import needs_smollm2

FOLDER = Path(__file__).parents[1] / "notebooks"
PLAIN = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# What makes a notebook small; none of these is what the notebook shows.
SMALL: dict[str, dict[str, Any]] = {
    "quickstart": {
        "NUM_SAMPLES": 4,
        "SEQ_LEN": 64,
        "STEPS": 3,
        "BATCH": 1,
        "MAX_WINDOWS": 2,
        "SPEED_ROUNDS": 1,
    },
    "methods": {"NUM_SAMPLES": 4, "SEQ_LEN": 64, "STAGE2_TOKENS": 32},
    "bring_your_own_method": {
        "NUM_SAMPLES": 2,
        "SEQ_LEN": 64,
        "MAX_WINDOWS": 2,
        "SPARSITIES": [0.2],
        "FAMILIES": "gpt_neox",
    },
}
every_notebook = pytest.mark.parametrize("name", SMALL)


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def settings(notebook: dict[str, Any]) -> dict[str, Any]:
    """The first cell of code, which holds the numbers that decide how long it takes."""
    return code(notebook)[0]


def shrunk(notebook: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """A notebook with other numbers in its settings, and nothing else changed."""
    cell = settings(notebook)
    text = "".join(cell["source"])
    for name, number in numbers.items():
        text, found = re.subn(
            rf'^{name} = (\d+\b|"[^"]*"|\[[^]]*\])', f"{name} = {json.dumps(number)}", text, flags=re.M
        )
        assert found == 1, name
    cell["source"] = text
    return notebook


def test_every_notebook_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@every_notebook
def test_outputs_are_stripped_and_nothing_of_a_machine_is_kept(name: str) -> None:
    notebook = read(name)
    assert notebook["metadata"] == PLAIN
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code(notebook))
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert not re.search(r"(?<![\w:/])/(home|root|work|Users|tmp|mnt)/|[A-Z]:\\\\", json.dumps(notebook["cells"]))


@every_notebook
def test_it_begins_with_what_it_shows_how_long_it_takes_and_what_it_needs(name: str) -> None:
    notebook = read(name)
    first = "".join(notebook["cells"][0]["source"])
    assert first.startswith("# ")
    assert re.search(r"\*\*Time\*\*: .*minutes", first)
    assert re.search(r"\*\*Needs\*\*: .*'\.\[export,notebooks[],]", first)
    assert shrunk(notebook, SMALL[name])["cells"][0] == read(name)["cells"][0]


@pytest.mark.slow
@needs_smollm2
@every_notebook
def test_it_runs_from_the_first_cell_to_the_last(name: str, tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    notebook = nbformat.reads(json.dumps(shrunk(read(name), SMALL[name])), as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(cell["execution_count"] for cell in code(notebook))


def test_the_contract_battery_takes_a_method_by_its_dotted_path(monkeypatch) -> None:
    monkeypatch.setattr(builders, "EVERY", {})
    monkeypatch.setattr(builders, "OWN", [])
    builders.judge_only("plprune.methods.cfsp.CFSP")
    assert builders.OWN == ["CFSP"]
    assert builders.method("CFSP", 0.3).sparsity == 0.3


@pytest.mark.parametrize(
    ("path", "message"),
    [("no_such_module.Method", "cannot import no_such_module"), ("plprune.methods.Norms", "is not a subclass")],
)
def test_the_contract_battery_refuses_what_is_no_method(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        builders.judge_only(path)
