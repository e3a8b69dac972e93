"""The loops of ``native.c`` for CPUs, compiled on first use with the system's C compiler and called through ctypes.

See :mod:`zolightning.kernels` for what they do. They give the same bits as the torch loops that they replace. They are
several times faster than those under ``torch.compile`` on a CPU, start in a second instead of ten, and cost
microseconds per call. Where no compiler is found, one message says so and the torch loops run. Where the compiler has
no OpenMP, or another one than torch (clang, beside PyPI's torch for Linux), one says so and they run on one thread.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zolightning.kernels.adam import AdamStep
from zolightning.kernels.curvature import Change
from zolightning.kernels.noise import Noise
from zolightning.rank_zero import rank_zero_warn


class _AdamStep(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in AdamStep._fields]


_SOURCE = Path(__file__).with_name("native.c")
_IS_MAC = sys.platform == "darwin"
# Contraction would change bits, and so would what Intel's compiler does by default; a square root that may set `errno`
# cannot be a vector instruction.
_FLAGS = ["-O3", "-ffp-contract=off", "-fno-fast-math", "-fno-math-errno", "-fPIC"]
# The widest vectors halve the time, and only x86 compilers have an option for them. Apple's know one processor only.
_PROCESSOR = [] if _IS_MAC else ["-march=native"]
_WIDE = ["-mprefer-vector-width=512"]
# Not linked with OpenMP: its functions are found in torch's own, whose threads would otherwise compete.
_OPENMP = ["-Xclang", "-fopenmp"] if _IS_MAC else ["-fopenmp"]
_LINK = ["-undefined", "dynamic_lookup"] if _IS_MAC else []
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_EXTRA_BITS = {torch.int16: "low_word", torch.int8: "low_byte"}
_POINTER = ctypes.c_void_p
_SHAPE_ARGUMENTS = (_POINTER, ctypes.c_float)  # curvature, threshold
_CURVATURE_ARGUMENTS = (_POINTER, ctypes.c_float, _POINTER, ctypes.c_float, ctypes.c_float)
_NUMBERS = ("float32", "float32_to_bfloat16", "bfloat16")
_STORED = {"float32": 1, "bfloat16": 1, "bfloat16_low_word": 2, "bfloat16_low_byte": 2}  # tensors
_ARGUMENTS: dict[str, tuple[type, ...]] = {
    **{
        f"{name}_{numbers}{shape}": (*[_POINTER] * tensors, *_SHAPE_ARGUMENTS)
        for name, tensors in (("perturb", 2), ("perturb_both", 3))
        for numbers in _NUMBERS
        for shape in ("", "_scaled", "_masked")
    },
    **{
        f"add_{stored}{shape}": (*[_POINTER] * tensors, ctypes.c_float, *more)
        for stored, tensors in _STORED.items()
        for shape, more in (
            ("", ()),
            ("_masked", (ctypes.c_float,)),
            ("_curved", _CURVATURE_ARGUMENTS),
            ("_adam", (_POINTER, _POINTER, _AdamStep)),
        )
    },
    "curve": _CURVATURE_ARGUMENTS,
}
_DELTA_ARGUMENTS = (ctypes.c_float, _POINTER, ctypes.c_float, ctypes.c_int64)
_NOISE_ARGUMENTS = (*[ctypes.c_int64] * 3, *[_POINTER] * 3, ctypes.c_int64, ctypes.c_int)


def available(*tensors: Tensor | None, start: int = 0) -> bool:
    """Whether the native loops can work on contiguous tensors, the first of which begins with element `start`."""
    for tensor in tensors:
        if tensor is not None and not (tensor.is_cpu and tensor.dtype in _DTYPES):
            return False
    return start % 2 == 0 and _library() is not None


def perturb(
    out: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    name, shape = _shape(curvature, threshold)
    function = getattr(_library(), f"perturb_{_dtypes(weight, out)}{name}")
    function(out.data_ptr(), weight.data_ptr(), *shape, *_noise(noise, weight.numel(), start))


def perturb_both(
    plus: Tensor,
    minus: Tensor,
    weight: Tensor,
    noise: Noise,
    start: int = 0,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    name, shape = _shape(curvature, threshold)
    function = getattr(_library(), f"perturb_both_{_dtypes(weight, plus)}{name}")
    function(plus.data_ptr(), minus.data_ptr(), weight.data_ptr(), *shape, *_noise(noise, weight.numel(), start))


def perturb_rows(
    out: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Noise,
    curvature: Tensor | None = None,
    threshold: float | None = None,
) -> None:
    name, shape = _shape(curvature, threshold)
    function = getattr(_library(), f"perturb_{_DTYPES[out.dtype]}{name}")
    gathered = F.embedding(rows, table)
    rows = rows.to(torch.int64).contiguous()
    function(out.data_ptr(), gathered.data_ptr(), *shape, *_noise(noise, out.shape[1], 0, rows))


def add(
    weight: Tensor,
    noise: Noise,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
    threshold: float | None = None,
) -> None:
    name, more = ("", ()) if threshold is None else ("_masked", (threshold,))
    function = getattr(_library(), f"add_{_stored(weight, extra_bits)}{name}")
    function(*_pointers(weight, extra_bits), decay, *more, *_noise(noise, weight.numel(), start))


def add_curved(
    weight: Tensor,
    curvature: Tensor,
    noise: Noise,
    change: Change,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    function = getattr(_library(), f"add_{_stored(weight, extra_bits)}_curved")
    function(
        *_pointers(weight, extra_bits), decay, *_curvature(curvature, change), *_noise(noise, weight.numel(), start)
    )


def curve(curvature: Tensor, noise: Noise, change: Change, start: int = 0) -> None:
    library = _library()
    assert library is not None
    library.curve(*_curvature(curvature, change), *_noise(noise, curvature.numel(), start))


def add_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    noise: Noise,
    step: AdamStep,
    decay: float = 1.0,
    extra_bits: Tensor | None = None,
    start: int = 0,
) -> None:
    function = getattr(_library(), f"add_{_stored(weight, extra_bits)}_adam")
    moments = mean.data_ptr(), square.data_ptr()
    function(*_pointers(weight, extra_bits), decay, *moments, _AdamStep(*step), *_noise(noise, weight.numel(), start))


def add_delta(
    weight: Tensor, delta: Tensor, decay: float = 1.0, extra_bits: Tensor | None = None, scale: float = 1.0
) -> None:
    delta = delta.contiguous()
    function = getattr(_library(), f"add_delta_{_stored(weight, extra_bits)}")
    function(*_pointers(weight, extra_bits), decay, delta.data_ptr(), scale, weight.numel())


def _stored(weight: Tensor, extra_bits: Tensor | None) -> str:
    return _DTYPES[weight.dtype] + ("" if extra_bits is None else f"_{_EXTRA_BITS[extra_bits.dtype]}")


def _pointers(weight: Tensor, extra_bits: Tensor | None) -> tuple[int, ...]:
    return (weight.data_ptr(),) if extra_bits is None else (weight.data_ptr(), extra_bits.data_ptr())


def _shape(curvature: Tensor | None, threshold: float | None) -> tuple[str, tuple[int | None, float]]:
    """The end of a function's name, and its arguments for how noise is changed before it is added."""
    if curvature is not None:
        return "_scaled", (curvature.data_ptr(), 0.0)
    return ("", (None, 0.0)) if threshold is None else ("_masked", (None, threshold))


def _curvature(curvature: Tensor, change: Change) -> tuple[int | float, ...]:
    return curvature.data_ptr(), change.shift, change.squares.data_ptr(), change.floor, change.ceiling


def _dtypes(weight: Tensor, out: Tensor) -> str:
    narrowed = "" if out.dtype == weight.dtype else f"_to_{_DTYPES[out.dtype]}"
    return _DTYPES[weight.dtype] + narrowed


def _noise(noise: Noise, elements: int, start: int, rows: Tensor | None = None) -> tuple[int | None, ...]:
    """The arguments that select noise: of `elements` from `start` on, or of each of some `rows` of so many elements."""
    segments, first_rows = (1, None) if rows is None else (rows.shape[0], rows.data_ptr())
    places = (segments, elements, start, first_rows, noise.keys.data_ptr(), noise.coefficients.data_ptr())
    return *places, noise.keys.shape[0], noise.kind == "rademacher"  # `len` of a tensor is a function of Python


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, from the cache if this machine has made it before; None where it cannot be made."""
    if os.environ.get("ZOLIGHTNING_NATIVE", "1") == "0":
        return None
    try:
        library = _loaded()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home folder
        rank_zero_warn(
            f"The C loops could not be compiled ({_reason(error)}); noise is made by torch: the same numbers, many "
            "times slower. The loops need a C compiler (gcc or clang) and a writable cache folder (ZOLIGHTNING_CACHE)."
        )
        return None
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = [*arguments, *_NOISE_ARGUMENTS]
    for stored, tensors in _STORED.items():
        getattr(library, f"add_delta_{stored}").argtypes = [*[_POINTER] * tensors, *_DELTA_ARGUMENTS]
    return library


def _loaded() -> ctypes.CDLL:
    """The library with OpenMP, or without it, after a warning, if only that works.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be made or loaded.
        RuntimeError: if there is no home folder for the cache.
    """
    try:
        return ctypes.CDLL(str(_compiled(_OPENMP)))
    except (OSError, subprocess.SubprocessError) as error:
        library = ctypes.CDLL(str(_compiled([])))
        rank_zero_warn(
            f"The C loops run on one thread, as the compiler's OpenMP is missing or not torch's ({_reason(error)}); "
            "the environment variable CC chooses another compiler, such as gcc."
        )
        return library


def _reason(error: Exception) -> str:
    """The first line of what a compiler has written, or of an error."""
    lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _compiled(openmp: list[str]) -> Path:
    """The library's file, which is made with these flags for OpenMP unless this machine has made it before."""
    if sys.platform == "win32":
        raise OSError("not on Windows")
    # gcc first, whose OpenMP most builds of torch come with.
    found = os.environ.get("CC") or next((c for c in ("gcc", "cc", "clang") if shutil.which(c)), None)
    if found is None:
        raise OSError("no C compiler found")
    compiler = shlex.split(found)  # `ccache gcc`
    flags = [*_FLAGS, *_PROCESSOR, *(_WIDE if platform.machine() == "x86_64" else []), *openmp]
    source = _SOURCE.read_text(encoding="utf-8")
    about = [source, *compiler, *flags, platform.machine(), platform.processor(), _cpu_flags()]
    name = hashlib.sha256("\0".join(about).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("ZOLIGHTNING_CACHE") or "~/.cache/zolightning").expanduser() / "native"
    library = cache / f"{name}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            made, linked = f"{folder}/native.o", f"{folder}/native.so"
            run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, errors="replace")
            run([*compiler, *flags, "-c", str(_SOURCE), "-o", made])
            run([*compiler, "-shared", *_LINK, made, "-o", linked])
            os.replace(linked, library)  # atomic: ranks that start together each make it, and one copy stays
    return library


def _cpu_flags() -> str:
    """What ``-march=native`` depends on: a cache on a shared disk may serve different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
