"""Ranks that share their weights do what ranks do that hold all of them, to the last bit."""

from typing import Any

import pytest
import torch

import shard_runs
from forked_ranks import run_program
from shard_runs import REFUSED, RUNS

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of each run left, and the checkpoints, by the names of files."""
    folder = run_program(shard_runs.__file__, tmp_path_factory.mktemp("shards"))
    found = {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}
    return found | {path.name: torch.load(path, weights_only=False) for path in folder.glob("*.ckpt")}


def assert_same(found: Any, expected: Any) -> None:
    """Of checkpoints' states: tensors to the last bit, in whatever order entries were made."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("name", RUNS)
class TestShards:
    def test_give_the_bits_of_whole_weights(self, results: Results, name: str) -> None:
        shards, whole = results[f"{name}-fsdp-0"], results[f"{name}-ddp-0"]
        assert repr(shards["steps"]) == repr(whole["steps"]) == repr(results[f"{name}-fsdp-1"]["steps"])
        assert len(shards["steps"]) == shard_runs.STEPS and torch.equal(shards["loss"], whole["loss"])
        for part in ("state_dict", "optimizer_states"):
            assert_same(results[f"{name}-fsdp.ckpt"][part], results[f"{name}-ddp.ckpt"][part])

    def test_are_of_a_part_of_the_weights(self, results: Results, name: str) -> None:
        total = results[f"{name}-ddp-0"]["held"]
        held = [results[f"{name}-fsdp-{rank}"]["held"] for rank in range(2)]
        # Each row once, and what is not sharded twice. A parameter of one row is on the first rank.
        twice = {"own_shards": shard_runs.WORDS * shard_runs.WIDTH, "both_sides": shard_runs.WORDS, "blocks": 2}
        assert sum(held) == total + twice.get(name, 0) and min(held) > 0.3 * total

    def test_are_close_to_one_process(self, results: Results, name: str) -> None:
        shards, one = results[f"{name}-fsdp-0"], results[f"{name}-one-0"]
        for found, expected in zip(shards["steps"], one["steps"], strict=True):
            torch.testing.assert_close(
                torch.tensor(found["losses"]), torch.tensor(expected["losses"]), atol=1e-4, rtol=0, equal_nan=True
            )
        for key, tensor in results[f"{name}-fsdp.ckpt"]["state_dict"].items():
            torch.testing.assert_close(tensor, results[f"{name}-one.ckpt"]["state_dict"][key], atol=1e-3, rtol=1e-2)

    def test_go_on_from_whole_weights(self, results: Results, name: str) -> None:
        resumed = results[f"{name}-fsdp-after-ddp-0"]
        assert len(resumed["steps"]) == shard_runs.BATCHES and resumed["loads"] == 1
        for part in ("state_dict", "optimizer_states"):
            assert_same(results[f"{name}-fsdp-after-ddp.ckpt"][part], results[f"{name}-ddp.ckpt"][part])

    def test_are_saved_as_whole_weights_are(self, results: Results, name: str) -> None:
        """So a run of whole weights goes on from it as from its own, after an epoch and in the middle of one."""
        for moment in ("begun", "middle"):
            found, expected = (results[f"{name}-{run}-{moment}.ckpt"] for run in ("fsdp", "ddp"))
            assert found.keys() == expected.keys()
            for part in ("state_dict", "optimizer_states", "loops", "epoch", "global_step"):
                assert_same(found[part], expected[part])
        (state,) = results[f"{name}-fsdp-middle.ckpt"]["optimizer_states"]
        has_pending = any("base" in entries for entries in state["state"].values())
        assert has_pending == ("waits" in RUNS[name][1])

    def test_are_gone_on_with_by_one_rank(self, results: Results, name: str) -> None:
        steps = results[f"{name}-one-after-fsdp-0"]["steps"]
        for found, expected in zip(steps, results[f"{name}-fsdp-0"]["steps"][-len(steps) :], strict=True):
            torch.testing.assert_close(
                torch.tensor(found["losses"]), torch.tensor(expected["losses"]), atol=1e-4, rtol=0, equal_nan=True
            )

    def test_leave_a_ledger_that_replays_to_the_weights(self, results: Results, name: str) -> None:
        sealed, weights = results[f"{name}-fsdp-0"]["replayed"]
        assert sealed
        assert_same(weights, dict(results[f"{name}-fsdp.ckpt"]["state_dict"]))
        assert "replayed" not in results[f"{name}-fsdp-1"]


def test_shards_go_on_with_pending_updates(results: Results) -> None:
    for part in ("state_dict", "optimizer_states"):
        found, expected = (results[f"factors-{run}-after-middle.ckpt"][part] for run in ("fsdp", "ddp"))
        assert_same(found, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_not_been_made_is_refused_before_the_first_step(results: Results, name: str) -> None:
    for rank in range(2):
        message, step = results[f"refused-{rank}"][name]
        assert name in message and "\n" not in message and step == 0
        assert "'zo_ddp'" in message or any(found in name for found in ("SGD", "'blocks'", "'meta'"))
