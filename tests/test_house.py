"""What keeps the house easy to enter: sizes and forms, read from the source. Raise no bound; split what outgrows it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import eos_monitor

PACKAGE = Path(eos_monitor.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

MOST_LINES = 400
LONGEST_BODY = 50
MOST_PARAMETERS = 12
MOST_PAIRS = 10  # statements that set unrelated things at once, in the whole package


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first, *rest = function.body
    documented = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    body = rest if documented else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def pairs(tree: ast.AST) -> list[str]:
    """Assignments of several values to several targets, written side by side; to swap two names is none."""

    def swap(node: ast.Assign) -> bool:
        assert isinstance(node.targets[0], ast.Tuple)
        assert isinstance(node.value, ast.Tuple)
        return {ast.unparse(e) for e in node.targets[0].elts} == {ast.unparse(e) for e in node.value.elts}

    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
        and not swap(node)
    ]


def late_attributes(cls: ast.ClassDef) -> set[str]:
    """Attributes that neither the constructor sets nor the class names.

    The one pattern beside ``__init__``: what belongs to one fit is annotated in the class with the method that sets it.
    """
    named = {
        target.id
        for node in cls.body
        for target in ([node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", []))
        if isinstance(target, ast.Name)
    }
    set_in: dict[str, set[str]] = {}
    for method in cls.body:
        if isinstance(method, ast.FunctionDef):
            for node in ast.walk(method):
                stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if stored and isinstance(node.value, ast.Name) and node.value.id == "self":
                    set_in.setdefault(node.attr, set()).add(method.name)
    return {name for name, methods in set_in.items() if "__init__" not in methods} - named


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_sizes(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert {f.name: n for f in functions(parsed(path)) if (n := body_length(f)) > LONGEST_BODY} == {}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_constructors(path: Path) -> None:
    for cls in ast.walk(parsed(path)):
        if not isinstance(cls, ast.ClassDef):
            continue
        assert late_attributes(cls) == set(), cls.name
        for method in cls.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                arguments = method.args
                count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs) - 1
                assert count <= MOST_PARAMETERS, cls.name


def test_one_statement_a_line() -> None:
    found = [f"{name}:{pair}" for name, path in zip(IDS, FILES, strict=True) for pair in pairs(parsed(path))]
    assert len(found) <= MOST_PAIRS, "\n".join(found)


def test_the_measures_see_what_they_measure() -> None:
    tree = ast.parse(
        """
class A:
    named: int
    def __init__(self, a):
        self.known = a
    def later(self):
        self.named = self.known = 1
        with open("x") as self.file:
            self.late, b = 1, 2
        a, b = b, a
        def inner():
            'Say nothing.'
            return 1
"""
    )
    (cls,) = tree.body
    assert isinstance(cls, ast.ClassDef)
    assert late_attributes(cls) == {"file", "late"}
    assert pairs(tree) == ["9: self.late, b = (1, 2)"]
    assert [body_length(f) for f in functions(tree)] == [1, 7, 1]
