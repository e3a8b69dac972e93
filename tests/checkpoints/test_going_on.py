"""A run that was killed goes on after the last step of its ledger, which takes no forward passes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from checkpoint_runs import AS_EXPECTED, EVERY_6, MEZO, Killed, Run, Validated, die, steps_evaluated
from zolightning.blocks import Bandit, GaussSouthwellSweep
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    MomentumTransport,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.optim import ZOMOPI, HiZOO, MeZOAdam, SubZero

pytestmark = AS_EXPECTED
MakeRun = Callable[..., Run]
MOPI = partial(ZOMOPI, lr=0.05, rank=3, power_rank=1, vector_lr=0.04, momentum=0.8, eps=0.3)
LOW_RANK = partial(SubZero, lr=0.03, rank=2, momentum=0.9)
BLOCKS = {"patterns": [r"net\.0", r"net\.2"], "interval": 3}


class Counts(Callback):
    """Something that a callback has in checkpoints, by which it can be told whether it saw each step once."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Monitors(Callback):
    """What an EarlyStopping of the training loss sees."""

    monitor = "train/loss"

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.found[trainer.global_step] = float(trainer.callback_metrics[self.monitor])


def with_schedule(run: Run) -> Run:
    (zeroth_order,) = (callback for callback in run.trainer.callbacks if isinstance(callback, ZerothOrder))
    zeroth_order.lr_scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)
    return run


@pytest.mark.parametrize(
    ("method", "callbacks", "options", "measured"),
    [
        (MEZO, list, {}, set()),
        (MEZO, list, {"precision": "64-true"}, set()),
        (partial(MeZOAdam, lr=0.01, eps=0.3, num_queries=2), list, {"precision": "bf16-true"}, set()),
        (partial(HiZOO, lr=0.01), lambda: [BlockCoordinateDescent(Bandit(queries=1), **BLOCKS)], {}, {6, 9}),
        # An order that measures does so again, at the beginning of a visit
        (MEZO, lambda: [BlockCoordinateDescent(GaussSouthwellSweep(), **BLOCKS, left_state="keep")], {}, {6, 9}),
        (MOPI, lambda: [SubspaceResampling(4, anchor=1), MomentumTransport("keep")], {"precision": "bf16-true"}, set()),
        # Bases from inputs are looked for again, and are those that were found before
        (LOW_RANK, lambda: [SubspaceResampling(4, bases=ActivationBases(examples="batch", refresh=True))], {}, set()),
    ],
    ids=["mezo", "double", "adam", "hizoo-bandit", "measured-blocks", "zo-mopi", "activations"],
)
def test_it_goes_on_where_it_was(
    ledger_run: MakeRun,
    tmp_path: Path,
    method: Any,
    callbacks: Callable[[], list[Callback]],
    options: dict[str, Any],
    measured: set[int],
) -> None:
    def run(folder: str = "run", **more: Any) -> Run:
        counts = Counts()
        made = ledger_run(folder, method=method, callbacks=[*callbacks(), counts], **EVERY_6, **options, **more)
        made.counts = counts
        return with_schedule(made)

    whole = run("whole").fit()
    killed = run(last={"every_n_train_steps": 6})
    killed.module.in_step.at[11] = die
    with pytest.raises(Killed):
        killed.fit()
    assert len(Ledger(tmp_path / "run/ledger.bin")) == 11 and killed.saved()["global_step"] == 6

    resumed = run()
    evaluated = steps_evaluated(resumed)
    resumed.fit("last")
    assert evaluated == measured | set(range(11, 20))
    resumed.assert_ends_as(whole)
    assert resumed.watch.grads == {step: grads for step, grads in whole.watch.grads.items() if step > 6}
    assert killed.watch.validated | resumed.watch.validated == whole.watch.validated
    assert resumed.counts.seen == whole.counts.seen
    assert resumed.keep.path.read_bytes() == whole.keep.path.read_bytes()
    assert replay(resumed.keep.path, Validated(), method) == Replayed(20, True)


class Counting(Validated):
    """Writes to itself in every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.global_step % 3 == 0:
            self.mean.mul_(0.5).add_(loss.detach())
        return loss


def test_a_loss_that_writes_to_the_module_is_evaluated_for_that(ledger_run: MakeRun) -> None:
    def run(folder: str = "run", **options: Any) -> Run:
        made = ledger_run(folder, **EVERY_6, **options)
        made.module = Counting()
        return made

    whole, killed = run("whole").fit(), run()
    killed.module.in_step.at[9] = die
    with pytest.raises(Killed):
        killed.fit()
    resumed = run()
    evaluated = steps_evaluated(resumed)
    resumed.fit("last")
    assert evaluated == {6, *range(9, 20)}
    resumed.assert_ends_as(whole)
    assert torch.equal(resumed.module.mean, whole.module.mean)


def test_a_callback_that_waits_for_a_metric_of_training_has_it(ledger_run: MakeRun) -> None:
    def run(folder: str = "run", **options: Any) -> Run:
        made = ledger_run(folder, callbacks=[Monitors()], last={"every_n_train_steps": 4}, max_steps=10, **options)
        made.monitors = next(callback for callback in made.trainer.callbacks if isinstance(callback, Monitors))
        return made

    whole, killed = run("whole").fit(validate=False), run()
    killed.module.in_step.at[7] = die
    with pytest.raises(Killed):
        killed.fit(validate=False)
    resumed = run()
    evaluated = steps_evaluated(resumed)
    resumed.fit("last", validate=False)
    assert evaluated == set(range(4, 10))
    resumed.assert_ends_as(whole)
    assert resumed.monitors.found == {step: loss for step, loss in whole.monitors.found.items() if step > 4}
    resumed.trainer.fit_loop.epoch_loop.max_steps = 12  # a second fit
    resumed.fit(validate=False)
    assert Ledger(resumed.keep.path).header.first_step == 10


def test_a_run_may_end_among_the_steps_that_it_takes(ledger_run: MakeRun, tmp_path: Path) -> None:
    """The Trainer then has its loggers back, and the ledger ends there, too."""
    killed = ledger_run(last={"every_n_train_steps": 3})
    killed.module.in_step.at[5] = die
    with pytest.raises(Killed):
        killed.fit()
    logger = TensorBoardLogger(tmp_path / "logs")
    resumed = ledger_run(max_steps=4, logger=logger, log_every_n_steps=1).fit("last")
    assert resumed.trainer.loggers == [logger]
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(4, True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_that_has_ended_ends_again_with_the_same_weights(ledger_run: MakeRun) -> None:
    """Early, and with averages of the weights in their place."""

    def run() -> Run:
        stopping = EarlyStopping("val/loss", patience=1, min_delta=9.0)
        return ledger_run(callbacks=[stopping, EMAWeightAveraging(decay=0.5)], **EVERY_6)

    ended, again = run().fit(), run()
    ledger = ended.keep.path.read_bytes()
    again.fit("last").assert_ends_as(ended)
    assert ended.trainer.global_step == 12 and not again.watch.grads
    assert again.keep.path.read_bytes() == ledger
    steps = [run.trainer.fit_loop.epoch_loop._batches_that_stepped for run in (ended, again)]  # of what a test logs
    assert steps == [12, 12]
    assert ended.trainer.current_epoch == again.trainer.current_epoch == 2
    longer = ledger_run(callbacks=[EMAWeightAveraging(decay=0.5)], **EVERY_6).fit("last")
    assert longer.trainer.global_step == 20  # as nothing stops it any more


class HeadByGradient(Validated):
    """Hands its body to a zeroth-order method, and trains its head itself."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.optim.AdamW(self.net[2].parameters(), lr=1e-2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1)

    def on_train_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        with torch.enable_grad():
            self.own.zero_grad()
            F.mse_loss(self.net[2](self.net[:2](batch[0]).detach()), batch[1]).backward()
            self.own.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = self.own.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.own.load_state_dict(checkpoint["own"])


def test_layers_that_the_module_trains_by_backpropagation_go_on_too(ledger_run: MakeRun) -> None:
    def run(folder: str, dies: bool = False, **options: Any) -> Run:
        made = ledger_run(folder, **options, **EVERY_6)
        made.module = HeadByGradient()
        made.module.in_step.at |= {9: die} if dies else {}
        return made

    whole, killed = run("whole").fit(), run("killed", dies=True)
    with pytest.raises(Killed):
        killed.fit()
    again = run("killed")
    again.fit(ckpt_path=again.path)
    again.assert_ends_as(whole)
    before, base = HeadByGradient(), HeadByGradient()
    assert not any(torch.equal(p, q) for p, q in zip(before.parameters(), whole.module.parameters(), strict=True))
    assert replay(whole.keep.path, base, MEZO).sealed is False  # it knows nothing of the head
