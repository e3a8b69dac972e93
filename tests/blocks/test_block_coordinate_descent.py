"""Blocks in turn under a Trainer: what moves, what is shared, resumed, shown and refused."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from training import Records, Save, assert_equal, weights
from zolightning.blocks import Bandit, BlockSchedule, Cyclic, GaussSouthwellSweep, RandomPermutation, find_blocks
from zolightning.callbacks import BlockCoordinateDescent, RunOverview, SubspaceResampling, ZerothOrder
from zolightning.evaluation.shared_prefix import SharedPrefix
from zolightning.optim import HiZOO, MeZO, SparseMeZO, SubZero

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13

MEZO = partial(MeZO, lr=0.05)


class Layered(L.LightningModule):
    """Four layers with what comes before and after them, and a metric that counts evaluations."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem, self.head = nn.Linear(4, 5), nn.Linear(5, 1)
            self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(4)])
        self.register_buffer("evaluations", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.evaluations += 1
        hidden = self.stem(inputs)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return F.mse_loss(self.head(hidden).float(), targets.float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Moves(Callback):
    """Notes, step by step, the submodules of which something moved."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        after = weights(pl_module)
        moved = {
            name.rpartition(".")[0] for name, before in self.before.items() if not torch.equal(before, after[name])
        }
        self.moved.append(moved)


Fit = Callable[..., tuple[Layered, list]]


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer], regression_data: Callable[..., DataLoader]) -> Fit:
    """A fit of a fresh module; it, and the records of its steps."""

    def fit(method: Any, *callbacks: Callback, ckpt_path: Path | None = None, **kwargs: Any) -> tuple[Layered, list]:
        records, module = Records(), Layered()
        own = [] if method is None else [ZerothOrder(method)]
        trainer = make_trainer(**{"max_steps": 12} | kwargs, callbacks=[*callbacks, *own, records])
        data = StatefulDataLoader(regression_data().dataset, batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module, records.records

    return fit


def layer(number: int) -> set[str]:
    return {f"layers.{number}"}


@pytest.mark.parametrize(
    ("others", "around", "last"),
    [("blocks", set(), {"stem", "head"}), ("always", {"stem", "head"}, layer(0)), ("never", set(), layer(0))],
)
def test_what_moves(fit: Fit, others: str, around: set[str], last: set[str]) -> None:
    moves = Moves()
    module, records = fit(MEZO, BlockCoordinateDescent(interval=2, others=others), moves, max_steps=10)
    assert moves.moved == [layer(step // 2) | around for step in range(8)] + [last | around] * 2
    assert [record.blocks for record in records[:8]] == [(step // 2,) for step in range(8)]
    assert module.evaluations == 10


def test_losses_are_those_without_a_shared_prefix(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    descent = BlockCoordinateDescent(RandomPermutation(), interval=1)
    _, shared = fit(partial(MEZO, num_queries=2), descent)
    assert max(descent._shares) == 3 / 4 * 3 / 4, "three of four layers, in three of four evaluations"
    monkeypatch.setattr(SharedPrefix, "evaluate", lambda _, evaluate, context: evaluate(nullcontext()))
    _, alone = fit(partial(MEZO, num_queries=2), BlockCoordinateDescent(RandomPermutation(), interval=1))
    assert shared == alone and len({record.blocks for record in shared}) == 5


@pytest.mark.filterwarnings("ignore:`queries` of Bandit is 0")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    ("method", "order", "passes"),
    [
        (partial(MeZO, lr=0.05, momentum=0.9), partial(Bandit, step_size=0.5), [2] * 12),
        (partial(SubZero, lr=0.05, rank=2, momentum=0.5, vector_lr=0.05), RandomPermutation, [2] * 12),
        (partial(MeZO, lr=0.15, eps=1e-2), partial(GaussSouthwellSweep, queries=2), [2 + 5 * 4, 2, 2] * 4),
        (
            partial(HiZOO, lr=0.02, smoothing=1e-4, eps=1e-2),
            partial(Bandit, step_size=0.5, queries=2),
            [3, 3, 3] + [3 + 2 * 4, 3, 3] * 3,
        ),
    ],
)
def test_resumed_and_replayed(
    fit: Fit, tmp_path: Path, method: Any, order: Any, passes: list[int], precision: str
) -> None:
    """From the middle of a visit, and from its records: the same bits."""

    def callbacks() -> list[Callback]:
        resampling = [SubspaceResampling(interval=4)] if method.func is SubZero else []
        return [BlockCoordinateDescent(order(), interval=3, blocks_per_step=2), *resampling]

    module, records = fit(method, *callbacks(), Save(4, tmp_path / "saved.ckpt"), precision=precision)
    assert len({record.blocks for record in records}) > 1
    resumed, rest = fit(method, *callbacks(), ckpt_path=tmp_path / "saved.ckpt", precision=precision)
    assert rest == records[4:]
    assert_equal(weights(resumed), weights(module))

    replayed = Layered().to(next(module.parameters()).dtype)
    optimizer = method(replayed.named_parameters())
    optimizer.set_blocks([*find_blocks(replayed, replayed.parameters()).parameters.values()])
    for record in records:
        optimizer.apply(record)
    optimizer.detach()
    assert_equal(weights(replayed), weights(module))
    assert [record.forward_passes for record in records] == passes


@pytest.mark.parametrize("company", [{"others": "always"}, {"blocks_per_step": 2}])
def test_scores_of_blocks_in_company_are_warned_about(fit: Fit, company: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="`queries` of Bandit is 0, but no block moves alone"):
        fit(MEZO, BlockCoordinateDescent(Bandit(), **company), max_steps=1)
    fit(MEZO, BlockCoordinateDescent(Bandit(queries=1), **company), max_steps=1)


def test_a_plain_loop_does_the_same(fit: Fit, regression_data: Callable[..., DataLoader]) -> None:
    module, records = fit(MEZO, BlockCoordinateDescent(Bandit(), interval=2), max_steps=7)
    plain = Layered()
    optimizer = MEZO(plain.parameters())
    optimizer.attach(plain)
    schedule = BlockSchedule(find_blocks(plain, plain.parameters()), Bandit(), interval=2)
    schedule.attach(optimizer)
    for batch in regression_data():
        optimizer.estimate(lambda batch=batch: plain.training_step(batch, 0))
        optimizer.step()
    assert_equal(weights(plain), weights(module))
    assert optimizer.record == records[-1]
    schedule.detach()
    assert not optimizer._estimate_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_tensorboard(fit: Fit, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    descent = BlockCoordinateDescent(Bandit(), interval=2, others="never")
    fit(MEZO, descent, RunOverview(), logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("blocks/active")] == [12]
    probabilities = events.Scalars("blocks/probability/layer_0")
    assert [scalar.step for scalar in probabilities] == [0, 2, 4, 6, 8, 10] and probabilities[0].value == 0.25
    assert len(events.Scalars("blocks/score/layer_3")) == 5
    assert len(events.Scalars("zo/prefix_share")) == 12
    (overview,) = events.Tensors("run/text_summary")[0].tensor_proto.string_val
    assert b"| blocks | 4 blocks by Bandit, switched every 2 steps |" in overview
    assert b"| scope | unfrozen parameters: 120 of 151 parameters train |" in overview


@pytest.mark.parametrize("known", [0, 9])
def test_the_share_of_layers_that_did_not_run(fit: Fit, monkeypatch: pytest.MonkeyPatch, known: int) -> None:
    """Also where their outputs are kept from step to step, and without steps that a ledger knows."""
    runs = 0
    own = nn.Linear.forward

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        nonlocal runs
        runs += self.in_features == self.out_features  # a layer below the one that moves, not the stem or the head
        return own(self, inputs)

    class Compare(Callback):
        """After the shares, which the runs of a step should have."""

        def __init__(self) -> None:
            self.runs: list[int] = []
            self.logged: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            nonlocal runs
            runs = 0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.runs.append(runs)
            self.logged.append(float(trainer.callback_metrics.get("zo/prefix_share", -1)))

    class Know(Callback):
        def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.optimizers[0].expect(replace(record, leaves_traces=False) for record in records[:known])

    def descent() -> BlockCoordinateDescent:
        return BlockCoordinateDescent(Cyclic(descending=True), interval=100, others="never")

    _, records = fit(MEZO, descent())
    monkeypatch.setattr(nn.Linear, "forward", forward)
    compare = Compare()
    fit(None, Know(), descent(), compare, ZerothOrder(MEZO, keep_prefix_gib=0.001), log_every_n_steps=1)
    shares = [1 - (runs + 2) / 8 for runs in compare.runs]  # the one that moves, and three below it, in two evaluations
    assert compare.logged[:known] == [-1] * known
    assert compare.logged[known + 1 :] == shares[known + 1 :]  # the first one finds out what can be shared
    assert set(compare.logged[known:]) == ({0.375} if known else {0.375, 0.75})


def test_what_moves_at_once_at_most() -> None:
    module = Layered()
    module.layers[2].requires_grad_(False)
    module.layers[3].bias.requires_grad_(False)
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for others, around in (("always", {*module.stem.parameters(), *module.head.parameters()}), ("never", set())):
        descent = BlockCoordinateDescent(blocks_per_step=2)
        descent.schedule = BlockSchedule(find_blocks(module, moving, others=others), blocks_per_step=2)
        found = descent.largest(MEZO(moving))
        assert found == {*module.layers[0].parameters(), *module.layers[1].parameters()} | around


def test_the_plan_of_memory_has_what_blocks_at_rest_keep(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Count(Callback):
        most = 0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.most = max(self.most, trainer.optimizers[0].state_bytes())

    monkeypatch.setattr("zolightning.memory.in_units", str)
    caplog.set_level("INFO")
    count, method = Count(), partial(SparseMeZO, lr=0.05, mask="fixed")
    fit(method, BlockCoordinateDescent(interval=1), RunOverview(), count, precision="bf16-true", max_steps=5)
    assert f", state {count.most}, " in caplog.text


@pytest.mark.parametrize(
    ("method", "callbacks", "message"),
    [
        (None, [BlockCoordinateDescent()], "needs a zeroth-order method"),
        (MEZO, [BlockCoordinateDescent(blocks_per_step=6)], "`blocks_per_step` is 6, but there are 5 blocks."),
        (MEZO, [BlockCoordinateDescent(patterns=["attention"])], "`patterns` has 'attention', which matches nothing"),
        (MEZO, [BlockCoordinateDescent(Bandit(p_min=0.3))], "`p_min` is 0.3, but with 5 blocks it can be at most 0.2"),
    ],
)
def test_refused(fit: Fit, method: Any, callbacks: list[Callback], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(method, *callbacks)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_refused_when_a_run_goes_on(fit: Fit, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    fit(MEZO, Save(4, path), max_steps=4)
    with pytest.raises(MisconfigurationException, match="a run without BlockCoordinateDescent"):
        fit(MEZO, BlockCoordinateDescent(), ckpt_path=path)
    fit(MEZO, BlockCoordinateDescent(), Save(4, path), max_steps=4)
    with pytest.raises(MisconfigurationException, match="`interval` is 2, was 100"):
        fit(MEZO, BlockCoordinateDescent(interval=2), ckpt_path=path)
    with pytest.raises(MisconfigurationException, match=r"`order\.descending` is True, was False"):
        fit(MEZO, BlockCoordinateDescent(Cyclic(descending=True)), ckpt_path=path)
    with pytest.raises(ValueError, match="Set those of the run first"):
        fit(MEZO, ckpt_path=path)
    fit(MEZO, BlockCoordinateDescent(others="never"), Save(4, path), max_steps=4)
    with pytest.raises(MisconfigurationException, match="`others` is 'moving', was 'never'"):
        fit(MEZO, BlockCoordinateDescent(others="always"), ckpt_path=path)


def test_a_checkpoint_that_was_only_tested_says_nothing_of_the_next_fit(
    make_trainer: Callable[..., L.Trainer], regression_data: Callable[..., DataLoader], tmp_path: Path
) -> None:
    class Tested(Layered):
        def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            pass

    descent, module, data = BlockCoordinateDescent(Bandit(), interval=2), Tested(), regression_data()
    callbacks = [descent, ZerothOrder(MEZO), Save(4, tmp_path / "saved.ckpt")]
    trainer = make_trainer(max_steps=6, callbacks=callbacks)
    trainer.fit(module, data)
    learned = descent.order.state_dict()
    trainer.test(module, data, ckpt_path=tmp_path / "saved.ckpt", weights_only=True, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 7
    trainer.fit(module, data)
    assert (descent.timeline.start, descent.timeline.steps) == (6, 1)
    assert descent.order.state_dict() == learned


@pytest.mark.parametrize(("field", "name"), [("interval", "blocks.interval"), ("blocks_per_step", "blocks_per_step")])
@pytest.mark.parametrize("value", [0, 1.5])
def test_refused_numbers(field: str, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be an integer, at least 1, got {value}"):
        BlockCoordinateDescent(Cyclic(), **{field: value})
    blocks = find_blocks(module := Layered(), module.parameters())
    with pytest.raises(ValueError, match=f"`{name}` must be an integer, at least 1, got {value}"):
        BlockSchedule(blocks, **{field: value})
