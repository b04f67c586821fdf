"""The results in the repository: the page shows the table of every JSON file, and refers to no other."""

import json
import re
from pathlib import Path

import pytest

from plprune import report
from plprune.comparison.table import comparison_table

FOLDER = Path(__file__).parents[2] / "configs/compare"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
RESULTS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (FOLDER / "results").iterdir()}


def test_the_page_links_to_every_result() -> None:
    links = set(re.findall(r"\]\(results/([^)]+)\)", PAGE))
    assert links == RESULTS.keys()
    assert links


@pytest.mark.parametrize("name", RESULTS)
def test_the_page_has_the_table_of_a_result(name: str) -> None:
    record = RESULTS[name]
    assert record["status"] == "finished"
    assert comparison_table(record) in PAGE
    assert "<html" in report.html(record)
