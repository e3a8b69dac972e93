"""The command ``python -m zolightning.bench``: one subcommand a benchmark."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

from transformers.hf_argparser import HfArgumentParser

from zolightning.cublas import repeat_products
from zolightning.malloc import keep_freed_memory

# Each has a module of its name, with `Settings`, a dataclass whose fields are the options, and `run`, a function of it.
_BENCHMARKS = {
    "step": "a training step",
    "gpu": "bits, steps, memory and kernels on a GPU in eight minutes",
    "learn": "which method learns most, at equal forwards and at equal time",
    "signal": "which maps have gradients that stand out of their noise",
    "memory": "GB by model and mode",
    "blocks": "steps in one layer at a time, by batch size",
    "scale": "two ranks",
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the documentation of a benchmark as it is written, and the default of each option."""


def parser(names: Iterable[str] = _BENCHMARKS) -> argparse.ArgumentParser:
    """The parser of the command line for some benchmarks; it returns the ``module`` of one, and its options."""
    parser = argparse.ArgumentParser(prog="python -m zolightning.bench", description=__doc__)
    commands = parser.add_subparsers(title="benchmarks", required=True, parser_class=HfArgumentParser)
    for name in names:
        module = import_module(f"zolightning.bench.{name}")
        command = commands.add_parser(
            name,
            dataclass_types=module.Settings,
            description=module.__doc__,
            help=_BENCHMARKS[name],
            formatter_class=_Help,
        )
        command.set_defaults(module=module)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``."""
    words = sys.argv[1:] if args is None else args
    asked_for = [name for name in words[:1] if name in _BENCHMARKS]  # others may need packages that are not there
    options = vars(parser(asked_for or _BENCHMARKS).parse_args(words))
    module = options.pop("module")
    module.run(module.Settings(**options))


if __name__ == "__main__":
    keep_freed_memory()
    repeat_products()
    main()
