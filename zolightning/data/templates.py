"""Jinja2 templates over the fields of a row. They may use any value, but write only text and numbers."""

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import SandboxedEnvironment

# What `{{ mask }}` and `{{ sep }}` write: characters that Unicode leaves to programs, and no text holds.
MASK, SEPARATOR = "\ufdd0", "\ufdd1"

# the final newline of a template belongs to the prompt
_TEMPLATES = SandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda value: _written(value)
)
_TEMPLATES.globals |= {"mask": MASK, "sep": SEPARATOR}
_TEMPLATES.tests["none"] = lambda value: value is None or isinstance(value, _Null)
_WITHOUT_GLOBALS = _TEMPLATES.overlay()  # in which `range` is a field's name
_WITHOUT_GLOBALS.globals = {}
_TEMPLATES.policies["json.dumps_function"] = lambda value, **settings: json.dumps(_plain(value), **settings)


def check_template(key: str, source: str) -> None:
    """Raises ValueError, naming `key`, if `source` is not a template."""
    try:
        _compile(source)
    except TemplateSyntaxError as error:
        raise ValueError(f"`{key}` is not a Jinja2 template: {error.message}, in {source!r}.") from None


def template_fields(sources: Iterable[str]) -> frozenset[str]:
    """The fields of a row that templates read."""
    found = set[str]()
    for tree in map(_WITHOUT_GLOBALS.parse, sources):
        called = {call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
        # `range` is Jinja2's function where it is called, and elsewhere a field
        found |= meta.find_undeclared_variables(tree) - {"mask", "sep"} - (called & _TEMPLATES.globals.keys())
    return frozenset(found)


def guarded(row: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """The fields of a row for :func:`fill`; to write a list, a mapping, a truth value or a null of them is an error."""
    return {field: _guard(f"field `{field}`", row[field]) for field in fields}


def fill(source: str, values: Mapping[str, Any]) -> str:
    """Returns the text of a template. Raises a ValueError if the template does not fit these values."""
    try:
        return _compile(source).render(values)
    except Exception as error:  # Jinja2's, and whatever an expression raises, such as a ZeroDivisionError
        raise ValueError(f"the templates do not fit this row: {error}") from None


class _NoText:
    """A value that a template may use but not write, because a prompt should not hold Python's notation."""

    _name = ""  # underscored, so that templates do not see it: in `row.name` they should find the mapping's item

    def __str__(self) -> str:
        raise ValueError(f"{self._name} is {self!r}, which is not text")


class _Truth(_NoText, int):
    def __repr__(self) -> str:
        return "true" if self else "false"


class _Null(_NoText):
    """Stands for None: false, equal to it, and `is none`."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __repr__(self) -> str:
        return "null"


class _List(_NoText, list[Any]):
    pass


class _Mapping(_NoText, dict[str, Any]):
    pass


def _guard(name: str, value: Any) -> Any:
    """The value, and all that is in it: `~` and filters such as `join` write what `finalize` does not see."""
    guarded: _NoText
    if isinstance(value, bool):
        guarded = _Truth(value)
    elif isinstance(value, list):
        guarded = _List(_guard(f"an item of {name}", item) for item in value)
    elif isinstance(value, dict):
        guarded = _Mapping({key: _guard(f"`{key}` of {name}", item) for key, item in value.items()})
    elif value is None:
        guarded = _Null()
    else:
        return value
    guarded._name = name
    return guarded


def _plain(value: Any) -> Any:
    """The value that was guarded, for `tojson`, whose text is JSON's notation."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, _Null) else bool(value) if isinstance(value, _Truth) else value


def _written(value: Any) -> Any:
    """A value that a template writes as it stands, wherever in a row it lies; whole fields are guarded already."""
    # lists, functions and generators have Python's notation only; dates, for example, have a text
    has_text = isinstance(value, str | int | float) or type(value).__str__ is not object.__str__
    is_infinite = isinstance(value, float) and not math.isfinite(value)
    if has_text and not is_infinite and not isinstance(value, bool | bytes):
        return value
    found = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)[:80]
    raise ValueError(f"they write {found}, which is not text")


@lru_cache
def _compile(source: str) -> Template:
    return _TEMPLATES.from_string(source)
