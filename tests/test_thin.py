"""helpers.py can be read in one sitting: its length, its parts and its words are held here."""

import ast
import inspect
import itertools

import pytest

import helpers

LINES = (helpers.ROOT / "helpers.py").read_text().splitlines()
TREE = ast.parse("\n".join(LINES))
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
PUBLIC = [node for node in TREE.body if hasattr(node, "name") and not node.name.startswith("_")]


def test_the_module_grows_no_further():
    assert len(LINES) <= 1863


def test_no_section_has_more_than_300_lines():
    starts = [number for number, line in enumerate(LINES) if line.startswith("# ----------")]
    sections = {LINES[a]: b - a for a, b in itertools.pairwise([0, *starts, len(LINES)])}
    assert len(sections) >= 9 and {title: count for title, count in sections.items() if count > 300} == {}


def test_no_function_has_more_than_40_lines_and_the_training_loop_at_most_90():
    lengths = {(node.name, node.lineno): node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert {name: n for name, n in lengths.items() if n > (90 if name[0] == "_train" else 40)} == {}


def test_it_is_the_only_module():
    assert [*helpers.ROOT.glob("*.py")] == [helpers.ROOT / "helpers.py"]


@pytest.mark.parametrize("node", PUBLIC, ids=lambda node: node.name)
def test_what_is_public_has_a_docstring_and_annotations(node):
    """Of a method, one of its own or of a parent's, or its name in that of the class or of a parent."""
    assert ast.get_docstring(node)
    functions = [one for one in (node, *node.body) if one in FUNCTIONS and not one.name.startswith("_")]
    for function in functions:
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        assert all(arg.annotation or arg.arg in ("self", "cls") for arg in given), function.name
    for method in functions if isinstance(node, ast.ClassDef) else ():
        parents = getattr(helpers, node.name).__mro__
        said = any(f"`{method.name}`" in (parent.__doc__ or "") for parent in parents)
        assert said or inspect.getdoc(getattr(parents[0], method.name)), method.name
