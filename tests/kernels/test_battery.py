"""Batteries of statistical tests on the hash: what a search along its directions could feel, and TestU01's SmallCrush.

The first needs nothing. The second is compiled against TestU01 (Debian: ``libtestu01-0-dev``, in non-free).
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zolightning.kernels import native
from zolightning.kernels.noise import CODE_SCALE, NOISE_KINDS, NoiseKind, codes, key

_SOURCE = Path(native.__file__).with_name("native.c")

# The hashes of a matrix of `stride` pairs a row as a stream of 32-bit numbers: down one column after the other, or,
# with a stride of 1, along a row as long as the counter. Another matrix follows the last column.
_PROGRAM = """
#include "native.c"
#include <stdlib.h>
#include <unif01.h>
#include <bbattery.h>
#include <swrite.h>

#define ROWS 16384
static uint32_t row, column, stride, key0, key1;
static int reversed;

static unsigned int next(void) {
    uint32_t bits = hash_bits((row * stride + column) * INDEX_FACTOR, key0, key1), mirrored = 0;
    row++;
    if (stride > 1 && row == ROWS) {
        row = 0, column++;
        if (column == stride) column = 0, key0 = key0 * 747796405u + 2891336453u, key1 += 0x9E3779B9u;
    }
    if (!reversed) return bits;
    for (int i = 0; i < 32; i++) mirrored |= ((bits >> i) & 1u) << (31 - i);
    return mirrored;
}

int main(int argc, char **argv) {
    stride = strtoul(argv[1], 0, 10), reversed = atoi(argv[2]);
    key0 = strtoul(argv[3], 0, 10), key1 = strtoul(argv[4], 0, 10);
    swrite_Basic = FALSE;
    bbattery_SmallCrush(unif01_CreateExternGenBits("hash", next));
    for (int i = 0; i < bbattery_NTests; i++)
        printf("p %s %.17g\\n", bbattery_TestNames[i], bbattery_pVal[i]);
    return 0;
}
"""


@pytest.fixture(scope="module")
def small_crush(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("battery") / "small_crush"
    program.with_suffix(".c").write_text(_PROGRAM)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    libraries = ["-ltestu01", "-ltestu01probdist", "-ltestu01mylib", "-lm"]
    includes = ["-I", str(_SOURCE.parent), "-I", "/usr/include/testu01"]
    command = [compiler, "-O2", "-w", *includes, str(program.with_suffix(".c")), "-o", str(program), *libraries]
    made = subprocess.run(command, capture_output=True, text=True)
    if "unif01.h" in made.stderr or "-ltestu01" in made.stderr:
        pytest.skip("TestU01 is not installed (Debian: libtestu01-0-dev)")
    assert made.returncode == 0, made.stderr
    return program


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stride", "mirrored"),
    [(1, 0), (1, 1), (512, 0), (2048, 0), (288, 1)],
    ids=["row", "row, low bits first", "column of 1024", "column of 4096", "column of 576, low bits first"],
)
def test_small_crush_finds_nothing(small_crush: Path, stride: int, mirrored: int) -> None:
    words = [word % 2**32 for word in key(0, 0, 0, f"battery {stride} {mirrored}")]
    command = [str(part) for part in (small_crush, stride, mirrored, *words)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    p_values = {line.rsplit(maxsplit=1)[0]: float(line.split()[-1]) for line in lines if line.startswith("p ")}
    assert len(p_values) >= 10
    # TestU01 calls a test failed from 1e-10 on; its suspects begin at 1e-3, and 75 values are looked at here.
    assert {name: p for name, p in p_values.items() if not 1e-5 < p < 1 - 1e-5} == {}


def _walsh_hadamard(values: Tensor) -> Tensor:
    """The orthonormal transform along the first dimension, whose size is a power of two."""
    size = len(values)
    values = values.reshape(size, -1)
    half = 1
    while half < size:
        pairs = values.view(size // (2 * half), 2, half, -1)
        values = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).view(size, -1)
        half *= 2
    return values / size**0.5


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_a_column_has_unit_variance_along_every_walsh_pattern(kind: NoiseKind) -> None:
    """Rows of a matrix whose width is a power of two differ in few bits of their index: patterns of bits lie there."""
    rows, width, keys = 512, 1024, 24
    total = torch.zeros(rows, dtype=torch.float64)
    index = torch.arange(rows * width, dtype=torch.int32)
    for number in range(keys):
        words = torch.tensor(key(5, 0, number, "columns"), dtype=torch.int32)
        noise = codes(index, words, kind).view(rows, width).double() * CODE_SCALE[kind]
        total += _walsh_hadamard(noise).square().sum(dim=1)
    samples = width * keys
    deviations = (total / samples - 1) / (2 / samples) ** 0.5  # of the variance of a normal, in standard errors
    assert deviations.abs().max() < 5  # of 512 patterns; one in a million is above 4.9
