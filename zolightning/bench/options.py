"""Options of a benchmark: fields of its dataclass ``Settings``, which transformers' HfArgumentParser reads."""

import time
from dataclasses import MISSING, field
from typing import Any, Literal

Precision = Literal["32-true", "bf16-true", "16-true"]
Device = Literal["cpu", "cuda"]
Clock = Literal["wall", "cpu"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def option(help_text: str, default: Any = MISSING, **others: Any) -> Any:
    """A field that is an option: `help_text` explains it, and one without a default has to be given.

    `others` go to ``add_argument`` of argparse.
    """
    metadata = {"help": help_text, **others}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def require_at_least(settings: object, **least: int) -> None:
    """Raises a SystemExit that names the option if a field is less than it may be; None is accepted."""
    for name, minimum in least.items():
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise SystemExit(f"`--{name.replace('_', '-')}` must be at least {minimum}, got {value}.")
