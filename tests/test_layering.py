"""The order of the modules: imports point down the page, and only the top knows Lightning."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import plprune

ROOT = Path(plprune.__file__).parent
TIERS = [
    {"__init__", "__main__"},
    {
        "cli",
        "commands",
        "compare",
        "callbacks",
        "checkpointing",
        "recovery",
        "data",
        "strategies",
        "watch",
        "live",
        "rounds",
        "resuming",
        "lightning_internals",
    },
    # the Lightning line
    {
        "methods",
        "lora",
        "consumers",
        "distillation",
        "losses",
        "checkpoint",
        "hf",
        "weights",
        "card",
        "evaluation",
        "text",
        "chats",
        "export",
        "report",
        "charts",
        "tasks",
        "speed",
        "estimate",
        "sensitivity",
        "streaming",
        "stored",
    },
    {"calibration", "running", "survey", "surgery", "repair"},
    {
        "anatomy",
        "plan",
        "allocation",
        "stats",
        "atomic",
        "cache",
        "processes",
        "journal",
        "progress",
        "modeling_plprune",
        "serving",
        "tables",
        "deepspeed_internals",
    },
]
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
every_file = pytest.mark.parametrize("path", TREES, ids=str)


def module(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def tier(name: str) -> int:
    places = [i for i, names in enumerate(TIERS) if name in names]
    assert places, f"{name} has no place in the order of the modules: give it one"
    return places[0]


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


def own(path: Path) -> set[str]:
    """The modules of plprune that a file imports."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("plprune.")}
    return {name for name in names if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()} - {module(path)}


@every_file
def test_imports_point_down_or_sideways(path: Path) -> None:
    assert all(tier(name) >= tier(module(path)) for name in own(path)), own(path)


def test_there_are_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in TREES:
        graph.setdefault(module(path), set()).update(own(path))
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@every_file
def test_nothing_below_the_line_knows_lightning(path: Path) -> None:
    lightning = {name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert not lightning or tier(module(path)) < 2


@every_file
def test_no_method_sees_another(path: Path) -> None:
    others = {name.split(".")[2] for name in imports(path) if name.startswith("plprune.methods.")} - {"base"}
    assert not others or path.name == "__init__.py" or module(path) != "methods"


@every_file
def test_functions_are_short(path: Path) -> None:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef) and node.end_lineno:
            text = ast.get_docstring(node, clean=False) or ""
            assert node.end_lineno - node.lineno + 1 - len(text.splitlines()) <= 50, node.name


@every_file
def test_only_the_edge_prints(path: Path) -> None:
    calls = [node.func for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert module(path) in ("cli", "commands", "callbacks") or not any(
        isinstance(f, ast.Name) and f.id == "print" for f in calls
    )
