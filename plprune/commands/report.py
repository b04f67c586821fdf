"""`plprune report`: writes an HTML page about a run, a model or a comparison."""

from pathlib import Path

from plprune.commands.options import shared_help
from plprune.io.atomic import check_output_file
from plprune.report import NAME, check_replaceable, write
from plprune.report.page import at
from plprune.report.records import collect


@shared_help
def report(folder: str, output: str | None = None, overwrite: bool = False) -> None:
    """Writes an HTML page about a run, a model or a comparison.

    Args:
        folder: The folder of a run, finished or not, of a model or of a comparison; or a JSON file that plprune wrote.
        output: HTML file to write, with its JSON beside it. If not given, `report.html` in the folder, or
            `NAME-report.html` beside a file `NAME.json`.
    """
    record = collect(folder)
    page = Path(output).expanduser() if output is not None else _beside(Path(folder))
    if page.suffix != ".html":
        raise ValueError(f"the output is {page}, but a report is a file whose name ends in .html")
    if output is not None:
        check_output_file(page, overwrite)
    else:
        check_replaceable(page)
    write(record, page, overwrite=overwrite or output is None)
    print(f"{_note(record)}saved to {page}")


def _beside(place: Path) -> Path:
    """The default page of a folder or a JSON file; its own JSON does not replace that file."""
    return place / NAME if place.is_dir() else place.with_name(f"{place.stem}-report.html")


def _note(record: dict[str, object]) -> str:
    """A note about a run that has not finished; empty for all else."""
    status, progress = record.get("status"), at(record, "progress")
    steps = f" at step {progress['step']} of {progress['steps']}" if {"step", "steps"} <= progress.keys() else ""
    if status == "running":
        return f"the run is still going{steps}: the report shows it so far; "
    if status == "stopped":
        reason = f" ({record['reason']})" if record.get("reason") else ""
        return f"the run was stopped{steps}{reason}: the report shows what it did; "
    return ""
