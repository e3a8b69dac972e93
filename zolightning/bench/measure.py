"""Bytes that a process holds."""

import gc
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """The most memory that this process has held, since :func:`reset_peak` where that is possible."""
    # ru_maxrss is the fallback only: on Linux a child inherits that of the process that started it.
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident_bytes() -> int | None:
    """The memory that this process holds now; None where the system does not say."""
    return _status("VmRSS")


def reset_peak() -> bool:
    """Lets the peak begin anew with what is held now; returns False where the system has no way to do so."""
    gc.collect()
    try:
        _CLEAR.write_text("5")  # see proc(5): "reset the peak resident set size"
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kibibytes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((int(number) * 1024 for number in kibibytes), None)
