"""What becomes of the words of a command before jsonargparse parses them, and how they are written down.

Files may lie in the package, flags may stand without a value, and a slot of :mod:`~zolightning.commands.slots` inherits
nothing when a later file or flag names another class for it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from zolightning.commands.slots import CLASSES, OF_A_METHOD
from zolightning.packaged import packaged

_FILES = ("--config", "-c")


def prepared(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with all changes that this module makes."""
    words: list[str] = []
    for word in arguments:
        option, equals, value = word.partition("=")
        words += [option, value] if equals and option in _FILES else [word]
    return with_resets(from_package(with_switches(up_to_help(words))))


def from_package(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``configs/...`` names the packaged file where there is no other."""
    before = ["", *arguments]
    return [str(packaged(word)) if option in _FILES else word for option, word in zip(before, arguments, strict=False)]


def up_to_help(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments without what follows ``--method.help MeZO``, which ends the command.

    jsonargparse would take it for settings of that class; help of a setting's class, ``--scope.part.help``, stays.
    """
    kept: list[str] = []
    is_over = is_class = False
    for word in arguments:
        asks = word.startswith("--") and word.partition("=")[0].endswith(".help")
        if asks or is_class or not is_over:
            kept.append(word)
        is_over, is_class = is_over or asks, asks and "=" not in word
    return kept


def with_switches(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments in which ``--follow`` alone is ``--follow true``: jsonargparse asks for a value."""
    following = [*arguments, "--"][1:]
    return [
        f"{word}=true" if word == "--follow" and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=True)
    ]


def with_resets(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments changed so that a newly named class inherits no settings of an earlier one.

    jsonargparse keeps settings that the new class accepts too: ``momentum: 0.9`` in one file would stay with the method
    of the next file. So ``--method null`` is inserted before each file and flag that names a method, and likewise for
    the other slots. The scheduler, resampling and transport that earlier files gave go with the earlier method.
    """
    replaced: list[str] = []
    end_of_files = 0
    for place, argument in enumerate(arguments):
        option = argument.partition("=")[0]
        if option in _FILES:
            named = _classes_named("".join(arguments[place + 1 : place + 2]))
            replaced += _nulls(slot for slot in CLASSES if slot in named or ("method" in named and slot in OF_A_METHOD))
            end_of_files = len(replaced) + 2
        elif option.startswith("--") and option.removeprefix("--") in CLASSES:
            if option == "--method" and end_of_files:
                replaced[end_of_files:end_of_files] = _nulls(OF_A_METHOD)
            replaced += _nulls([option.removeprefix("--")])
        replaced.append(argument)
    return replaced


def command_line(words: Iterable[str]) -> str:
    """The words as one line for a shell: a word with line breaks, such as a prompt, is written as ``$'...\\n...'``."""
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    if "\n" not in word:
        return quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    return f"$'{escaped}'"


def _nulls(slots: Iterable[str]) -> list[str]:
    return [word for slot in slots for word in (f"--{slot}", "null")]


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a field that is given twice, the first of which would be ignored."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[Any, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(f"`{key.value}` is given twice, in lines {first[key.value]} and {line}")
            first[key.value] = line
        return super().construct_mapping(node, deep)


def _classes_named(config: str) -> set[str]:
    """The slots for which a config names a class or null; the config is the path of a file or YAML text.

    Raises:
        ValueError: naming the file, if it does not exist, or is not a mapping in YAML.
    """
    is_text = "\n" in config or ":" in config or config.lstrip().startswith("{")
    if not Path(config).is_file() and not is_text:
        packaged_ones = " `zolightning configs` lists those that come with the package." if "configs" in config else ""
        raise ValueError(f"`--config` is {config!r}, which is not a file.{packaged_ones}")
    try:
        text = config if is_text and not Path(config).is_file() else Path(config).read_text("utf-8")
        values = yaml.load(text, _EachKeyOnce)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` {config} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}, not a mapping of fields"
        raise ValueError(f"`--config` {config} {found}.")
    return {
        slot
        for slot in values.keys() & set(CLASSES)
        if not isinstance(values[slot], dict) or "class_path" in values[slot]
    }
