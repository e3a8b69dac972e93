"""Runs in which Lightning's finders of learning rates and batch sizes try out steps before the first one."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from checkpoint_runs import AS_EXPECTED, EVERY_6, MEZO, Killed, Run, Validated, die
from zolightning.checkpoints.replay import Replayed, replay

pytestmark = [*AS_EXPECTED, pytest.mark.filterwarnings("ignore:The .* does not have many workers")]


def test_a_run_goes_on_with_the_learning_rate_that_was_found(ledger_run: Any, tmp_path: Path) -> None:
    """A trial saves nothing and is in no ledger; a resumed run has no other one, after which it would begin anew."""

    def run(folder: str) -> Run:
        finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
        made: Run = ledger_run(folder, callbacks=[finder], default_root_dir=tmp_path, **EVERY_6)
        made.module.lr = 1e-3  # the attribute that a finder sets
        return made

    whole, killed, resumed = run("whole").fit(), run("run"), run("run")
    killed.module.in_step.at[17] = die  # after the trial
    with pytest.raises(Killed):
        killed.fit()
    resumed.fit("last").assert_ends_as(whole)
    assert min(resumed.watch.grads) == 13 and resumed.keep.path.read_bytes() == whole.keep.path.read_bytes()
    rates = [made.trainer.optimizers[0].param_groups[0]["lr"] for made in (whole, resumed)]
    assert rates[0] == rates[1] == whole.module.lr != MEZO.keywords["lr"]
    assert replay(resumed.keep.path, Validated(), MEZO) == Replayed(20, True)


def test_a_killed_trial_leaves_no_checkpoint(make_run: Any, tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
    killed = make_run(callbacks=[finder], default_root_dir=tmp_path, **EVERY_6)
    killed.module.lr, killed.module.in_step.at[14] = 1e-3, die
    with pytest.raises(Killed):
        killed.fit()
    assert not killed.path.exists()


def test_a_batch_size_is_not_looked_for_again(make_run: Any) -> None:
    make_run(max_steps=2).fit()
    resumed = make_run(callbacks=[BatchSizeFinder()])
    resumed.module.batch_size, resumed.module.train_dataloader = 4, lambda: DataLoader(resumed.data, batch_size=4)
    with pytest.raises(MisconfigurationException, match="has a BatchSizeFinder, but the run resumes"):
        resumed.trainer.fit(resumed.module, ckpt_path="last")
