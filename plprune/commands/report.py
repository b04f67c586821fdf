"""`plprune report`: a page of what a run has done so far."""

from pathlib import Path

from plprune.io.atomic import check_output_file
from plprune.report import NAME, check_ours, write
from plprune.report.found import found
from plprune.report.page import at


def report(folder: str, output: str | None = None, overwrite: bool = False) -> None:
    """Makes a report of what is in the folder of a run, a model or a comparison.

    Args:
        folder: The folder, in which a run may still be going; or a JSON file that plprune has written.
        output: HTML file to write, with its JSON beside it; `report.html` in the folder, or `NAME-report.html` beside
            a file `NAME.json`, if not given.
        overwrite: Whether to replace the output.
    """
    record = found(folder)
    page = Path(output).expanduser() if output is not None else _beside(Path(folder))
    if page.suffix != ".html":
        raise ValueError(f"the output is {page}, but a report is a file whose name ends in .html")
    if output is not None:
        check_output_file(page, overwrite)
    else:
        check_ours(page)
    write(record, page, overwrite=overwrite or output is None)
    print(f"{told(record)}saved to {page}")


def _beside(place: Path) -> Path:
    """The page of a folder or a file, whose JSON does not take the place of the file."""
    return place / NAME if place.is_dir() else place.with_name(f"{place.stem}-report.html")


def told(record: dict[str, object]) -> str:
    """What to know first of a run that has not ended."""
    status, progress = record.get("status"), at(record, "progress")
    steps = f" at step {progress['step']} of {progress['steps']}" if {"step", "steps"} <= progress.keys() else ""
    if status == "running":
        return f"the run is still going{steps}, and the report has what there is so far; "
    if status == "stopped":
        reason = f" ({record['reason']})" if record.get("reason") else ""
        return f"the run was stopped{steps}{reason}, and the report has what there is; "
    return ""
