"""The learning rate that a probe finds, and what it leaves behind."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.utils.data import DataLoader

from checkpoint_runs import AS_EXPECTED, Plan, Run
from training import Records, assert_equal, weights
from zolightning.callbacks import BlockCoordinateDescent, KeepLedger, LearningRateProbe, SubspaceResampling, ZerothOrder
from zolightning.checkpoints.replay import replay
from zolightning.directions.dense import directions
from zolightning.optim import LOZO, MeZO, WarmupDecay, ZerothOrderOptimizer
from zolightning.optim.subspace import SubspaceOptimizer

Method = Callable[..., ZerothOrderOptimizer]
pytestmark = [pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")]

CURVATURES = torch.tensor([4.0, 1.0, 0.25, 0.5, 2.0], dtype=torch.float64)


class Quadratic(L.LightningModule):
    """The mean over examples x of ``(w - x)' H (w - x) / 2``, H diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (CURVATURES * (self.w - batch).square()).sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def examples() -> DataLoader:
    rows = torch.randn(64, 5, dtype=torch.float64)
    return DataLoader(rows, batch_size=4)


def test_the_rate_is_that_of_the_quadratic(examples: DataLoader, make_trainer: Any) -> None:
    """``lr^2 T C / 2 = noise F``, with C the mean curvature cost of a step: Ghadimi and Lan with D = noise F."""
    module, records = Quadratic(), Records()
    probe = LearningRateProbe(num_steps=3, num_examples=8, noise=0.02)
    method = partial(MeZO, lr=1.0, eps=1e-3, seed=5)
    make_trainer(max_steps=40, callbacks=[ZerothOrder(method), probe, records], precision="64-true").fit(
        module, examples
    )

    assert [record.lr for record in records.records[:3]] == [(0.0,)] * 3
    steps = []
    for record in records.records[:3]:
        (direction,) = directions({"w": module.w}, 5, record.step, {0: record.projected_grads[0]}, "gaussian").values()
        steps.append(torch.zeros(5, dtype=torch.float64))
        direction.accumulate(steps[-1])
    loss = (CURVATURES * (1 - examples.dataset[:8]).square()).sum(1).mean().item() / 2
    cost = sum((CURVATURES * step.square()).sum().item() for step in steps) / 3
    (rate,) = {record.lr[0] for record in records.records[3:]}
    assert rate == pytest.approx(math.sqrt(2 * 0.02 * loss / ((40 - 3) * cost)), rel=1e-6)
    assert probe.state_dict() == {"records": []}


def test_where_the_search_begins_does_not_matter(examples: DataLoader, make_trainer: Any) -> None:
    def rate(lr: float) -> float:
        records = Records()
        callbacks = [LearningRateProbe(num_steps=4), ZerothOrder(partial(MeZO, lr=lr)), records]
        make_trainer(max_steps=8, callbacks=callbacks, precision="64-true").fit(Quadratic(), examples)
        return records.records[-1].lr[0]

    assert rate(1e-6) == pytest.approx(rate(0.1), rel=1e-3)


def test_a_step_that_is_skipped_measures_nothing(examples: DataLoader, make_trainer: Any) -> None:
    class Skipped(Quadratic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (math.nan if self.trainer.global_step == 1 else 1.0)

    records = Records()
    callbacks = [LearningRateProbe(3, 8), ZerothOrder(partial(MeZO, lr=0.1), skip_nonfinite=True), records]
    make_trainer(max_steps=6, callbacks=callbacks, precision="64-true").fit(Skipped(), examples)
    assert [record.lr[0] > 0 for record in records.records] == [False] * 4 + [True] * 2


def test_examples_without_a_finite_loss_measure_nothing(examples: DataLoader, make_trainer: Any) -> None:
    """The rate is that of the others; where there are none it is kept."""

    def rate(*nan_rows: int) -> float:
        rows, records = examples.dataset.clone(), Records()
        rows[list(nan_rows)] = math.nan
        callbacks = [LearningRateProbe(3, 16), ZerothOrder(partial(MeZO, lr=0.1), skip_nonfinite=True), records]
        loader = DataLoader(torch.cat([rows[:16], examples.dataset]), batch_size=4, sampler=[*range(16, 48)])
        make_trainer(max_steps=6, callbacks=callbacks, precision="64-true").fit(Quadratic(), loader)
        return records.records[-1].lr[0]

    assert rate(5) == rate(4, 6, 7)
    assert math.isfinite(rate(5))
    with pytest.warns(UserWarning, match="raised the loss of 16 examples, nan, by 20%"):
        assert rate(*range(16)) == 0.1


class Steps(Callback):
    """Tells a module whether it is evaluated for a step; if not, it is in a walk."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        module.in_step = True

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        module.in_step = False


@pytest.mark.parametrize("batch_size", [1, 4, 12])
def test_walks_are_measured_on_all_examples(batch_size: int, make_trainer: Any) -> None:
    """Whatever the batch size of a rank is; there are three walks, each of a step."""
    rows, seen = torch.randn(60, 5, dtype=torch.float64), set()

    class Seen(Quadratic):
        in_step = True

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if not self.in_step and (self.w != 1).any():  # at the end of a walk: no step has moved it yet
                seen.update(map(tuple, batch.tolist()))
            return super().training_step(batch, batch_idx)

    callbacks = [Steps(), LearningRateProbe(num_steps=3, num_examples=12), ZerothOrder(partial(MeZO, lr=0.1))]
    make_trainer(max_steps=4, max_epochs=-1, callbacks=callbacks, precision="64-true").fit(
        Seen(), DataLoader(rows, batch_size=batch_size)
    )
    assert seen == set(map(tuple, rows[:12].tolist()))


def test_momentum_changes_no_rate(make_trainer: Any) -> None:
    """In the end a gradient moves the weights as far with momentum as without, and walks are long enough to show it."""

    class Bowl(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(200, dtype=torch.float64))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.w - batch).square().sum(1).mean() / 2

    def rate(momentum: float) -> float:
        records, method = Records(), partial(MeZO, lr=0.1, momentum=momentum, seed=3)
        callbacks = [LearningRateProbe(32, 4), ZerothOrder(method), records]
        data = DataLoader(rows, batch_size=4)
        make_trainer(max_steps=33, callbacks=callbacks, precision="64-true").fit(Bowl(), data)
        return records.records[-1].lr[0]

    rows = torch.randn(132, 200, dtype=torch.float64)
    assert rate(0.5) == pytest.approx(rate(0.0), rel=0.25)


def test_a_schedule_counts(examples: DataLoader, make_trainer: Any) -> None:
    """A walk is as long as the root of the sum of the squares of its steps."""

    def rates(schedule: Any) -> Tensor:
        records = Records()
        callbacks = [LearningRateProbe(4), ZerothOrder(partial(MeZO, lr=0.1, seed=3), schedule), records]
        make_trainer(max_steps=24, callbacks=callbacks, precision="64-true").fit(Quadratic(), examples)
        return torch.tensor([record.lr[0] for record in records.records[4:]])

    constant = rates(None)
    for schedule in (
        WarmupDecay,
        partial(CosineAnnealingLR, T_max=30),
        partial(LambdaLR, lr_lambda=lambda t: 1 / (1 + t)),
    ):
        scheduled = rates(schedule)
        assert not torch.allclose(scheduled, constant)
        assert torch.allclose(scheduled.norm(), constant.norm(), rtol=1e-5)


class State(Callback):
    """Keeps copies of weights and of the optimizer's state at the end of a step."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Tensor], dict[str, Any]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        state = [
            {name: value.clone() if isinstance(value, Tensor) else value for name, value in optimizer.state[p].items()}
            for p in pl_module.parameters()
        ]
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "lr_scale", "measured")}
            for group in optimizer.param_groups
        ]
        self.seen.append((weights(pl_module), {"state": state, "groups": groups}))


def test_blocks_in_turn(make_regression: Any, regression_data: Any, make_trainer: Any) -> None:
    """Only steps of the block that moves now are replayed."""
    records, module = Records(), make_regression()
    blocks = BlockCoordinateDescent(interval=3, patterns=["net.0", "net.3"])
    method = ZerothOrder(partial(MeZO, lr=1e-2, momentum=0.9))
    callbacks = [Steps(), blocks, method, LearningRateProbe(4, 12), records]
    before, moved = weights(module), set()

    def look(*_: Any) -> None:
        if not module.in_step:
            moved.update(name for name, weight in weights(module).items() if not torch.equal(weight, before[name]))

    module.net.register_forward_pre_hook(look)
    trainer = make_trainer(max_steps=8, callbacks=callbacks, limit_train_batches=4)
    trainer.fit(module, regression_data())
    assert moved == {"net.3.weight", "net.3.bias"}
    assert [record.blocks for record in records.records] == [(0,)] * 3 + [(1,)] * 3 + [(0,)] * 2
    assert all(record.lr[0] > 0 for record in records.records[4:])
    assert {name for name, weight in weights(module).items() if not torch.equal(weight, before[name])} == set(before)


def test_updates_that_wait_count(make_regression: Any, regression_data: Any, make_trainer: Any) -> None:
    """As they do where a callback looks at weights between steps."""

    def scale(*callbacks: Callback) -> float:
        method = ZerothOrder(partial(LOZO, lr=1e-2, rank=2))
        callbacks = (method, SubspaceResampling(interval=50), LearningRateProbe(4, 12), *callbacks)
        trainer = make_trainer(max_steps=6, callbacks=[*callbacks])
        trainer.fit(make_regression(), regression_data())
        return trainer.optimizers[0].lr_scale

    assert scale() == pytest.approx(scale(Records()), rel=1e-3)


FAMILIES = ["mezo-all", "mezo-native", "mezo-adam", "hizoo-l", "sparse-mezo", "lozo-momentum", "subzero-adam"]
FAMILIES += ["zo-muon-momentum", "zo-mopi"]


@pytest.mark.parametrize("precision", ["bf16-true"])
@pytest.mark.parametrize("method", FAMILIES, indirect=True)
def test_any_method_is_probed_and_left_as_it_was(
    method: Method, precision: str, make_regression: Any, regression_data: Any, make_trainer: Any
) -> None:
    before, after, records, module = State(), State(), Records(), make_regression()
    resampling = [SubspaceResampling(interval=50)] if issubclass(method.func, SubspaceOptimizer) else []
    probe = LearningRateProbe(num_steps=4, num_examples=12)
    callbacks = [*resampling, ZerothOrder(method), before, probe, after, records]
    trainer = make_trainer(max_steps=6, callbacks=callbacks, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    initial = {name: weight.to(dtype) for name, weight in weights(module).items()}
    trainer.fit(module, regression_data())

    for old, new in zip(before.seen[:4], after.seen[:4], strict=True):
        assert_equal(old[0], new[0])
        assert_equal(old[0], initial)
        assert old[1]["groups"] == new[1]["groups"]
        for one, other in zip(old[1]["state"], new[1]["state"], strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name
    assert all(record.lr[0] > 0 for record in records.records[4:])
    assert records.records[4].forward_passes > records.records[5].forward_passes
    assert any(not torch.equal(weight, initial[name]) for name, weight in weights(module).items())


@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2, momentum=0.9), partial(LOZO, lr=1e-2, rank=2)])
@pytest.mark.parametrize("stop", [3, 5, 9], ids=["while it looks", "when it has looked", "later"])
def test_resuming_equals_not_stopping(
    method: Method, stop: int, make_trainer: Any, regression_data: Any, tmp_path: Path
) -> None:
    def run(folder: str, **options: Any) -> Run:
        probe = LearningRateProbe(num_steps=5, num_examples=8, total_steps=20)
        data = regression_data().dataset
        return Run(make_trainer, tmp_path / folder, data, method=method, callbacks=[probe], **options)

    whole = run("whole").fit(validate=False)
    run("parts", max_steps=stop).fit(validate=False)
    parts = run("parts").fit(ckpt_path=tmp_path / "parts" / "last.ckpt", validate=False)

    parts.assert_ends_as(whole)
    one, other = (run.trainer.optimizers[0].param_groups[0] for run in (whole, parts))
    assert one["lr_scale"] == other["lr_scale"] > 0
    assert one["forward_passes"] == other["forward_passes"]


def fail_after(evaluations: int, plan: Plan) -> None:
    """Fails at step 5, in a walk, after so many evaluations of the loss."""
    if evaluations == 0:
        raise RuntimeError("in a walk")
    plan.at[5] = partial(fail_after, evaluations - 1, plan)


@pytest.mark.parametrize(
    ("method", "with_ledger"),
    [(partial(MeZO, lr=1e-2, momentum=0.9), False), (partial(LOZO, lr=1e-2, rank=2), True)],
)
def test_resuming_after_an_error_in_a_walk_equals_not_stopping(
    method: Method, with_ledger: bool, make_trainer: Any, regression_data: Any, tmp_path: Path
) -> None:
    ledger = tmp_path / "parts" / "ledger.bin"

    def run(folder: str, **options: Any) -> Run:
        callbacks = [LearningRateProbe(num_steps=5, num_examples=8)]
        callbacks += [KeepLedger(tmp_path / folder, **options)] * with_ledger
        fit = {"method": method, "callbacks": callbacks, "val_check_interval": 5, "check_val_every_n_epoch": None}
        return Run(make_trainer, tmp_path / folder, regression_data().dataset, **fit)

    whole, failed = run("whole").fit(), run("parts")
    fail_after(7, failed.module.in_step)
    with pytest.raises(RuntimeError, match="in a walk"):
        failed.fit()
    if with_ledger:  # and no checkpoint
        parts = run("parts", go_on=ledger).fit()
    else:
        assert failed.saved()["global_step"] == 5
        parts = run("parts").fit(ckpt_path=failed.path)

    parts.assert_ends_as(whole)
    assert parts.watch.validated == whole.watch.validated


for _test in (test_resuming_equals_not_stopping, test_resuming_after_an_error_in_a_walk_equals_not_stopping):
    _test.pytestmark += AS_EXPECTED


def test_the_ledger_has_the_rates(
    make_regression: Any, regression_data: Any, make_trainer: Any, tmp_path: Path
) -> None:
    module, base, method = make_regression(), make_regression(), partial(MeZO, lr=1e-4)
    callbacks = [ZerothOrder(method), LearningRateProbe(4, 8), KeepLedger(tmp_path)]
    make_trainer(max_steps=12, callbacks=callbacks).fit(module, regression_data())
    replay(tmp_path / "ledger.bin", base, method)
    assert_equal(weights(base), weights(module))


def test_refusals(make_regression: Any, regression_data: Any, make_trainer: Any) -> None:
    def fit(probe: LearningRateProbe, *callbacks: Callback, **options: Any) -> None:
        make_trainer(callbacks=[probe, *callbacks], **options).fit(make_regression(), regression_data())

    mezo = ZerothOrder(partial(MeZO, lr=1e-2))
    with pytest.raises(
        MisconfigurationException, match=r"`num_steps` of LearningRateProbe is 16, .* has only 16 steps"
    ):
        fit(LearningRateProbe(), mezo, max_steps=16)
    LearningRateProbe().check(make_trainer(max_epochs=1), make_regression())  # of as many steps as there are batches
    with pytest.raises(MisconfigurationException, match="Set `max_steps` of the Trainer, or `total_steps`"):
        fit(LearningRateProbe(), mezo, max_epochs=-1)
    with pytest.raises(MisconfigurationException, match=r"LearningRateProbe needs a zeroth-order method .* got SGD"):
        fit(LearningRateProbe(), max_steps=20)
    with pytest.raises(ValueError, match="`num_examples` must be an integer, at least 1, got 0"):
        LearningRateProbe(num_examples=0)


def test_a_loss_that_no_step_changes_keeps_the_rate(examples: DataLoader, make_trainer: Any) -> None:
    class Linear(Quadratic):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.w * batch).mean()

    records = Records()
    callbacks = [ZerothOrder(partial(MeZO, lr=0.01)), LearningRateProbe(2), records]
    with pytest.warns(UserWarning, match="`lr` stays 0.01, because no steps, however large"):
        make_trainer(max_steps=4, callbacks=callbacks, precision="64-true").fit(Linear(), examples)
    assert records.records[-1].lr == (0.01,)
