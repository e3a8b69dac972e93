"""Docstrings: an ``Args`` section names the arguments that there are, and that of a large room all of its files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "zolightning"
_SECTION = re.compile(
    r"\n\s*Args:\n(.*?)(?=\n\s*(?:Attributes|Returns|Yields|Raises|Example|Examples)::?\n|\Z)", re.DOTALL
)

Documented = ast.FunctionDef | ast.ClassDef


def documented(tree: ast.Module) -> Iterator[tuple[Documented, str]]:
    """Functions and classes with an ``Args`` section, and its text."""
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            found = _SECTION.search(ast.get_docstring(node) or "")
            if found:
                yield node, found[1]


def arguments(node: Documented) -> set[str] | None:
    """The names of a function's arguments, or of a constructor's; None for dataclasses, which may inherit some."""
    if isinstance(node, ast.ClassDef):
        makers = [b for b in node.body if isinstance(b, ast.FunctionDef) and b.name in ("__init__", "__new__")]
        return arguments(makers[0]) if makers else None
    given = node.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return set(names) - {"self", "cls"}


def entries(section: str) -> tuple[set[str], set[str]]:
    """The arguments with an entry, such as ``rows, columns: ...``, and those that an entry mentions in backticks."""
    heads = re.findall(r"^    (\S[^:\n]*):", section, re.MULTILINE)
    return {name.strip() for head in heads for name in head.split(",")}, set(re.findall(r"`(\w+)`", section))


def test_args_are_the_arguments() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node, section in documented(ast.parse(path.read_text(encoding="utf-8"))):
            wanted, (found, mentioned) = arguments(node), entries(section)
            if wanted is not None and (found - wanted or wanted - found - mentioned):
                place = f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                wrong.append(f"{place}: no such argument {found - wanted}, no entry {wanted - found - mentioned}")
    assert not wrong, "\n".join(wrong)


_LARGE = sorted(room.name for room in PACKAGE.iterdir() if len(list(room.glob("*.py"))) > 15)


@pytest.mark.parametrize("room", _LARGE)
def test_a_large_room_says_in_which_order_to_read_its_files(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    named = re.findall(r"``(\w+)``", ast.get_docstring(tree) or "")
    assert sorted(named) == sorted(path.stem for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__")
