"""The tests themselves: each asserts something, and no assertion holds whatever happens."""

import ast
from pathlib import Path

HERE = Path(__file__).parent
FILES = {str(path.relative_to(HERE)): ast.parse(path.read_text()) for path in sorted(HERE.rglob("*.py"))}
BY_OTHERS = {"raises", "fail", "assert_close"}
CALLS_ONLY = {"test_a_text_that_may_be_there_is_not_refused"}  # what is not refused says nothing


def called(node: ast.AST) -> set[str]:
    """The last parts of the names of all that is called."""
    calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    named = [each for each in calls if isinstance(each, ast.Name | ast.Attribute)]
    return {each.id if isinstance(each, ast.Name) else each.attr for each in named}


def test_no_assertion_holds_whatever_happens() -> None:
    wrong = []
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                parts = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
                always = (ast.IfExp, ast.Tuple, ast.List, ast.Constant, ast.GeneratorExp, ast.ListComp, ast.JoinedStr)
                wrong += [f"{name}:{node.lineno}" for part in parts if isinstance(part, always)]
    assert not wrong, "say `kind = a if b else c` first, and assert one comparison"


def test_every_test_asserts() -> None:
    functions = [node for tree in FILES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    asserting = {each.name for each in functions if any(isinstance(node, ast.Assert) for node in ast.walk(each))}
    asserting |= BY_OTHERS
    calls = [(each.name, called(each)) for each in functions]
    while more := {name for name, names in calls if names & asserting} - asserting:
        asserting |= more
    tests = {each.name for each in functions if each.name.startswith("test_")}
    assert len(tests) > 500
    assert tests - asserting == CALLS_ONLY
