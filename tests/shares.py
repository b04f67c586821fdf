"""How the tests are shared out between processes."""

import re
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

ALONE = ("notebooks.py", "readme.py", "real_export.py")  # tests that take minutes and share nothing


class Shares(LoadFileScheduling):
    """A file stays in one process, with its fixtures; one about pairs of families and methods is shared out."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # tests/conftest.py has put the files in order

    def _split_scope(self, nodeid: str) -> str:
        file, _, case = nodeid.partition("[")
        if file.partition("::")[0].endswith(ALONE):
            return nodeid
        file = file.partition("::")[0]
        return f"{file} {re.split('[-/]', case)[0]}" if file.endswith(("contract.py", "estimate.py")) else file
