"""When new subspaces come, what is said of them, and whom the callbacks refuse."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import functional as F
from torch.utils.data import DataLoader

from zolightning.callbacks import MomentumTransport, SubspaceResampling, ZerothOrder
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubZero

ZO_MOPI = partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.01)


class Watch(Callback):
    """Keeps what each step found, as it begins and as it ends."""

    def __init__(self) -> None:
        self.refresh: list[int] = []
        self.momentum_kept: list[float | None] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        self.refresh.append(optimizer.record.refresh)
        self.momentum_kept.append(optimizer.momentum_kept)


@pytest.fixture
def fit(
    make_trainer: Callable[..., L.Trainer],
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Callable[..., tuple[L.LightningModule, Watch]]:
    def fit(method: Any, *callbacks: Callback, **kwargs: Any) -> tuple[L.LightningModule, Watch]:
        watch, module = Watch(), kwargs.pop("module", None) or make_regression()
        ckpt_path = kwargs.pop("ckpt_path", None)
        trainer = make_trainer(**{"max_steps": 9} | kwargs, callbacks=[*callbacks, ZerothOrder(method), watch])
        validation = [regression_data(2)] if "val_check_interval" in kwargs else []
        trainer.fit(module, regression_data(), *validation, ckpt_path=ckpt_path)
        return module, watch

    return fit


@pytest.mark.parametrize("method", [ZO_MOPI, partial(LOZO, lr=0.01), partial(SubZero, lr=0.01, rank=2)])
def test_comes_before_each_interval_but_the_first(fit: Callable[..., Any], method: Any) -> None:
    assert fit(method, SubspaceResampling(4))[1].refresh == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert fit(method, SubspaceResampling(1))[1].refresh == list(range(9))
    assert fit(method, SubspaceResampling(100))[1].refresh == [0] * 9


def test_a_rule_of_ones_own(fit: Callable[..., Any]) -> None:
    class AtSteps(SubspaceResampling):
        def is_due(self, trainer: L.Trainer, optimizer: Any) -> bool:
            return optimizer.param_groups[0]["step"] in (0, 2, 3)

    assert fit(ZO_MOPI, AtSteps())[1].refresh == [0, 0, 1, 2, 2, 2, 2, 2, 2]


def test_an_anchor_keeps_more_of_the_momentum(fit: Callable[..., Any]) -> None:
    shares = [
        fit(partial(ZO_MOPI, rank=2, power_rank=1), SubspaceResampling(4, anchor))[1].momentum_kept[4]
        for anchor in (0, 1, 2)
    ]
    assert 0 <= shares[0] < shares[1] < shares[2] == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_bases_do_not_depend_on_when_they_are_drawn(fit: Callable[..., Any], precision: str) -> None:
    """Under `bf16-true` Lightning makes bfloat16 the default dtype within steps, and only there."""
    drawn: list[list[torch.Tensor]] = []

    class Draw(Callback):
        def __init__(self, early: bool) -> None:
            self.early = early

        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if self.early:
                trainer.optimizers[0].basis(pl_module.net[0].weight)

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            drawn[-1].append(trainer.optimizers[0].basis(pl_module.net[0].weight).left)

    for early in (False, True):
        drawn.append([])
        fit(ZO_MOPI, SubspaceResampling(4), Draw(early), precision=precision)
    assert all(torch.equal(*pair) for pair in zip(*drawn, strict=True))
    torch.testing.assert_close(drawn[0][0].float().T @ drawn[0][0].float(), torch.eye(3), rtol=0, atol=0.02)


def test_validation_and_checkpoints_see_all_of_the_training(
    fit: Callable[..., Any], make_regression: Callable[..., Any], tmp_path: Path
) -> None:
    """In the middle of an interval the loss in validation is that of the weights in a checkpoint of then."""
    losses: list[float] = []

    class Validated(type(make_regression())):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                losses.append(F.mse_loss(self.net(batch[0]), batch[1]).item())
                self.trainer.save_checkpoint(tmp_path / f"inside-{len(losses)}.ckpt")

    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    options = {"num_sanity_val_steps": 0, "enable_checkpointing": True, "check_val_every_n_epoch": None}
    module, _ = fit(ZO_MOPI, SubspaceResampling(5), saving, val_check_interval=3, module=Validated(), **options)
    assert len(losses) == 3
    inputs, targets = next(iter(module.trainer.val_dataloaders))
    for count, loss in enumerate(losses, start=1):
        for name in (f"inside-{count}.ckpt", f"step={3 * count}.ckpt"):
            fresh = make_regression().eval()
            fresh.load_state_dict(torch.load(tmp_path / name, weights_only=True)["state_dict"])
            assert F.mse_loss(fresh.net(inputs), targets).item() == pytest.approx(loss, rel=1e-5)


def logged(folder: Path, name: str) -> dict[int, float]:
    """What a CSVLogger wrote of one metric, by step."""
    lines = (folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    return {int(row["step"]): float(row[name]) for row in rows if row[name]}


def test_logs(fit: Callable[..., Any], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version=0)
    fit(ZO_MOPI, SubspaceResampling(3), MomentumTransport(), logger=logger, log_every_n_steps=1)
    kept = logged(tmp_path, "zo/momentum_kept")
    assert logged(tmp_path, "zo/refresh") == {step: step // 3 for step in range(9)}
    assert kept.keys() == {3, 4, 5, 6, 7, 8} and kept[3] == kept[5] != kept[6] == kept[8]
    assert all(0 < share < 1 for share in kept.values())


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable")
def test_a_resumed_run_logs_them_from_its_first_step(fit: Callable[..., Any], tmp_path: Path) -> None:
    module, _ = fit(ZO_MOPI, SubspaceResampling(3), MomentumTransport(), max_steps=4)
    module.trainer.save_checkpoint(tmp_path / "four.ckpt")
    module, _ = fit(ZO_MOPI, SubspaceResampling(3), MomentumTransport(), max_steps=5, ckpt_path=tmp_path / "four.ckpt")
    metrics = module.trainer.callback_metrics
    uninterrupted, _ = fit(ZO_MOPI, SubspaceResampling(3), MomentumTransport(), max_steps=5)
    for name in ("zo/refresh", "zo/momentum_kept"):
        assert metrics[name] == uninterrupted.trainer.callback_metrics[name]


class TestRefusals:
    def test_a_method_without_subspaces(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(MisconfigurationException, match=r"SubspaceResampling needs a subspace method .* got MeZO"):
            fit(partial(MeZO, lr=0.01), SubspaceResampling())
        with pytest.raises(MisconfigurationException, match=r"MomentumTransport needs a subspace method .* got MeZO"):
            fit(partial(MeZO, lr=0.01), MomentumTransport())

    def test_a_subspace_method_alone(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(MisconfigurationException, match="ZOMOPI needs another callback next to ZerothOrder"):
            fit(ZO_MOPI)

    def test_two_of_them(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(
            MisconfigurationException, match=r"2 SubspaceResampling callbacks, with `interval` \[100, 20\]"
        ):
            fit(ZO_MOPI, SubspaceResampling(100), SubspaceResampling(20))

    def test_anchors_without_momentum_or_beyond_the_rank(self, fit: Callable[..., Any]) -> None:
        with pytest.raises(MisconfigurationException, match="`anchor` is 1, but the method keeps no momentum"):
            fit(partial(LOZO, lr=0.01), SubspaceResampling(anchor=1))
        with pytest.raises(MisconfigurationException, match="`anchor` must be at most the method's `rank`, 3, got 4"):
            fit(ZO_MOPI, SubspaceResampling(anchor=4))

    @pytest.mark.parametrize(
        ("argument", "value", "message"),
        [("interval", 0, r"`resampling\.interval` must"), ("anchor", -1, "`anchor` must")],
    )
    def test_values(self, argument: str, value: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SubspaceResampling(**{argument: value})
