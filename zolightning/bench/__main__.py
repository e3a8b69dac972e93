"""The command ``python -m zolightning.bench``: one subcommand a benchmark."""

import argparse
from collections.abc import Sequence
from types import ModuleType

from zolightning.bench import block_time, gpu, gradient_signal, learn, memory_table, scale, step_command
from zolightning.cublas import repeat_products
from zolightning.malloc import keep_freed_memory

# Each module has `add_arguments`, to a parser, and `run_command`, with the arguments that it returns.
_BENCHMARKS: dict[str, tuple[ModuleType, str]] = {
    "step": (step_command, "a training step"),
    "gpu": (gpu, "bits, steps, memory and kernels of a GPU in eight minutes"),
    "learn": (learn, "which method learns most, at equal forwards and at equal time"),
    "signal": (gradient_signal, "which maps have gradients that stand out of their noise"),
    "memory": (memory_table, "GB by model and mode"),
    "blocks": (block_time, "steps in one layer at a time, by batch size"),
    "scale": (scale, "two ranks"),
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The documentation of a benchmark as it is written, and the default of each option."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``run`` of the arguments that it returns is the benchmark, a function of them."""
    parser = argparse.ArgumentParser(prog="python -m zolightning.bench", description=__doc__)
    commands = parser.add_subparsers(title="benchmarks", required=True)
    for name, (module, said) in _BENCHMARKS.items():
        command = commands.add_parser(name, description=module.__doc__, help=said, formatter_class=_Help)
        module.add_arguments(command)
        command.set_defaults(run=module.run_command)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``."""
    arguments = parser().parse_args(args)
    arguments.run(arguments)


if __name__ == "__main__":
    keep_freed_memory()
    repeat_products()
    main()
