"""The order of the modules: imports point down the page, and only the top knows Lightning."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import plprune

ROOT = Path(plprune.__file__).parent
# Top to bottom. A package imports from those below it; in a package, a module from those in the lines below its own.
ORDER = {
    "": [["__init__", "__main__"]],
    "cli": [],
    "commands": [["compare", "evaluate", "export", "plan", "prune", "report", "sensitivity"], ["options"]],
    "comparison": [["engine"], ["bench", "table"], ["study"]],
    "training": [
        ["lightning_cli"],
        ["callbacks"],
        ["recipes", "rounds"],
        ["resume"],
        ["checkpointing", "module"],
        [
            "checkpoint_files",
            "console",
            "data",
            "foreign_callbacks",
            "objective",
            "optimisation",
            "preemption",
            "round_schedule",
            "strategies",
            "throughput",
            "watchdog",
        ],
        ["compilation", "deepspeed_internals", "lightning_internals", "random_states", "run_identity"],
    ],
    # the Lightning line
    "streaming": [],
    "report": [["comparison", "sensitivity"], ["records", "run", "summary"], ["page"], ["charts", "samples"], ["svg"]],
    "methods": [["best_of", "cfsp", "fasp", "flap", "learned_gates", "reap", "run", "two_ssp"], ["base"]],
    "export": [
        ["formats"],
        ["gguf", "parity"],
        [
            "architectures",
            "decilm",
            "delta",
            "gemma4",
            "latent",
            "llama_cpp",
            "quantiser",
            "vllm_reading",
            "vocabulary",
        ],
        ["mixtures"],
        ["configuration_decilm"],
    ],
    "evaluation": [["lm_eval", "measurement", "sensitivity"], ["perplexity", "speed", "task_results"], ["standalone"]],
    "recovery": [["lora", "whole_weights"], ["consumers", "distillation", "full", "routers"], ["masters"]],
    "checkpoint": [
        ["save"],
        ["load"],
        ["remote_code"],
        ["locate"],
        ["stored"],
        ["weights"],
        ["model_card", "published", "sharing", "stock_config"],
    ],
    "planning": [["whole_experts"], ["structures"], ["extremes", "needs", "targets"], ["hardware", "serving", "sizes"]],
    "pruning": [
        ["attention_search", "observations", "plan_summary", "repair"],
        ["stream"],
        ["block_sources"],
        ["gate_training", "reconstruction"],
        ["losses", "surgery"],
        ["allocation", "calibration", "expert_inputs", "forward", "model_state"],
        ["constraints", "descent", "journal", "plan", "statistics"],
        ["hidden_states"],
    ],
    "architecture": [
        ["config_keys"],
        ["blocks", "depth", "head"],
        ["discovery"],
        ["experts", "proof", "tracing"],
        ["trials"],
        ["cutting", "probing"],
        ["anatomy", "attached", "wrappers"],
        ["modules"],
        ["modeling_plprune"],
    ],
    "io": [
        ["text"],
        ["cache", "progress", "readers"],
        ["atomic", "chats", "checks", "distributed", "state", "tables", "units"],
    ],
}
LINE = "training"  # the lowest package that knows Lightning
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
every_file = pytest.mark.parametrize("path", TREES, ids=str)


def package(path: Path) -> str:
    """The package of a file; of one that is directly in plprune, the module's name."""
    name = path.parts[0].removesuffix(".py")
    return "" if name.startswith("__") else name


def module(path: Path) -> str:
    """The name of a file in its package; a package within it counts as one module."""
    return path.parts[min(1, len(path.parts) - 1)].removesuffix(".py")


def height(path: Path) -> tuple[int, int]:
    """How far down a file is: its package, and its line in that."""
    names, lines = list(ORDER), ORDER.get(package(path), [])
    assert package(path) in names, f"{package(path)} has no place in the order of the packages: give it one"
    at = [i for i, line in enumerate(lines) if module(path) in line]
    top = module(path) == "__init__" or not lines
    assert at or top, f"{path} has no place in the order of the modules of {package(path)}: give it one"
    return names.index(package(path)), at[0] if at else -1


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> Path:
    """The file with what a dotted name stands for."""
    parts = name.split(".")[1:]
    places = [Path(*parts[:n]) for n in range(len(parts), 0, -1)]
    files = [file for place in places for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")]
    return next((file for file in files if file in TREES), Path("__init__.py"))


def own(path: Path) -> set[Path]:
    """The files of plprune that a file imports from."""
    return {file_of(name) for name in imports(path) if name.startswith("plprune.")} - {path}


@every_file
def test_imports_point_down(path: Path) -> None:
    for other in own(path):
        if package(other) != package(path):
            assert height(other)[0] > height(path)[0], f"{path} imports from {other}"
        elif module(other) != module(path):
            assert height(other)[1] > height(path)[1], f"{path} imports from {other}"


def test_there_are_no_cycles() -> None:
    graph = {path: own(path) for path in TREES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_the_front_is_small() -> None:
    names = {path.parts[0] for path in TREES}
    folders = {name for name in names if not name.endswith(".py")}
    assert len(folders) <= 14
    assert len(names - folders) <= 6


@every_file
def test_nothing_below_the_line_knows_lightning(path: Path) -> None:
    lightning = {name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert not lightning or list(ORDER).index(package(path)) <= list(ORDER).index(LINE)


@every_file
def test_no_method_sees_another(path: Path) -> None:
    others = {name.split(".")[2] for name in imports(path) if name.startswith("plprune.methods.")} - {"base"}
    assert not others or path.name == "__init__.py" or package(path) != "methods"


@every_file
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            text = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - len(text.splitlines()) <= 50, node.name


@every_file
def test_only_the_edge_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert (
        package(path) in ("cli", "commands")
        or module(path) in ("callbacks", "lightning_cli")
        or not any(isinstance(f, ast.Name) and f.id == "print" for f in calls)
    )
