"""A run of the command line that is killed at any change of its files ends as if it had not been."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import killed_writes
from forked_ranks import run_program


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("offset", range(4))  # a quarter of the moments each
def test_a_run_killed_at_a_change_of_its_files_ends_as_others_do(
    tmp_path: Path, write_tiny_model: Callable[..., Path], offset: int
) -> None:
    """With the same weights, optimizer, ledger, bases, config, curves and metrics; and one that was killed before."""
    write_tiny_model(tmp_path / "model")
    run_program(killed_writes.__file__, tmp_path, 4, offset, seconds=3500)
    found = json.loads((tmp_path / "found.json").read_text())
    assert {moment["begun"] for moment in found if moment["code"]} == {"nothing", "in a step"}
    assert [moment for moment in found if moment.get("error") or moment["differs"]] == []
