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
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from checkpoint_runs import AS_EXPECTED, EVERY_6, MEZO, Killed, Run, Validated, die
from zolightning.blocks import Bandit, GaussSouthwellSweep
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    MomentumTransport,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.checkpoints.checkpoint_io import DamagedCheckpointError
from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.commands.run_folder import event_files
from zolightning.optim import ZOMOPI, HiZOO, MeZO, MeZOAdam, SubZero

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


def steps_evaluated(run: Run) -> set[int]:
    """Remembers in which steps the loss of a run is evaluated."""
    own, found = run.module.training_step, set()

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        found.add(run.trainer.global_step)
        return own(batch, batch_idx)

    run.module.training_step = training_step
    return found


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


@pytest.mark.parametrize("kill", [0, 1, 5])
def test_before_the_first_checkpoint(
    ledger_run: MakeRun, make_whole: MakeRun, monkeypatch: pytest.MonkeyPatch, kill: int
) -> None:
    """With a later release, too."""
    killed = ledger_run()
    killed.module.in_step.at[kill] = die
    with pytest.raises(Killed):
        killed.fit()
    assert not killed.path.exists()
    monkeypatch.setattr("zolightning.checkpoints.ledger_header.this_release", lambda: "later")
    resumed = ledger_run(go_on=True)
    evaluated = steps_evaluated(resumed)
    resumed.fit()
    assert evaluated == set(range(kill, 20))
    resumed.assert_ends_as(make_whole())
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(20, True)
    resumed.trainer.fit_loop.epoch_loop.max_steps = 21  # a second fit, in which nothing is to go on
    assert len(Ledger(resumed.fit().keep.path)) == 1


def test_before_the_first_checkpoint_only_with_the_same_model_and_settings(ledger_run: MakeRun) -> None:
    ledger_run(max_steps=3).fit().path.unlink()
    other = ledger_run(go_on=True, method=partial(MeZO, lr=2e-2))
    with torch.no_grad():
        other.module.net[0].bias.add_(1)
    with pytest.raises(
        MisconfigurationException, match="belongs to a run with different `method`, `groups`, `weights`"
    ):
        other.fit()


def test_a_change_in_the_steps_after_the_checkpoint_is_found(ledger_run: MakeRun, make_whole: MakeRun) -> None:
    """Steps from there on are taken again."""
    killed = ledger_run(last={"every_n_train_steps": 3})
    killed.module.in_step.at[5] = die
    with pytest.raises(Killed):
        killed.fit()
    path = killed.path.with_name("ledger.bin")
    content = bytearray(path.read_bytes())
    content[-10] ^= 1  # in the entry of step 4
    path.write_bytes(content)
    resumed = ledger_run()
    evaluated = steps_evaluated(resumed)
    with pytest.warns(
        UserWarning, match=r"damaged: the entry of step 4, .* is corrupted.*The run continues after these"
    ):
        resumed.fit("last")
    assert evaluated == set(range(4, 20))
    resumed.assert_ends_as(make_whole())
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(20, True)


def test_from_another_checkpoint_than_the_last_it_begins_there(ledger_run: MakeRun, make_whole: MakeRun) -> None:
    first = ledger_run(max_steps=12, last={"every_n_train_steps": 4})
    older = first.path.with_name("older.ckpt")
    first.module.in_step.at[5] = lambda: older.write_bytes(first.path.read_bytes())
    first.fit()
    resumed = ledger_run()
    evaluated = steps_evaluated(resumed)
    resumed.fit(older)
    assert evaluated == set(range(4, 20))
    resumed.assert_ends_as(make_whole())


def test_bases_lie_beside_the_ledger(ledger_run: MakeRun, tmp_path: Path) -> None:
    """In a copy too; where one is missing, changed or of another run, nothing is replayed."""
    bases = [SubspaceResampling(3, bases=ActivationBases(examples="batch", refresh=True)) for _ in range(2)]
    first = ledger_run(method=LOW_RANK, callbacks=bases[:1], max_steps=5).fit()
    names = ["ledger-bases-1.pt", "ledger-bases-2.pt"]
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == names
    second = ledger_run("other", method=LOW_RANK, callbacks=bases[1:]).fit(first.path.rename(tmp_path / "run/a.ckpt"))
    assert replay(second.keep.path, Validated(), LOW_RANK) == Replayed(20, True)

    files = [tmp_path / "other" / name for name in names]
    (tmp_path / "other/ledger-bases-9.pt").write_bytes(content := files[1].read_bytes())
    torch.save(torch.load(files[1], weights_only=True) | {"ledger": 1}, files[1])
    with pytest.raises(ValueError, match="belong to a different run from"):
        replay(second.keep.path, Validated(), LOW_RANK)
    files[1].write_bytes(content[:-9])
    with pytest.raises(DamagedCheckpointError, match=r"ledger-bases-2.pt is damaged: it is truncated"):
        replay(second.keep.path, Validated(), LOW_RANK)
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"ledger-bases-2.pt does not exist"):
        replay(second.keep.path, Validated(), LOW_RANK)


def test_a_step_that_was_saved_and_not_logged_is_logged_when_the_run_goes_on(
    ledger_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning logs a step after the last hook in which it can be saved."""

    def tensorboard() -> TensorBoardLogger:
        return TensorBoardLogger(tmp_path / "run", name="", version="")

    options: dict[str, Any] = {"max_steps": 8, "log_every_n_steps": 1, "last": {"every_n_train_steps": 5}}
    logger = tensorboard()
    own = logger.log_metrics
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step: die() if step == 4 else own(metrics, step))
    with pytest.raises(Killed):
        ledger_run(**options, logger=logger).fit(validate=False)
    for _ in range(2):  # the second one finds it there
        ledger_run(**options, logger=tensorboard()).fit("last", validate=False)
        events = [EventAccumulator(str(file)).Reload() for file in event_files(tmp_path / "run")]
        for tag in ("zo/lr", "zo/projected_grad", "train/loss"):
            scalars = [event for file in events if tag in file.Tags()["scalars"] for event in file.Scalars(tag)]
            assert [event.step for event in scalars] == list(range(8)), tag


def test_a_step_that_was_logged_and_not_written_is_logged_once(
    ledger_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run without a checkpoint."""
    append = Ledger.append
    loggers = [TensorBoardLogger(tmp_path / "run", name="", version="") for _ in range(2)]
    options: dict[str, Any] = {"max_steps": 6, "log_every_n_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Ledger, "append", lambda ledger, r: die() if r.step == 3 else append(ledger, r))
        ledger_run(**options, logger=loggers[0]).fit(validate=False)
    loggers[0].finalize("failed")
    assert len(Ledger(tmp_path / "run/ledger.bin")) == 3
    ledger_run(**options, logger=loggers[1], go_on=True).fit(validate=False)
    events = [EventAccumulator(str(file)).Reload() for file in event_files(tmp_path / "run")]
    scalars = [event for file in events for event in file.Scalars("zo/lr")]
    assert [event.step for event in scalars] == list(range(6))


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


def test_a_run_that_was_killed_before_its_seal_gets_one(ledger_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ledger_run(max_steps=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(KeepLedger, "on_fit_end", lambda *_: die())
        run.fit(validate=False)
    assert replay(run.path.with_name("ledger.bin"), Validated(), MEZO) == Replayed(5, None)
    resumed = ledger_run(max_steps=5).fit("last", validate=False)
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(5, True)


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
