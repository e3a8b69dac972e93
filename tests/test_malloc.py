"""The commands keep freed memory; a library's import and a user's own settings are left alone."""

import ctypes.util
import os
import subprocess
import sys

import pytest

import zolightning.__main__ as command

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (ctypes.util.find_library("c") or "").startswith("libc.so.6"),
    reason="glibc's allocator is what is told",
)

BLOCKS = """
{first}
def held():
    return int(open("/proc/self/statm").read().split()[1])  # pages
before = held()
for _ in range(20):
    blocks = [bytearray(2**22) for _ in range(6)]  # as the activations of a layer, all written
    del blocks
print(globals().get("kept"), held() - before)
"""
KEEP = "from zolightning.malloc import keep_freed_memory; kept = keep_freed_memory()"
PAGES = 6 * 2**22 // os.sysconf("SC_PAGE_SIZE")


def run(first: str, **environment: str) -> tuple[str, int]:
    """What was returned, and how many pages are held when blocks of `PAGES` have been freed."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", BLOCKS.format(first=first)]
    done = subprocess.run(words, env=ours | environment, capture_output=True, text=True, check=True)
    kept, pages = done.stdout.split()
    return kept, int(pages)


def test_freed_memory_is_kept() -> None:
    assert run("import zolightning")[1] < PAGES / 2
    kept, pages = run(KEEP)
    assert kept == "True" and pages > 0.9 * PAGES


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_hold(name: str) -> None:
    value = "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072"
    kept, pages = run(KEEP, **{name: value})
    assert kept == "False" and pages < PAGES / 2


def test_the_command_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(command, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(command, "main", lambda: calls.append("ran"))
    command.console()
    assert calls == ["kept", "ran"]
