"""Runs under a Trainer keep a ledger that describes them, stopped and resumed as they may be."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from checkpoint_runs import AS_EXPECTED, MEZO, Killed, Run, Validated, die
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    MomentumTransport,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.directions.slices import Slice
from zolightning.optim import ZOMOPI, MeZO, MeZOAdam, SubZero
from zolightning.scopes.scope import Scope, Selection
from zolightning.step import zeroth_order_step

pytestmark = AS_EXPECTED


def assert_replays(run: Run, method: Any, step: int | None = None, sealed: bool | None = True) -> None:
    module = Validated()
    found = replay(run.keep.path, module, method, step)
    assert found == Replayed(20 if step is None else step, sealed)
    if step is None:
        for (name, one), other in zip(module.named_parameters(), run.module.parameters(), strict=True):
            assert torch.equal(one, other), name


class SomeColumns(Scope):
    """Two columns of one weight, and a bias."""

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        return Selection({"net.0.weight": Slice(1, torch.tensor([0, 3])), "net.2.bias": None}, "some columns")


class Decayed(Validated):
    """Two parameter groups, of which one has no weight decay."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[2].parameters(), "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.1)


MOPI = partial(ZOMOPI, lr=0.05, rank=3, power_rank=1, vector_lr=0.04, momentum=0.8)
OFFLOADED = partial(SubZero, lr=0.05, rank=2, eps=0.3, offload_low_words=True)
BLOCKS = {"patterns": [r"net\.0", r"net\.2"], "interval": 3}


@pytest.mark.filterwarnings("ignore:`offload_low_words` is True, but low words go to the device and back")
@pytest.mark.parametrize(
    ("method", "callbacks", "options"),
    [
        (MEZO, [SomeColumns()], {}),
        (partial(MeZOAdam, lr=0.01), [BlockCoordinateDescent(**BLOCKS)], {}),
        (MEZO, [BlockCoordinateDescent(**BLOCKS, left_state="keep")], {"precision": "bf16-true"}),
        (MOPI, [SubspaceResampling(4, anchor=1), MomentumTransport("keep")], {"precision": "bf16-true"}),
        (MOPI, [SubspaceResampling(6), BlockCoordinateDescent(**BLOCKS)], {"val_check_interval": 5}),
        (
            partial(SubZero, lr=0.05, rank=2),
            [SubspaceResampling(4, bases=ActivationBases(refresh=True)), BlockCoordinateDescent(**BLOCKS)],
            {},
        ),
        (OFFLOADED, [SubspaceResampling(4)], {"precision": "bf16-true", "val_check_interval": 5}),
    ],
    ids=["slices", "blocks", "blocks-kept", "anchored", "subspace-in-blocks", "given-in-blocks", "offloaded"],
)
def test_scopes_blocks_and_bases(
    ledger_run: Callable[..., Run], method: Any, callbacks: list[Callback], options: dict[str, Any]
) -> None:
    run = ledger_run(method=method, callbacks=callbacks, last={"every_n_train_steps": 7}, **options).fit()
    assert_replays(run, method)
    # In the middle of an interval, what a checkpoint has: the weights folded
    assert_replays(run, method, step=13, sealed=None)
    assert any(run.keep.path.parent.glob("*.pt")) == any(getattr(callback, "bases", None) for callback in callbacks)


def test_groups_and_a_schedule(ledger_run: Callable[..., Run]) -> None:
    method = partial(MeZO, lr=1e-2, weight_decay=0.1, momentum=0.5)
    run = ledger_run(method=method)
    run.module = Decayed()
    (zeroth_order,) = (callback for callback in run.trainer.callbacks if isinstance(callback, ZerothOrder))
    zeroth_order.lr_scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=30)
    run.fit()
    ledger = Ledger(run.keep.path)
    assert ledger.entry_size == 53 and len({record.lr for record in ledger.records()}) == 20
    assert_replays(run, method)


def test_after_a_kill_it_goes_on_without_gap_or_double(ledger_run: Callable[..., Run], tmp_path: Path) -> None:
    whole = ledger_run("whole", go_on=True).fit()  # from the beginning, as there is no ledger to go on from
    expected = whole.keep.path.read_bytes()
    assert_replays(whole, MEZO)
    for kill in (9, 17):
        run = ledger_run(last={"every_n_train_steps": 4})
        run.module.in_step.at = {kill: die}
        with pytest.raises(Killed):
            run.fit("last" if kill == 17 else None)
        path = tmp_path / "run/ledger.bin"
        assert len(Ledger(path)) == kill and run.saved()["global_step"] == kill // 4 * 4
        with path.open("ab") as file:
            file.write(expected[-20:])  # of an entry, as a power cut may leave it
    resumed = ledger_run().fit("last")
    resumed.assert_ends_as(whole)
    assert resumed.keep.path == path and path.read_bytes() == expected
    assert [file.name for file in path.parent.glob("*ledger*")] == ["ledger.bin"]


@pytest.mark.parametrize("folder", ["run", "moved"])
def test_in_another_folder_it_begins_with_a_copy(ledger_run: Callable[..., Run], tmp_path: Path, folder: str) -> None:
    (tmp_path / "run/saved").mkdir(parents=True)
    ledger_run(max_steps=12).fit().path.rename(tmp_path / "run/saved/at-12.ckpt")
    (tmp_path / "run").rename(tmp_path / folder)
    second = ledger_run("elsewhere").fit(tmp_path / folder / "saved/at-12.ckpt")
    assert len(Ledger(tmp_path / folder / "ledger.bin")) == 12
    assert second.keep.path == tmp_path / "elsewhere/ledger.bin"
    assert_replays(second, MEZO)


def test_a_copy_of_a_folder_goes_on_by_itself(ledger_run: Callable[..., Run], tmp_path: Path) -> None:
    ledger_run(max_steps=6).fit()
    copytree(tmp_path / "run", tmp_path / "copy")
    second = ledger_run("copy").fit("last")
    path = second.keep.path
    assert path == tmp_path / "copy/ledger.bin" and len(Ledger(tmp_path / "run/ledger.bin")) == 6
    assert_replays(second, MEZO)
    second.trainer.validate(second.module, DataLoader(second.data, batch_size=4), verbose=False)
    assert second.keep.path == path
    second.trainer.fit_loop.epoch_loop.max_steps = 22  # a second fit does not go on from that checkpoint
    assert len(Ledger(second.fit().keep.path)) == 2


def test_a_new_run_leaves_an_old_ledger_alone(ledger_run: Callable[..., Run], tmp_path: Path) -> None:
    first = ledger_run(max_steps=2).fit()
    before = first.keep.path.read_bytes()
    again = ledger_run().fit()
    assert (again.keep.path, first.keep.path.read_bytes()) == (tmp_path / "run/ledger-v1.bin", before)
    again.trainer.fit_loop.epoch_loop.max_steps = 25  # a second fit: new directions, the same weights
    again.fit()
    ledger = Ledger(tmp_path / "run/ledger-v2.bin")
    assert ledger.header.first_step == 20 and [record.step for record in ledger.records()] == [20, 21, 22, 23, 24]


@pytest.mark.parametrize("what", ["missing", "another file", "shorter", "damaged", "of another run", "without"])
def test_a_ledger_that_does_not_lead_to_the_checkpoint(
    ledger_run: Callable[..., Run], make_run: Callable[..., Run], what: str
) -> None:
    """Training goes on, and a warning says that there will be no replay, and why."""
    (make_run if what == "without" else ledger_run)(max_steps=6).fit()
    run = ledger_run(max_steps=8)
    path = run.path.with_name("ledger.bin")
    whole = b"" if what == "without" else path.read_bytes()
    changes: dict[str, tuple[Callable[[], Any], str]] = {
        "missing": (path.unlink, "there is no .*ledger.bin"),
        "another file": (lambda: path.write_bytes(b"a text"), "does not begin with `zoledger`"),
        "shorter": (lambda: path.write_bytes(whole[:-50]), "has 4 steps, and the checkpoint is of step 6"),
        "damaged": (lambda: path.write_bytes(whole[:-60] + bytes(15) + whole[-45:]), "the entry of step 4, at byte"),
        "of another run": (
            lambda: (
                ledger_run("other", method=partial(MeZO, lr=2e-2, momentum=0.9), max_steps=6)
                .fit()
                .keep.path.rename(path)
            ),
            "belongs to a different run from the checkpoint",
        ),
        "without": (lambda: None, "the checkpoint is from a run without one"),
    }
    change, words = changes[what]
    change()
    left = path.read_bytes() if path.exists() else None
    with pytest.warns(UserWarning, match=f"keeps no ledger from here on: .*{words}"):
        run.fit("last")
    assert run.trainer.global_step == 8 and run.keep.path is None
    assert (path.read_bytes() if path.exists() else None) == left


class Twice(Validated):
    """Takes two steps on each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for _ in range(2):
            zeroth_order_step(self, lambda: F.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return MEZO(self.parameters())


def test_every_step_of_a_batch_is_in_it(ledger_run: Callable[..., Run]) -> None:
    run = ledger_run(method=None, max_steps=8)
    run.module = Twice()
    run.fit(validate=False)
    assert [record.step for record in Ledger(run.keep.path).records()] == list(range(8))
    module = Validated()
    assert replay(run.keep.path, module, MEZO) == Replayed(8, True)
    assert all(map(torch.equal, module.parameters(), run.module.parameters()))


class Changes(Callback):
    """Does something to the optimizer or the module before step 5."""

    def __init__(self, change: Callable[[Any, Any], Any]) -> None:
        self.change = change

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 5:
            self.change(trainer.optimizers[0], pl_module)


@pytest.mark.filterwarnings("ignore:1 parameter is unused")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda optimizer, _: optimizer.param_groups[0].update(momentum=0.5), "`momentum` of a parameter group"),
        (lambda _, module: module.net[2].bias.requires_grad_(False), "`requires_grad` of a parameter group"),
        (lambda optimizer, _: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}), "was added"),
    ],
    ids=["momentum", "frozen", "group"],
)
def test_what_records_do_not_say_ends_it(
    ledger_run: Callable[..., Run], change: Callable[..., Any], words: str
) -> None:
    run = ledger_run(callbacks=[Changes(change)], max_steps=7)
    with pytest.warns(UserWarning, match=f"{words}.* before step 5, which records do not hold"):
        run.fit()
    assert len(Ledger(run.keep.path)) == 5 and run.trainer.global_step == 7


def test_another_number_of_queries_ends_it(ledger_run: Callable[..., Run]) -> None:
    run = ledger_run(callbacks=[Changes(lambda optimizer, _: setattr(optimizer, "num_queries", 2))], max_steps=7)
    with pytest.warns(UserWarning, match=r"ledger.bin cannot take step 5: it has 2 of `projected_grads`.*room for 1"):
        run.fit()
    assert len(Ledger(run.keep.path)) == 5 and run.trainer.global_step == 7


def test_weights_that_somebody_else_changed_are_told_from_the_run_s(ledger_run: Callable[..., Run]) -> None:
    def clamp(_: Any, module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.clamp_(-0.1, 0.1)

    run = ledger_run(callbacks=[Changes(clamp)]).fit()
    assert replay(run.keep.path, Validated(), MEZO) == Replayed(20, False)


def test_it_needs_a_method_and_a_folder(
    ledger_run: Callable[..., Run], make_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=r"KeepLedger needs a zeroth-order method .*, got SGD"):
        ledger_run(method=None).fit()
    (tmp_path / "file").touch()
    run = ledger_run()
    run.keep.dirpath = tmp_path / "file/folder"
    with pytest.raises(ValueError, match=r"`dirpath` is .*, where no file can be written"):
        run.fit()
    run.keep.dirpath = "memory://run"
    with pytest.raises(ValueError, match=r"`dirpath` of KeepLedger is memory://run, but a ledger is a file on this"):
        run.fit()


def test_it_is_on_the_disk_before_a_checkpoint_is(
    ledger_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps but the present one, which the checkpoint holds."""
    synced: list[int] = []
    monkeypatch.setattr(Ledger, "sync", lambda ledger: synced.append(len(ledger)))
    run = ledger_run(last={"every_n_train_steps": 4}, max_steps=8)
    run.module.in_step.at[5] = lambda: synced.append(len(Ledger(run.keep.path)))
    run.fit()
    assert synced[:2] == [3, 5]


def test_a_fast_dev_run_writes_nothing(ledger_run: Callable[..., Run], tmp_path: Path) -> None:
    run = ledger_run(fast_dev_run=2).fit()
    assert run.trainer.global_step == 2 and run.keep.path is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_it_changes_nothing_of_the_training(ledger_run: Callable[..., Run], make_whole: Callable[..., Run]) -> None:
    def bits(run: Run) -> list[Tensor]:
        return list(run.module.parameters())

    for one, other in zip(bits(ledger_run().fit()), bits(make_whole()), strict=True):
        assert torch.equal(one, other)
