"""Runs that are killed at random moments end as if they had not been."""

import json
from pathlib import Path

import pytest

import killed_runs
from forked_ranks import run_program


@pytest.mark.parametrize(
    ("kills", "seed"), [(4, 3), pytest.param(40, 1, marks=pytest.mark.slow)], ids=["four", "forty"]
)
@pytest.mark.timeout(900)
def test_killed_runs_end_as_others_do(tmp_path: Path, kills: int, seed: int) -> None:
    """With the same weights, ledger, checkpoints and curves, and a replay has the same weights."""
    found = json.loads(
        (run_program(killed_runs.__file__, tmp_path, kills, seed, seconds=850) / "found.json").read_text()
    )
    assert len(found["killed"]) >= kills and found["differences"] == []
    assert len({killed["place"] for killed in found["killed"]}) >= min(kills, len(killed_runs.PLACES))
