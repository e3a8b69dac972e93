"""The command ``python -m zolightning.bench``: one subcommand a benchmark."""

import argparse
from collections.abc import Sequence

from zolightning.bench import block_time, gpu, gradient_signal, learn, memory_table, scale, step_command
from zolightning.cublas import repeat_products
from zolightning.malloc import keep_freed_memory


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; ``run`` of the arguments that it returns is the benchmark, a function of them."""
    parser = argparse.ArgumentParser(prog="python -m zolightning.bench", description=__doc__)
    commands = parser.add_subparsers(title="benchmarks", required=True)
    step_command.add_command(commands)
    gpu.add_command(commands)
    learn.add_command(commands)
    gradient_signal.add_command(commands)
    memory_table.add_command(commands)
    block_time.add_command(commands)
    scale.add_command(commands)
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``."""
    arguments = parser().parse_args(args)
    arguments.run(arguments)


if __name__ == "__main__":
    keep_freed_memory()
    repeat_products()
    main()
