"""`plprune report`: a page of what a run has done so far."""

from pathlib import Path

from plprune.atomic import check_free
from plprune.report import NAME, check_ours, write
from plprune.report.found import found


def report(folder: str, output: str | None = None, overwrite: bool = False) -> None:
    """Makes a report of what is in the folder of a run, a model or a comparison.

    Args:
        folder: The folder, in which a run may still be going; or a JSON file that plprune has written.
        output: HTML file to write, with its JSON beside it; `report.html` in the folder if not given.
        overwrite: Whether to replace the output.
    """
    place = Path(folder)
    page = Path(output) if output else (place / NAME if place.is_dir() else place.with_suffix(".html"))
    if page.suffix != ".html":
        raise ValueError(f"the output is {page}, but a report is a file whose name ends in .html")
    if output:
        check_free(page, overwrite)
    else:
        check_ours(page)
    record = found(folder)
    write(record, page, overwrite=overwrite or not output)
    print(f"{told(record)}saved to {page}")


def told(record: dict[str, object]) -> str:
    """What to know first of a run that has not ended."""
    status, progress = record.get("status"), record.get("progress") or {}
    steps = f" at step {progress['step']} of {progress['steps']}" if isinstance(progress, dict) and progress else ""
    if status == "running":
        return f"the run is still going{steps}, and the report has what there is so far; "
    if status == "stopped":
        reason = f" ({record['reason']})" if record.get("reason") else ""
        return f"the run was stopped{steps}{reason}, and the report has what there is; "
    return ""
