"""Mutants: a source file with one small fault in it, made from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
_LOOPS_AND_BRANCHES = (ast.If, ast.While, ast.IfExp)


@dataclass(frozen=True)
class Mutant:
    """A file with a fault.

    Attributes:
        file: Path in the repository.
        line: Where the fault is.
        text: That line.
        change: What was there, and what is.
        source: The whole file with the fault.
        lines: Lines of which one has run if the fault could have had a consequence; none for all lines of the file.
        names: Constants of the module that are at fault, which a test may read.
    """

    file: str
    line: int
    text: str
    change: str
    source: str
    lines: frozenset[int]
    names: frozenset[str]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.change}    | {self.text}"


def mutants_of(root: Path, file: str) -> list[Mutant]:
    """Return all mutants of a file, in the order of their places."""
    source = (root / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    return [_mutant(file, source, tree, *site) for site in _sites(tree)]


def instrumented(source: str, file: str) -> str:
    """Return a file that notes each statement of its functions that runs, in the set :data:`SEEN` of builtins."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            _probe(function, file)
    place = next(i for i, s in enumerate(tree.body) if not _is_docstring(s) and not _is_future(s))
    tree.body[place:place] = ast.parse(f"import builtins as _b\n_seen = getattr(_b, {SEEN!r}, set())").body
    return ast.unparse(tree)


SEEN = "_lines_seen_by_a_test"


def _probe(node: ast.AST, file: str) -> None:
    """Put a note before each statement in a body, but for functions and classes, which have their own turn."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        statements = getattr(node, field, [])
        for statement in statements:
            if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                _probe(statement, file)
        if field not in ("handlers", "cases") and statements:
            probes = [ast.parse(f"_seen.add(({file!r}, {s.lineno}))").body[0] for s in statements]
            pairs = zip(probes, statements, strict=True)
            setattr(node, field, [x for probe, s in pairs for x in ([s] if _is_docstring(s) else [probe, s])])


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


_Site = tuple[ast.AST, ast.AST | None, list[ast.AST]]  # node, its replacement (None: no statement), what it is in


def _sites(tree: ast.Module) -> Iterator[_Site]:
    def visit(node: ast.AST, holders: list[ast.AST]) -> Iterator[_Site]:
        yield from ((node, new, holders) for new in _replacements(node))
        for field, value in ast.iter_fields(node):
            # Types are checked by mypy; messages and what is asserted for mypy's sake by nobody.
            if field in ("annotation", "returns", "decorator_list", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, (ast.JoinedStr, ast.Raise, ast.Assert)):
                    yield from visit(child, [*holders, node])

    yield from visit(tree, [])


def _replacements(node: ast.AST) -> Iterator[ast.AST | None]:
    match node:
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                for other in _COMPARISONS[type(op)]:
                    yield ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
            yield ast.BinOp(left, _ARITHMETIC[type(op)](), right)
        case ast.AugAssign(target, op, value) if type(op) in _ARITHMETIC:
            yield ast.AugAssign(target, _ARITHMETIC[type(op)](), value)
            yield None
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() as value):
            yield ast.Constant(value + 1)
            if value > 1:
                yield ast.Constant(0)
        case ast.Constant(float() as value):
            yield ast.Constant(2 * value if value else 1.0)
            if value:
                yield ast.Constant(0.0)
        case ast.Call(ast.Name(name) as function, arguments, keywords) if name in _SWAPPED:
            yield ast.Call(ast.Name(_SWAPPED[function.id]), arguments, keywords)
        case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()):
            yield None
        case ast.Assign(targets) if all(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets):
            yield None
    if isinstance(node, _LOOPS_AND_BRANCHES) and not isinstance(node.test, (ast.Compare, ast.UnaryOp, ast.Constant)):
        yield _with_test(node, ast.UnaryOp(ast.Not(), node.test))


def _with_test(node: ast.If | ast.While | ast.IfExp, test: ast.expr) -> ast.AST:
    """Mark a change of the condition only; a statement is not unparsed with its body."""
    return _Condition(node.test, test)


class _Condition(ast.AST):
    def __init__(self, old: ast.expr, new: ast.expr) -> None:
        super().__init__()
        self.old = old
        self.new = new


def _mutant(
    file: str, source: str, tree: ast.Module, node: ast.AST, new: ast.AST | None, holders: list[ast.AST]
) -> Mutant:
    if isinstance(new, _Condition):
        holders = [*holders, node]
        node, new = new.old, new.new
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
    text = "pass" if new is None else ast.unparse(new)
    if isinstance(new, ast.expr):
        text = f"({text})"
    old = " ".join(data[first:last].decode().split())
    line: int = node.lineno  # type: ignore[attr-defined]
    return Mutant(
        file,
        line,
        source.splitlines()[line - 1].strip(),
        f"{old}  →  {text}",
        (data[:first] + text.encode() + data[last:]).decode(),
        *_lines(tree, node, holders),
    )


def _lines(tree: ast.Module, node: ast.AST, holders: list[ast.AST]) -> tuple[frozenset[int], frozenset[str]]:
    """Return the lines of which a test must run one to see the fault, or the names of which it must read one."""
    chain = [*holders, node]
    functions = [i for i, h in enumerate(chain) if isinstance(h, (ast.FunctionDef, ast.Lambda))]
    statements = [h for h in chain if isinstance(h, ast.stmt)]
    if functions and isinstance(chain[functions[-1]], ast.Lambda):
        return _span(statements[-1]), frozenset()
    if functions:
        function = chain[functions[-1]]
        assert isinstance(function, ast.FunctionDef)
        if node is not function and chain[functions[-1] + 1] is function.args:  # a default
            return frozenset(range(function.body[0].lineno, (function.end_lineno or 0) + 1)), frozenset()
        return _span(statements[-1]), frozenset()
    # What a class says of its fields is read by whoever makes one: any test of the file.
    in_class = any(isinstance(h, ast.ClassDef) for h in chain)
    assignments = [s for s in statements if isinstance(s, (ast.Assign, ast.AnnAssign)) and not in_class]
    targets = [t for s in assignments for t in (s.targets if isinstance(s, ast.Assign) else [s.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    uses = {
        statement.lineno
        for statement in ast.walk(tree)
        if isinstance(statement, ast.stmt) and not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        for name in ast.walk(statement)
        if isinstance(name, ast.Name) and name.id in names and isinstance(name.ctx, ast.Load)
    }
    return frozenset(uses), frozenset(names)


def _span(statement: ast.stmt) -> frozenset[int]:
    """Return the lines of a statement, of one with a body those of its head."""
    body = getattr(statement, "body", None)
    last = max(statement.lineno, body[0].lineno - 1) if body else (statement.end_lineno or statement.lineno)
    return frozenset(range(statement.lineno, last + 1))
