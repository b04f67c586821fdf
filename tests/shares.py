"""How the tests are shared out between processes."""

import re

from xdist.scheduler import LoadFileScheduling


class Shares(LoadFileScheduling):
    """A file stays in one process, with its fixtures; one about pairs of families and methods is shared out."""

    def _split_scope(self, nodeid: str) -> str:
        file, _, case = nodeid.partition("[")
        file = file.partition("::")[0]
        return f"{file} {re.split('[-/]', case)[0]}" if file.endswith(("contract.py", "estimate.py")) else file
