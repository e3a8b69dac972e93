"""Ranks hold the same weights, and do what one does with the same batches and queries."""

import subprocess
import sys
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import rank_runs
from forked_ranks import run_program
from rank_runs import RUNS
from zolightning.strategies import ZerothOrderDDP, ZerothOrderFSDP
from zolightning.strategies.ranks import Layout, checksum

Results = dict[tuple[str, int, int], dict[str, Any]]

SHARED = [name for name, (_, options, _) in RUNS.items() if options.get("size") == 2 and name != "two_dimensions"]
SPLIT = [name for name in RUNS if name not in SHARED]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each run left on rank r of n, by (run, r, n)."""
    folder = run_program(rank_runs.__file__, tmp_path_factory.mktemp("ranks"))
    found = {("log", 0, 0): {"text": (folder / "log.txt").read_text()}}
    for path in folder.glob("*.pt"):
        name, rank, _, ranks = path.stem.rsplit("-", 3)
        found[name, int(rank), int(ranks)] = torch.load(path, weights_only=True)
    return found


def ranks_of(name: str) -> int:
    return RUNS[name][2][0]


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, tensor in found.items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", RUNS)
class TestRanks:
    def test_hold_the_same_bits(self, results: Results, name: str) -> None:
        first, *others = (results[name, rank, ranks_of(name)] for rank in range(ranks_of(name)))
        assert len(first["steps"]) == first["global_step"] == rank_runs.STEPS
        for other in others:
            assert repr(first["steps"]) == repr(other["steps"])  # repr: nan is not nan
            assert first["global_step"] == other["global_step"]
            assert_same_weights(first["weights"], other["weights"])

    def test_write_one_ledger_that_replays_to_their_weights(self, results: Results, name: str) -> None:
        ranks = ranks_of(name)
        assert "replayed" not in results[name, 1, ranks]
        sealed, weights = results[name, 0, ranks]["replayed"]
        assert sealed
        for key, tensor in results[name, 1, ranks]["weights"].items():
            assert torch.equal(tensor, weights[key]) or "running" in key or "batches" in key, key


@pytest.mark.parametrize("name", SHARED)
def test_ranks_that_share_evaluations_have_the_bits_of_one(results: Results, name: str) -> None:
    both, one = results[name, 0, 2], results[name, 0, 1]
    assert repr(both["steps"]) == repr(one["steps"])
    assert_same_weights(both["weights"], one["weights"])


@pytest.mark.parametrize("name", SPLIT)
def test_ranks_that_split_the_batch_do_what_one_does(results: Results, name: str) -> None:
    """Up to the order of sums.

    A loss of order 1 is a mean of fp32 numbers, good to 1e-6; over 2 eps = 2e-3 (or eps) that is up to 1e-3 in a
    projected gradient of order 1, and after ten steps of lr = 1e-2 up to 1e-4 in a weight. In bf16, a
    different last bit of one activation weighs as much as 2^-8 of it, so that only losses are compared.
    """
    both, one = results[name, 0, ranks_of(name)], results[name, 0, 1]
    for step, expected in zip(both["steps"], one["steps"], strict=True):
        assert {key: step[key] for key in ("step", "seed", "lr", "forward_passes")} == {
            key: expected[key] for key in ("step", "seed", "lr", "forward_passes")
        }
        rough = name == "bf16"
        assert step["losses"] == pytest.approx(expected["losses"], rel=0.02 if rough else 1e-4, nan_ok=True)
        assert len(step["projected_grads"]) == len(expected["projected_grads"])
        if not rough:
            assert step["projected_grads"] == pytest.approx(expected["projected_grads"], abs=5e-3)
    if name != "bf16":
        for key, tensor in both["weights"].items():
            torch.testing.assert_close(tensor, one["weights"][key], rtol=0, atol=5e-4, msg=key)


def test_in_two_dimensions_they_have_the_bits_of_ranks_that_split_the_batch(results: Results) -> None:
    four, two = results["two_dimensions", 3, 4], results["losses_only", 0, 2]
    assert four["steps"] == two["steps"]
    assert_same_weights(four["weights"], two["weights"])


def test_a_batch_is_skipped_where_all_ranks_skip_it(results: Results) -> None:
    for rank, ranks in ((0, 2), (1, 2), (0, 1)):
        steps = results["none", rank, ranks]["steps"]
        assert [i for i, step in enumerate(steps) if not step["projected_grads"]] == [6]


@pytest.mark.parametrize("name", ["skipped", "signs"])
def test_a_step_that_is_bad_on_one_rank_is_skipped_by_both(results: Results, name: str) -> None:
    for rank, ranks in ((0, 2), (1, 2), (0, 1)):
        steps = results[name, rank, ranks]["steps"]
        assert [i for i, step in enumerate(steps) if not step["projected_grads"]] == [3]


def test_zo_ddp_does_what_ddp_does_with_a_bare_module(results: Results) -> None:
    stock, bare = results["plain", 0, 2], results["losses_only", 0, 2]
    assert (stock["model"], bare["model"]) == ("DistributedDataParallel", "Module")
    assert stock["steps"] == bare["steps"]
    assert_same_weights(stock["weights"], bare["weights"])


def test_lightnings_sampler_gives_a_group_the_same_rows_and_validation_other_ones(results: Results) -> None:
    first, second, one = (results["sampler", rank, ranks] for rank, ranks in ((0, 2), (1, 2), (0, 1)))
    assert torch.equal(first["rows"], one["rows"]) and torch.equal(second["rows"], one["rows"])
    assert_same_weights(first["weights"], one["weights"])
    validated = torch.cat([first["validated"], second["validated"]])
    assert torch.equal(validated.sort(0)[0], one["validated"].sort(0)[0])


def test_the_first_words_of_a_run_say_what_each_rank_does(results: Results) -> None:
    log = results["log", 0, 0]["text"]
    assert "ranks   4: 2 parts of a batch x 2 parts of a step's evaluations" in log
    assert "ranks   2: 2 parts of a batch\n" in log and "3 forward passes, 2 of them on the first rank;" in log


@pytest.mark.parametrize("rank", range(4))
def test_what_cannot_be_is_refused_before_the_first_step(results: Results, rank: int) -> None:
    refused = results["refused", rank, 4]
    message, step = refused["sgd"]
    assert "no gradients are averaged, but the optimizer is SGD. Use 'ddp'" in message and step == 0
    message, step = refused["few"]
    assert "`perturbation_parallel_size` is 4, but a step of HiZOO has 3 evaluations" in message and step == 0


@pytest.mark.parametrize(("name", "value"), [("perturbation_parallel_size", 0), ("check_interval", 0)])
def test_sizes_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer, at least 1, got 0"):
        ZerothOrderDDP(**{name: value})


def test_groups_must_divide_the_ranks() -> None:
    strategy = ZerothOrderDDP(perturbation_parallel_size=2)
    with pytest.raises(MisconfigurationException, match="is 2, which does not divide the number of ranks, 3"):
        L.Trainer(accelerator="cpu", devices=3, strategy=strategy)


_NODES = {
    "slurm": {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
    },
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    },
}


@pytest.mark.parametrize("launcher", _NODES)
def test_the_last_process_of_two_nodes_reads_the_rows_of_the_last_group(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which a Trainer sets, and is to be what it was afterwards
    for name, value in _NODES[launcher].items():
        monkeypatch.setenv(name, value)
    strategy = ZerothOrderDDP(perturbation_parallel_size=2)
    trainer = L.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy, logger=False)
    assert (trainer.world_size, trainer.global_rank) == (4, 3)
    assert trainer.distributed_sampler_kwargs == {"num_replicas": 2, "rank": 1}
    assert strategy.layout.perturbation_rank(trainer.global_rank) == 1


@pytest.mark.parametrize("strategy", [ZerothOrderDDP, ZerothOrderFSDP])
def test_a_sum_or_a_mean_has_no_barrier(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host would wait at it for its GPU, in every step that logs a mean."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch.distributed, "barrier", None)
        for operation in ("mean", "sum", "max", torch.distributed.ReduceOp.AVG):
            assert strategy().reduce(torch.tensor([1, 2]), reduce_op=operation).tolist() == [1, 2]
        assert strategy().reduce("no tensor") == "no tensor"
    finally:
        torch.distributed.destroy_process_group()


def test_a_layout_says_what_each_rank_does() -> None:
    layout = Layout(8, 2)
    assert [(layout.data_rank(rank), layout.perturbation_rank(rank)) for rank in range(5)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
    ]
    assert str(layout) == "8: 4 parts of a batch x 2 parts of a step's evaluations"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_a_checksum_changes_with_any_bit(dtype: torch.dtype, size: int) -> None:
    tensors = [torch.randn(3), torch.randn(size + 1).to(dtype)[1:], torch.zeros(()), torch.zeros(4)[::2][:1]]
    before = checksum(tensors, torch.device("cpu"))
    assert torch.equal(before, checksum([tensor.clone() for tensor in tensors], torch.device("cpu")))
    for place in {0, size // 2, size - 1}:
        changed = tensors[1].clone()
        bits = changed.view(torch.uint8)[place * dtype.itemsize :]
        bits[0] ^= 1
        assert not torch.equal(before, checksum([tensors[0], changed, *tensors[2:]], torch.device("cpu")))


@pytest.mark.slow
def test_a_command_leaves_the_process_group_when_it_ends() -> None:
    """Under Lightning's strategies too, which leave gloo's to the interpreter: it sometimes aborts then."""
    program = (
        "import atexit\n"
        "import torch.distributed as dist\n"
        "from zolightning import __main__ as command\n"
        "atexit.register(lambda: print('in a group' if dist.is_initialized() else 'left'))\n"
        "command.main = lambda: dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "command.console()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr
