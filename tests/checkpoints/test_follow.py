"""A run that trains elsewhere is followed by its ledger."""

from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from optimizer_steps import MakeProblem, Method, assert_same, attached, bits, weights
from zolightning.checkpoints.follow import follow
from zolightning.checkpoints.ledger import DamagedLedgerError, Ledger
from zolightning.checkpoints.ledger_header import describe_run
from zolightning.checkpoints.replay import Replayed
from zolightning.optim import LOZO, MeZO
from zolightning.weights_digest import weights_digest


class Training:
    """A run that takes some steps whenever it is asked whether it is still going on."""

    def __init__(self, make_problem: MakeProblem, method: Method, path: Path) -> None:
        self.problem = make_problem()
        self.optimizer = attached(method, self.problem, seed=9)
        self.optimizer.param_groups[0]["step"] = 10  # it has been trained before
        self.optimizer.fold_every_step = False
        self.ledger = Ledger.create(path, describe_run(self.optimizer, self.problem))
        self.ledger.go_on(0)
        self.weights = {}

    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            record = self.optimizer.estimate(self.problem)
            self.optimizer.step()
            self.ledger.append(record)
        self.weights[record.step + 1] = weights(self.problem)


@pytest.mark.parametrize("method", [partial(MeZO, lr=0.02), partial(LOZO, lr=0.03, rank=2, momentum=0.9)], ids=str)
def test_each_look_is_at_the_newest_step(
    make_problem: MakeProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    training, plan, seen = Training(make_problem, method, tmp_path / "ledger.bin"), [0, 3, 1, 0, 4], []

    def is_written(_: Ledger) -> bool:
        if not plan:
            return False
        if steps := plan.pop(0):
            training.go_on(steps)
        if not plan:
            training.optimizer.fold()
            training.ledger.close(weights_digest(dict(training.problem.named_parameters())))
        return True

    def evaluate(step: int) -> None:
        seen.append(step)
        assert_same({name: bits(weight) for name, weight in replayed.named_parameters()}, training.weights[step])

    monkeypatch.setattr(Ledger, "is_written", is_written)
    replayed = make_problem()
    assert follow(tmp_path / "ledger.bin", replayed, method, evaluate, seconds=0.0) == Replayed(8, True)
    assert seen == [13, 14, 18]
    assert_same(weights(replayed), weights(training.problem))


@pytest.mark.parametrize("steps", [2, 6])
def test_a_run_that_was_set_back_is_not_followed(
    make_problem: MakeProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    training, other = (
        Training(make_problem, partial(MeZO, lr=lr), tmp_path / name)
        for lr, name in ((0.02, "ledger.bin"), (0.03, "other.bin"))
    )
    training.go_on(5)
    other.go_on(steps)
    training.ledger.close()
    other.ledger.close()

    def set_back(step: int) -> None:
        training.ledger.path.write_bytes(other.ledger.path.read_bytes())

    monkeypatch.setattr(Ledger, "is_written", lambda _: True)
    with pytest.raises(DamagedLedgerError, match="no longer has the 5 steps that were followed"):
        follow(tmp_path / "ledger.bin", make_problem(), partial(MeZO, lr=0.02), set_back)


def test_one_process_writes(make_problem: MakeProblem, tmp_path: Path) -> None:
    training, context = Training(make_problem, MeZO, tmp_path / "ledger.bin"), get_context("fork")
    training.ledger.close()
    opened, done = context.Event(), context.Event()

    def write() -> None:
        ledger = Ledger(tmp_path / "ledger.bin")
        ledger.go_on(0)
        opened.set()
        done.wait(60)

    process = context.Process(target=write)
    process.start()
    assert opened.wait(60)
    ledger = Ledger(tmp_path / "ledger.bin")
    assert ledger.is_written()
    with pytest.raises(BlockingIOError, match="is being written by another process: its run has not ended"):
        ledger.go_on(0)
    process.kill()
    process.join()
    assert not ledger.is_written()
