"""The command ``python -m zolightning.bench``: one subcommand a benchmark."""

import argparse
from collections.abc import Sequence
from types import ModuleType

from transformers.hf_argparser import HfArgumentParser

from zolightning.bench import blocks, gpu, learn, memory, scale, signal, step
from zolightning.cublas import repeat_products
from zolightning.malloc import keep_freed_memory

# Each module has `Settings`, a dataclass whose fields are the options, and `run`, the benchmark as a function of them.
_BENCHMARKS: dict[str, tuple[ModuleType, str]] = {
    "step": (step, "a training step"),
    "gpu": (gpu, "bits, steps, memory and kernels of a GPU in eight minutes"),
    "learn": (learn, "which method learns most, at equal forwards and at equal time"),
    "signal": (signal, "which maps have gradients that stand out of their noise"),
    "memory": (memory, "GB by model and mode"),
    "blocks": (blocks, "steps in one layer at a time, by batch size"),
    "scale": (scale, "two ranks"),
}


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The documentation of a benchmark as it is written, and the default of each option."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; it returns the name of the ``benchmark`` and its options."""
    parser = argparse.ArgumentParser(prog="python -m zolightning.bench", description=__doc__)
    commands = parser.add_subparsers(title="benchmarks", dest="benchmark", required=True, parser_class=HfArgumentParser)
    for name, (module, said) in _BENCHMARKS.items():
        commands.add_parser(
            name, dataclass_types=module.Settings, description=module.__doc__, help=said, formatter_class=_Help
        )
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; `args` stands in for ``sys.argv[1:]``."""
    options = vars(parser().parse_args(args))
    module, _ = _BENCHMARKS[options.pop("benchmark")]
    module.run(module.Settings(**options))


if __name__ == "__main__":
    keep_freed_memory()
    repeat_products()
    main()
