"""The files by which a killed run goes on: its ledger alone, a damaged one, an older checkpoint, those of bases."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from checkpoint_runs import AS_EXPECTED, MEZO, Killed, Run, Validated, die, steps_evaluated
from zolightning.callbacks import ActivationBases, SubspaceResampling
from zolightning.checkpoints.checkpoint_io import DamagedCheckpointError
from zolightning.checkpoints.keep_ledger import KeepLedger
from zolightning.checkpoints.ledger import Ledger
from zolightning.checkpoints.replay import Replayed, replay
from zolightning.optim import MeZO, SubZero

pytestmark = AS_EXPECTED
MakeRun = Callable[..., Run]
LOW_RANK = partial(SubZero, lr=0.03, rank=2, momentum=0.9)


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


def test_a_run_that_was_killed_before_its_seal_gets_one(ledger_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ledger_run(max_steps=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(KeepLedger, "on_fit_end", lambda *_: die())
        run.fit(validate=False)
    assert replay(run.path.with_name("ledger.bin"), Validated(), MEZO) == Replayed(5, None)
    resumed = ledger_run(max_steps=5).fit("last", validate=False)
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(5, True)
