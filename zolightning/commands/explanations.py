"""Explains in one line what is wrong with an option, from the many lines of jsonargparse's message."""

import inspect
import re
from ast import literal_eval
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile

from jsonargparse import ArgumentParser

_TYPES = {
    "float": "a number",
    "int": "an integer",
    "bool": "true or false",
    "str": "a string",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
    "collections.abc.Sequence": "a list",
    "collections.abc.Iterable": "a list",
}
_OURS = {"num_labels": "num_classes"}  # by what transformers calls them
_MOST_NAMES = 30
_OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
_OTHER_COMMANDS = ("configs", "report")  # whose parsers are their own


def explain(message: str, options: Sequence[str], commands: Iterable[str] = ()) -> str:
    """Shortens an error message of jsonargparse, which may have 30 lines, to one line.

    Args:
        message: what jsonargparse says.
        options: the options of the command, such as ``--method.lr``, to suggest one that is meant.
        commands: the commands there are, likewise.
    """
    field, inner = _field(message), _innermost(message)
    return (
        _wrong_command(message, [*commands, *_OTHER_COMMANDS])
        or _wrong_group(message)
        or _misplaced_setting(field, inner)
        or _unknown_setting(message, field, options)
        or _missing_setting(message, field)
        or _wrong_class(message, field, inner)
        or _wrong_value(message, field, inner)
        or " ".join(message.split())
    )


def _wrong_command(message: str, names: list[str]) -> str | None:
    """A command that does not exist, or none; or ``--method.help`` of what is no class."""
    if found := re.match(
        r'argument subcommand: invalid choice: \'(.*)\' \(|expected "subcommand" to be one of', message
    ):
        wrong = (
            f"{found[1]!r} is not a command{_hint(_closest(found[1], names))}" if found[1] else "no command is given"
        )
        return f"{wrong}; accepted: {', '.join(names)}."
    if found := re.match(r"--(\S+)\.help: (?:.*: |\")([^\s\"]+)", message):
        return f"`{found[1]}.help` is {found[2]!r}, which is not a class that `{found[1]}` takes."
    return None


def _wrong_group(message: str) -> str | None:
    """A value for a group of settings, such as ``--trainer 1``."""
    found = re.match(r"Parser key \"([^\"]+)\":\s+Unable to load config '([^']*)'", message)
    if found is None:
        return None
    group, given = found.groups()
    if given == "null":
        return null_group(group)
    return f"`{group}` is {given!r}, which is not a file; accepted: a YAML file with settings, or `--{group}.NAME`."


def _misplaced_setting(field: str, inner: str) -> str | None:
    """A setting of a class beside its ``class_path``, a level too high."""
    for given in re.findall(r"(?:but got|Given value:) (\{.*?\})(?:\. Got value|\n|$)", inner):
        try:
            keys = list(literal_eval(given))
        except (ValueError, SyntaxError):  # of objects that are made already
            continue
        if "class_path" in keys and (others := [key for key in keys if key not in _OF_A_CLASS]):
            return f"`{field}` has `{others[0]}` next to `class_path`: settings of a class go under `init_args`."
    return None


def _unknown_setting(message: str, field: str, options: Sequence[str]) -> str | None:
    """A setting that a class or a command does not have."""
    names = [option.removeprefix("--") for option in options]
    if not field and (found := re.match(r"Option '([^']+)' is not accepted", message)):
        return _unknown(found[1], found[1], "", names)
    if found := re.search(r"Option '([^']+)' is not accepted", message):
        where = _class_at(message, found)
        return _unknown(f"{field}.{found[1]}", found[1], where, _arguments_of(where))
    if found := re.search(r"Subcommand '[\w-]+' does not accept option '([^']+)'", message):
        return _unknown(found[1], found[1], "", names)
    if found := re.search(r"unrecognized arguments: ([^\s=]+)", message):
        return _unknown(found[1], found[1], "", options)
    return None


def _missing_setting(message: str, field: str) -> str | None:
    """A setting that a class or a command needs."""
    if found := re.search(r"arguments are required: (.+)", message):
        names = [f"`{field}.{name}`" if field else f"`{name.partition('.')[2]}`" for name in found[1].split(", ")]
        of = f" for {_short(_class_at(message, found))}" if field else ""
        return f"{', '.join(names)} must be given{of}."
    return None


def _wrong_class(message: str, field: str, inner: str) -> str | None:
    """A class or a function that does not exist, cannot be imported, or is of another kind."""
    if broken := _broken_import(inner):
        return f"`{field}` is {broken}."
    if "Dict must include a class_path" in message or "Given value: NestedArg(" in inner:
        return f"`{field}` names no class for these settings{_accepted_classes(inner)}."
    if "collections.abc.Callable" in inner and not _bases(inner):
        given = re.findall(r"Given value: (.*)", inner)[-1]
        return (
            f"`{field}` is {given!r}, which names no function; accepted: a path to import, such as my_file.my_function."
        )
    if found := re.search(
        r"import path string: (\S+\w)|No module named|has no attribute|to be a subclass|Not a valid subclass", inner
    ):
        values = [found[1], *re.findall(r"Expected '([^']+)' to be|Given value: (\S+)|class_path='([^']+)'", inner)]
        given = next(name for value in values for name in ([value] if isinstance(value, str) else value or ()) if name)
        close = _closest(_short(given), _subclass_names(inner))
        return f"`{field}` is {given!r}, which is not a class of that kind{_hint(close)}{_accepted_classes(inner)}."
    found = re.search(r"Expected (?:an import path or a subclass spec, but got|a dot import path string:) (.*)", inner)
    if found and _bases(inner):
        return f"`{field}` is {found[1]!r}, which is not a class of that kind{_accepted_classes(inner)}."
    return None


def _wrong_value(message: str, field: str, inner: str) -> str | None:
    """A value of another type, or none of the accepted ones."""
    if found := re.search(r"argument (?:-c/)?(\S+): (.*)", message):
        return f"`{found[1]}`: {found[2]}."
    expected = re.findall(r"Expected a (<class '[\w.]+'>|typing\.Literal\[[^]]*\]|tuple with \d+)", inner)
    given = re.findall(r"(?:Got value|Given value): ([^\n]*?)(?:\. Got value|\n|$)", inner)
    if not (field and expected and given):
        return None
    choices = re.findall(r"'([^']*)'", " ".join(type_ for type_ in expected if "Literal" in type_))
    accepted = " or ".join(dict.fromkeys(_described(type_) for type_ in expected))
    return f"`{field}` is {given[0]!r}{_hint(_closest(given[0], choices))}; accepted: {accepted}."


def null_group(name: str) -> str:
    """What is wrong with a group of settings that is null, by the name of the group."""
    return (
        f"`{name}` is null, but it is a group of settings. Leave it out to get the defaults; for a run without "
        "checkpoints set `trainer.enable_checkpointing: false`."
    )


def _field(message: str) -> str:
    """The dotted name of the wrong option, joined from the keys that the message names on the way to it."""
    return ".".join(re.findall(r'Parser key "([^"]+)"', message.partition("- Not a valid subclass")[0]))


def _innermost(message: str) -> str:
    """The part of the message about the innermost key: from its name to where the text about an outer one goes on."""
    start = message.partition("- Not a valid subclass")[0].rfind('Parser key "')
    if start < 0:
        return message
    line = message[message.rfind("\n", 0, start) + 1 :]
    indent = len(line) - len(line.lstrip())
    first, *rest = message[start:].split("\n")
    kept = takewhile(lambda line: not line.strip() or len(line) - len(line.lstrip()) > indent, rest)
    return "\n".join([first, *kept])


def _broken_import(message: str) -> str | None:
    """The path of a class that was given and why its module cannot be imported; None if no module is at fault."""
    if not _bases(message) and "collections.abc.Callable" not in message:
        return None
    before = r"(?:Given value: |class_path='|import path string: )"
    for path in re.findall(before + r"([A-Za-z_]\w*(?:\.\w+)+)(?=\.?\s|'|$)", message):
        module = path.rpartition(".")[0]
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # a module that this one imports
                return f"{path!r}, and {module} cannot be imported: {error}"
            return f"{path!r}, and there is no module {error.name}, neither installed nor in the working directory"
        except Exception as error:
            return f"{path!r}, and {module} cannot be imported: {type(error).__name__}: {error}"
    return None


def _class_at(message: str, found: re.Match[str]) -> str:
    """The path of the class whose settings the message is about at the place `found`."""
    before = re.findall(r"class_path '([\w.]+)'", message[: found.start()])
    after = re.findall(r"class_path='([\w.]+)'", message[found.end() :])
    line = message[message.rfind("\n", 0, found.start()) + 1 : found.start()]
    return after[0] if "expects a function" in line or not before else before[-1]


def _unknown(field: str, name: str, class_path: str, names: Iterable[str]) -> str:
    names = sorted({other for other in names if other.startswith("-") == name.startswith("-")})
    group, _, last = name.rpartition(".")
    siblings = {other.rpartition(".")[2].lstrip("-"): other for other in names if other.rpartition(".")[0] == group}
    last = last.lstrip("-")
    same = [_OURS[last]] if _OURS.get(last) in siblings else _closest(last, siblings)
    close = [siblings[found] for found in same] or _closest(name, names, 0.8)
    of = f" of {_short(class_path)}" if class_path else ""
    listed = f"; accepted: {', '.join(names) or 'none'}" if class_path else ""
    return f"`{field}` is not a setting{of}{_hint(close)}{listed}."


def _closest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The name that is most like `name` but for upper and lower case, if one is."""
    by_lower = {other.lower(): other for other in names}
    return [by_lower[found] for found in get_close_matches(name.lower(), by_lower, 1, cutoff)]


def _hint(close: list[str]) -> str:
    return f" (did you mean {close[0]}?)" if close else ""


def _described(type_: str) -> str:
    if type_.startswith("typing.Literal"):
        return type_[len("typing.Literal[") : -1]
    if type_.startswith("tuple with"):
        return f"a list of {type_.rpartition(' ')[2]}"
    name = type_[len("<class '") : -len("'>")]
    return _TYPES.get(name, _short(name))


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _arguments_of(class_path: str) -> list[str]:
    skip = {"params"}  # what a method is given by the Trainer
    names = ArgumentParser().add_class_arguments(_imported(class_path), "x", skip=skip, fail_untyped=False)
    return [name.removeprefix("x.") for name in names]


def _imported(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def _bases(message: str) -> list[type]:
    """The classes of which a subclass could have been named."""
    types = re.findall(r"Subtypes: \[(.*)\]|Type (.*) expects", message)
    paths = re.findall(r"[a-zA-Z_]\w*(?:\.\w+)+", re.sub(r"\[\[.*?\], ", " ", "".join(types[-1]))) if types else []
    found = []
    for path in paths:
        try:
            found.append(_imported(path))
        except (ImportError, AttributeError):  # such as `typing.Callable[...]` of no module
            continue
    return [base for base in found if isinstance(base, type) and base.__module__ not in ("collections.abc", "typing")]


def _subclass_names(message: str) -> list[str]:
    """The classes that can be named: neither private nor abstract."""

    def below(base: type) -> Iterator[type]:
        children: list[type] = base.__subclasses__()
        if not children or base.__module__.startswith("zolightning"):
            yield base
        for child in children:
            yield from below(child)

    found = {cls for base in _bases(message) for cls in below(base)}
    abstract = {cls for cls in found if inspect.isabstract(cls) or (cls.__doc__ or "").lstrip().startswith("Abstract")}
    return sorted(cls.__name__ for cls in found - abstract if not cls.__name__.startswith("_"))


def _accepted_classes(message: str) -> str:
    names = _subclass_names(message)
    more = ", ..." if len(names) > _MOST_NAMES else ""
    return f"; accepted: {', '.join(names[:_MOST_NAMES])}{more} or the path of a class" if names else ""
