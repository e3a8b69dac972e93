"""Two ranks that are killed three times go on as one, and a replay has the weights of both."""

import json
from pathlib import Path

import pytest

import killed_ranks
from forked_ranks import run_program


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_killed_three_times_and_resumed_by_one(tmp_path: Path) -> None:
    folder = run_program(killed_ranks.__file__, tmp_path, seconds=850)
    found = json.loads((folder / "hashes.json").read_text())
    for strategy in killed_ranks.STRATEGIES:
        run = found[strategy]
        assert run["codes"] == [[-9, -9], [-9, 1], [-9, -9]]  # the rank that is left says so and ends
        assert run["replayed"] == [run["trained"], True]
        assert run["killed last"] == run["whole at 12"]
        # Ranks that share a batch sum its losses in another order than one does.
        assert (run["trained"] == run["whole"]) == strategy.endswith("shared")
        if strategy == "zo_fsdp":  # with whole weights the two ranks did the same
            assert run["whole"] == found["zo_ddp"]["whole"]
