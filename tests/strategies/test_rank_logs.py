"""What a run of several ranks logs is about the rows of all of them."""

from typing import Any

import pytest
import torch

import rank_logs
from forked_ranks import run_program

Results = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each run logged on each of two ranks, by (run, rank)."""
    folder = run_program(rank_logs.__file__, tmp_path_factory.mktemp("ranks"))
    words = {path: path.stem.rsplit("-", 1) for path in folder.glob("*.pt")}
    return {(name, int(rank)): torch.load(path, weights_only=True) for path, (name, rank) in words.items()}


def test_an_epoch_in_which_a_run_stops_logs_what_all_ranks_saw(results: Results) -> None:
    for rank in (0, 1):
        logged = results["logged", rank]
        assert logged["whole"].keys() >= {"error", "mean", "max", "sum", "early_mean", "early_max", "early_sum"}
        for name, value in logged["whole"].items():
            assert logged["in two parts"][name].item() == pytest.approx(value.item()), name


def test_means_over_ranks_are_of_all_examples_though_lightning_rounds_their_number_down(results: Results) -> None:
    """To 5 // 2 for each of two ranks, so that the mean of ones is 1.25."""
    for rank in (0, 1):
        for strategy, logged in results["means", rank].items():
            if strategy == "ddp":
                del logged["own"]  # somebody else's module under a strategy of Lightning's
            assert set(logged.values()) == {1.0}, strategy


def test_the_accuracy_of_a_step_is_the_mean_over_ranks(results: Results) -> None:
    """As its loss is, by backpropagation too; also where one has more micro-batches."""
    for rank in (0, 1):
        for strategy, logged in results["trained", rank].items():
            assert logged["train/accuracy"] == 0.5, strategy
            assert logged["train/loss"] == (pytest.approx(1 / 3) if strategy == "parts" else 0.5), strategy
