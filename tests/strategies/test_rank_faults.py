"""What happens to a run of two ranks when something happens to one of them."""

import re
from pathlib import Path

import pytest
import torch

import rank_faults
from forked_ranks import run_program

LOST = r"RanksError: Rank {} waited in vain for the other ranks after step 5: one of them has .* \(.*\)\. Resume"
LOST_IN_COMMAND = (
    r"SystemExit: error: A rank waited in vain for the others: one of them has ended or hangs \(.*\)\. A fit"
)
WEIGHTS = "RanksError: The weights of rank 1 are not those of rank 0 before step 8, but they were 4 steps ago"
ROWS = "RanksError: Rank 1 was given a different batch from rank 0 at step 0, but .*`perturbation_parallel_size` is 2"
LENGTHS = "RanksError: Rank 1 has 9 batches an epoch and rank 0 has 10"
NAN = "NonFiniteLossError: The loss is not finite at step 2: .*, nan"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what each rank of each case failed of, and what runs have that go on."""
    return run_program(rank_faults.__file__, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("weight", WEIGHTS, WEIGHTS),
        ("state", WEIGHTS, WEIGHTS),
        ("core", WEIGHTS, WEIGHTS),
        ("rows", ROWS, ROWS),
        ("lengths", LENGTHS, LENGTHS),
        ("nan", NAN, NAN),
        ("killed", LOST.format(0), None),
        ("outside_of_a_step", LOST_IN_COMMAND, None),
        ("told_before_training", "SystemExit: 143", LOST_IN_COMMAND),
        ("first_killed", None, LOST.format(1)),
        ("hangs", LOST.format(0), LOST.format(1)),
        ("ends", LOST.format(0), None),
        ("fails", LOST.format(0), "MemoryError: too large"),
    ],
)
def test_each_rank_says_in_a_line_why_it_ends(folder: Path, case: str, first: str | None, second: str | None) -> None:
    for rank, expected in enumerate((first, second)):
        path = folder / f"{case}-{rank}.txt"
        assert path.exists() is (expected is not None)
        if expected is not None:
            line = path.read_text().splitlines()[-1]
            assert re.search(expected, line), line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_rank_was_killed_goes_on_as_if_it_had_not_been(folder: Path, ranks: int) -> None:
    whole, resumed = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("whole", f"resumed_by_{ranks}"))
    for key, tensor in resumed.items():
        assert torch.equal(tensor, whole[key]), key
