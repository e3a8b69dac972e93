"""The parser of the command line, which explains a wrong option in one line."""

import re
import sys
from argparse import SUPPRESS, HelpFormatter
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from zolightning.checkpoints.checkpoint_io import replace_text
from zolightning.commands.explanations import explain
from zolightning.commands.help import HelpAll, short_help, without_markup

_NEGATIVE = re.compile(r"-(\d|\.\d)[\d.eE+-]*$")


class OneLineParser(LightningArgumentParser):
    """Lightning's parser, whose errors are one line: the field, the value found and what is accepted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A parser without a usage of its own prints none: that of `--method.help MeZO` would repeat what follows it.
        super().__init__(*args, **{"usage": SUPPRESS} | kwargs | {"allow_abbrev": False})
        self._negative_number_matcher = _NEGATIVE  # argparse's, of before Python 3.14, takes -1e-3 for a flag

    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        if formatter is None and any(isinstance(action, HelpAll) for action in self._actions):
            return short_help(self)
        text: str = super().format_help() if formatter is None else super().format_help(formatter)
        return without_markup(text)

    def format_all_help(self) -> str:
        """What jsonargparse says of every option."""
        text: str = super().format_help()
        return without_markup(text)

    def save(
        self,
        namespace: Namespace,
        path: str | PathLike[str],
        *args: Any,
        overwrite: bool = False,
        multifile: bool = True,
        **kwargs: Any,
    ) -> None:
        """Writes a file whole, or leaves the one that was there: a killed run goes on by its ``config.yaml``.

        jsonargparse empties the file first, and then takes its time to find out what to write.
        """
        if args or multifile or not overwrite or "://" in str(path):
            super().save(namespace, path, *args, overwrite=overwrite, multifile=multifile, **kwargs)
            return
        replace_text(Path(path), self.dump(namespace, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser of an inner class, whose message becomes a part of the outer one's
            super().error(message, ex)
        commands = getattr(self._subcommands_action, "choices", {})
        sys.stderr.write(f"error: {explain(message, self.option_names(ex), commands)}\n")
        self.exit(2)

    def option_names(self, ex: Exception | None) -> list[str]:
        """The options there are where an error was raised: in a subcommand, or in all of them."""
        parser = getattr(ex, "subcommand_parser", None) or self
        parsers = [parser, *getattr(parser._subcommands_action, "choices", {}).values()] if parser is self else [parser]
        return [option for other in parsers for action in other._actions for option in action.option_strings]
