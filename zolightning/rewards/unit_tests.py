"""Whether a program that a model has written passes its tests."""

import math
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from zolightning.checks import require_integer, require_positive
from zolightning.rank_zero import rank_zero_warn

_BLOCK = re.compile(r"```[^`\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_RUN = """\
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({memory},) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, ({file},) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, ({seconds},) * 2)
except (ImportError, ValueError, OSError):
    pass
import runpy
runpy.run_path("program.py", run_name="__main__")
"""
_FILE_BYTES = 2**20  # that a program may write, its traceback among them


class UnitTests:
    """The share of its tests that a text passes as a Python program, each run in a process of its own.

    The program is the text, or the first fenced block in it. A reference is the code of a test, usually asserts; it is
    appended to the program, and the test is passed if the end of that file is reached. A program that exits before that
    passes nothing. A test that fails counts 0, and `failures` counts it by the name of the error.

    **This executes what a model writes, with your rights.** A time limit, a memory limit, an empty working directory
    and an interpreter without your environment variables limit accidents, but do not stop malice: for models or data
    that you do not trust, start the run in a container without network and secrets.

    Args:
        timeout: seconds for one test; its process, and what that has started, is then killed.
        processes: how many tests run at once.
        memory_mib: address space of a process, in MiB, where the system knows such limits.

    Attributes:
        failures: how many tests failed, by the name of the error, and how many texts came with `no tests`.

    Example:
        >>> reward = UnitTests()
        >>> reward("def double(x): return 2 * x", ["assert double(3) == 6", "assert double([]) is None"])
        0.5

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, timeout: float = 10.0, processes: int = 2, memory_mib: int = 1024) -> None:
        require_positive("timeout", timeout)
        require_integer("processes", processes)
        require_integer("memory_mib", memory_mib, least=64)  # which Python itself needs
        self.timeout = timeout
        self.processes = processes
        self.memory_mib = memory_mib
        self.failures: dict[str, int] = {}

    def __call__(self, text: str, references: Sequence[str]) -> float:
        return self.all_of([(text, references)])[0]

    def all_of(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """The rewards of several texts, whose tests run side by side."""
        if bare := sum(not tests for _, tests in pairs):
            if "no tests" not in self.failures:
                rank_zero_warn("UnitTests got a row without references, its tests: the reward is 0, and it is counted.")
            self.failures["no tests"] = self.failures.get("no tests", 0) + bare
        programs = [(_program(text), test) for text, tests in pairs for test in tests]
        with ThreadPoolExecutor(self.processes) as pool:  # of threads that wait for processes
            errors = list(pool.map(self._error, programs))
        for name in filter(None, errors):
            self.failures[name] = self.failures.get(name, 0) + 1
        left = iter(errors)
        return [sum(next(left) is None for _ in tests) / max(1, len(tests)) for _, tests in pairs]

    def check(self, references: Sequence[str]) -> None:
        """Raises a ValueError if there are no tests, without which every program is worth 0."""
        if not any(test.strip() for test in references):
            raise ValueError("UnitTests needs a test in each row, as its references")

    def _error(self, program_and_test: tuple[str, str]) -> str | None:
        """The name of the error that ended a test; None if it was passed."""
        program, test = program_and_test
        passed = 64 + secrets.randbelow(64)  # an exit status that the program does not know
        # Processor time, on which `timeout` comes first: for programs whose run was killed, and kills them no more
        seconds = math.ceil(self.timeout) * (os.cpu_count() or 1) + 1
        run = _RUN.format(memory=self.memory_mib * 2**20, file=_FILE_BYTES, seconds=seconds)
        ending = f"import os as _os\n_os._exit({passed})\n"
        with tempfile.TemporaryDirectory() as folder, open(Path(folder, "stderr"), "wb") as stderr:
            Path(folder, "program.py").write_text(f"{program}\n{test}\n{ending}", encoding="utf-8", errors="replace")
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", run],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return "timeout"
            finally:
                _kill(process)
            if status == passed:
                return None
            lines = Path(folder, "stderr").read_text(encoding="utf-8", errors="replace").splitlines()
        return _name(lines, status)


def _program(text: str) -> str:
    """The first fenced block of a text, or all of it."""
    found = _BLOCK.search(text)
    return found[1] if found else text


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and what it has started, if any of that runs."""
    with suppress(ProcessLookupError, PermissionError):  # all have ended, or are not ours
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _name(lines: Sequence[str], status: int) -> str:
    """What ended a program: the last line of a traceback begins with the error's name."""
    found = re.match(r"[A-Za-z_][\w.]*", lines[-1]) if lines and status == 1 else None
    return found[0] if found else f"exit status {status}"
