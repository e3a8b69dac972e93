"""Every method can be replayed from its records and resumed from its state, bit for bit."""

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizer_steps import (
    METHODS_AND_DTYPES,
    MakeProblem,
    Method,
    assert_same,
    assert_same_state,
    attached,
    run,
    weights,
)
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.ledger_header import describe_run
from zolightning.checkpoints.replay import replay
from zolightning.optim import SubspaceOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")


def round_trip(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class TestRecords:
    @METHODS_AND_DTYPES
    def test_replaying_them_gives_the_same_weights(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        problem, replayed = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem, [{"params": problem.named_parameters()}], seed=9)
        ledger = Ledger.create(tmp_path / "ledger.bin", describe_run(optimizer, problem))
        assert ledger.entry_size <= 64 * optimizer.num_queries
        ledger.go_on(0)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for step in range(12):
            bad = step == 5
            if step == 8 and isinstance(optimizer, SubspaceOptimizer):
                optimizer.resample()
            record = optimizer.estimate(lambda bad=bad: problem() * (float("nan") if bad else 1), skip_nonfinite=True)
            optimizer.step()
            scheduler.step()
            ledger.append(record)
        ledger.close()
        # A process that knows neither seed nor schedule
        fresh = attached(method, replayed, seed=456)
        fresh.param_groups[0]["lr"] = 123.0
        for record in ledger.records():
            fresh.apply(record)
        fresh.fold()  # as the last step did
        assert_same(weights(replayed), weights(problem))
        if dtype == torch.bfloat16:
            from_file = make_problem(dtype)
            replay(ledger.path, from_file, method)
            assert_same(weights(from_file), weights(problem))
        for group in (*fresh.param_groups, *optimizer.param_groups):
            for name in ("lr", "seed", "initial_lr"):
                group.pop(name, None)
        assert_same_state(fresh, optimizer)

    def test_a_record_says_what_happened(self, method: Method, make_problem: MakeProblem) -> None:
        problem, losses = make_problem(), []
        optimizer = attached(method, problem, seed=9)
        run(problem, optimizer, 2)

        def loss() -> Tensor:
            losses.append(problem().item())
            return problem()

        record = optimizer.estimate(loss)
        assert record is optimizer.record
        assert (record.step, record.seed, record.lr) == (2, 9, (optimizer.param_groups[0]["lr"],))
        assert len(record.projected_grads) == optimizer.num_queries
        assert record.loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert record.forward_passes == len(losses) == len(optimizer.estimator.probes(optimizer.num_queries))
        assert optimizer.param_groups[0]["step"] == 2
        optimizer.step()
        assert optimizer.param_groups[0]["step"] == 3
        assert optimizer.param_groups[0]["forward_passes"] == 3 * record.forward_passes


class TestStateDict:
    @pytest.mark.filterwarnings("ignore:.* continues as in the checkpoint")
    @METHODS_AND_DTYPES
    def test_a_restored_run_goes_on_as_if_nothing_had_happened(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, restored = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem, seed=9)
        run(problem, optimizer, 4)
        restored.load_state_dict(problem.state_dict())
        fresh = attached(method, restored, lr=123.0, seed=456)
        fresh.load_state_dict(round_trip(optimizer.state_dict()))
        assert_same_state(fresh, optimizer)
        assert run(restored, fresh, 4) == run(problem, optimizer, 4)
        assert_same(weights(restored), weights(problem))
        assert_same_state(fresh, optimizer)

    @METHODS_AND_DTYPES
    def test_state_is_kept_wide_and_not_shared(
        self, method: Method, make_problem: MakeProblem, dtype: torch.dtype
    ) -> None:
        problem, other = make_problem(dtype), make_problem(dtype)
        optimizer = attached(method, problem)
        run(problem, optimizer, 2)
        fresh = attached(method, other)
        fresh.load_state_dict(optimizer.state_dict())
        fresh.estimate(other)  # makes what is not in the state but follows from it
        for parameter, twin in zip(problem.parameters(), other.parameters(), strict=True):
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    assert value.dtype in (torch.float32, torch.int16, torch.int8) or name == "mask", name
                    assert value.data_ptr() != fresh.state[twin][name].data_ptr()
        assert optimizer.state_bytes() == fresh.state_bytes()

    def test_hyperparameters_live_in_groups(self, method: Method, make_problem: MakeProblem) -> None:
        optimizer = method(make_problem().parameters())
        assert {"lr", "eps", "step", "seed", "forward_passes"} <= optimizer.defaults.keys()
        assert optimizer.defaults.keys() <= optimizer.param_groups[0].keys()
        assert type(optimizer).__name__ in repr(optimizer)
