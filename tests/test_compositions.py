"""Methods, estimators, subspaces, scopes, blocks and precisions, drawn together at random.

A run that is killed in any evaluation of its loss and goes on ends as one that nobody killed, bit for bit; so does its
replay; and what a scope leaves out does not move.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from checkpoint_runs import Killed
from zolightning.blocks import AdaLeZO, Bandit, Cyclic, GaussSouthwellSweep, RandomPermutation, Uniform, WeightNorm
from zolightning.callbacks import (
    ActivationBases,
    BlockCoordinateDescent,
    DominantLayer,
    KeepLedger,
    LearningRateControl,
    MomentumTransport,
    RandomLayer,
    SaveLast,
    SubspaceResampling,
    TrainLayers,
    TrainParameters,
    ZerothOrder,
)
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.checkpoints.replay import replay
from zolightning.optim import (
    BSZO,
    EGGROLL,
    GRZO,
    LOZO,
    ZOMOPI,
    ConMeZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    SparseMeZO,
    SubspaceMeZO,
    SubspaceOptimizer,
    SubZero,
    WarmupDecay,
    ZOAdaMM,
    ZOMuon,
)
from zolightning.optim.estimators import OneSided, PerExample, Population, TwoSided, ZScores
from zolightning.scopes import MLP, OutlierChannels, WholeLayer, WithoutOutlierChannels

pytestmark = pytest.mark.filterwarnings("ignore")  # what is drawn may well warn
STEPS, BATCH = 7, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layered(L.LightningModule):
    """A small network of layers; `evaluations` counts the calls of its loss, and the one numbered `fatal` dies."""

    def __init__(self, fatal: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, 8), Layers(), nn.Linear(8, 1))
        self.evaluations = Count(fatal)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.evaluations.add()
        return F.mse_loss(self.net(batch[0].to(self.dtype)).float(), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Count:
    """An object of its own: what a step changes in a module is there again for each of its evaluations."""

    def __init__(self, fatal: int | None) -> None:
        self.number, self.fatal = 0, fatal

    def add(self) -> None:
        self.number += 1
        if self.number == self.fatal:
            raise Killed


def made(value: Any) -> Any:
    """What a partial makes, from arguments that may be partials again; anything else is returned as it is."""
    if not isinstance(value, partial):
        return value
    return value.func(**{name: made(argument) for name, argument in value.keywords.items()})


@dataclass(frozen=True)
class Composition:
    """What a run is made of; its callbacks are made anew for each run, with all that is in them."""

    method: type
    options: dict[str, Any]
    callbacks: list[partial[Callback]] = field(default_factory=list)
    schedule: dict[str, Any] | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    precision: str = "32-true"
    save_every: int | None = None

    @property
    def make_method(self) -> Callable[..., Any]:
        return partial(self.method, **self.options)

    def fit(self, folder: Path, fatal: int | None = None) -> tuple[Layered, dict[str, Tensor]]:
        """Trains a new module in a folder, going on with what an earlier run left there.

        Returns the module and its weights before training.
        """
        from torchdata.stateful_dataloader import StatefulDataLoader

        L.seed_everything(5, verbose=False)
        last, ledger = folder / "last.ckpt", folder / "ledger.bin"
        keep = KeepLedger(folder, ledger if ledger.exists() and not last.exists() else None)
        schedule = None if self.schedule is None else partial(WarmupDecay, **self.schedule)
        own: list[Callback] = [made(callback) for callback in self.callbacks]
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            precision=self.precision,
            max_steps=STEPS,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
            plugins=[AtomicCheckpointIO()],
            callbacks=[
                *own,
                ZerothOrder(self.make_method, schedule, **self.evaluation),
                keep,
                SaveLast(folder, every_n_train_steps=self.save_every),
            ],
        )
        data = TensorDataset(torch.randn(5 * BATCH, 4), torch.randn(5 * BATCH, 1))
        module = Layered(fatal)
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        path = str(last) if last.exists() else None
        trainer.fit(module, StatefulDataLoader(data, batch_size=BATCH), ckpt_path=path)
        return module, before


DENSE = {
    MeZO: st.fixed_dictionaries(
        {},
        optional={
            "momentum": st.just(0.9),
            "normalize": st.booleans(),
            "clip": st.just(2.0),
            "rms_decay": st.sampled_from([0.0, 0.9]),
            "weight_decay": st.just(0.1),
        },
    ),
    MeZOAdam: st.fixed_dictionaries({}, optional={"weight_decay": st.just(0.1)}),
    ZOAdaMM: st.fixed_dictionaries({}, optional={"weight_decay": st.just(0.1)}),
    ConMeZO: st.fixed_dictionaries({}, optional={"angle": st.just(1.2), "normalize": st.booleans()}),
    BSZO: st.fixed_dictionaries({}, optional={"prior_variance": st.just(1.0), "num_reused": st.just(0)}),
    HiZOO: st.fixed_dictionaries(
        {"smoothing": st.sampled_from([1e-3, {0: 1e-5, 4: 1e-4}])},
        optional={
            "curvature": st.sampled_from(["full", "row_column", "scalar"]),
            "curvature_estimate": st.just("centered"),
        },
    ),
    EGGROLL: st.fixed_dictionaries({}, optional={"rank": st.just(2), "weight_decay": st.just(0.1)}),
    SparseMeZO: st.fixed_dictionaries(
        {}, optional={"mask": st.sampled_from(["dynamic", "fixed", "random"]), "sparsity": st.just(0.5)}
    ),
}
MOMENTUM = st.sampled_from([{}, {"momentum": 0.9}])
MOMENTUM_OR_ADAM = st.sampled_from([{}, {"momentum": 0.9}, {"betas": (0.9, 0.95)}])
SUBSPACE: dict[type[SubspaceOptimizer], st.SearchStrategy[dict[str, Any]]] = {
    LOZO: MOMENTUM_OR_ADAM,
    SubZero: MOMENTUM_OR_ADAM,
    SubspaceMeZO: MOMENTUM_OR_ADAM,
    ZOMuon: MOMENTUM,
    ZOMOPI: st.just({"power_rank": 1}),
    GRZO: st.just({}),
}
CHANNELS = OutlierChannels, WithoutOutlierChannels
PARTS = [None, *map(partial, (WholeLayer, MLP)), *(partial(part, fraction=0.25) for part in CHANNELS)]
ORDERS = [Cyclic, RandomPermutation, Uniform, WeightNorm, GaussSouthwellSweep, Bandit, AdaLeZO]


@st.composite
def compositions(draw: Callable[..., Any]) -> Composition:
    method = draw(st.sampled_from([*DENSE, *SUBSPACE]))
    is_subspace = issubclass(method, SubspaceOptimizer)
    options = {"lr": 1e-3, **draw(SUBSPACE[method] if is_subspace else DENSE[method])}
    if draw(st.booleans()):
        options["update_precision"] = draw(st.sampled_from(["exact", "low_byte", "native"]))
    if draw(st.booleans()):
        options["noise"] = draw(st.sampled_from(["gaussian", "rademacher"]))
    if method is GRZO:
        options["num_queries"] = BATCH
    elif method is not HiZOO:
        options["estimator"] = draw(st.sampled_from([TwoSided, OneSided, Population, ZScores, PerExample]))()
        options["num_queries"] = draw(st.sampled_from([2, 3]))
        if isinstance(options["estimator"], PerExample):
            options["num_queries"] = BATCH

    callbacks: list[partial[Callback]] = []
    scope = draw(st.sampled_from([None, TrainLayers, DominantLayer, RandomLayer, TrainParameters]))
    if scope is TrainParameters:
        patterns = draw(st.sampled_from([["up"], ["norm", "net.2"], [r"layers\.1\."]]))
        callbacks.append(partial(scope, patterns=patterns))
    elif scope is not None:
        where = {TrainLayers: {"layers": [2, 0]}, DominantLayer: {"layer": 1}, RandomLayer: {"seed": 3}}[scope]
        callbacks.append(partial(scope, part=draw(st.sampled_from(PARTS)), **where))
    if draw(st.booleans()):
        callbacks.append(
            partial(
                BlockCoordinateDescent,
                order=partial(draw(st.sampled_from(ORDERS))),
                interval=draw(st.sampled_from([1, 2, 3])),
                others=draw(st.sampled_from(["blocks", "always", "never"])),
                left_state=draw(st.sampled_from(["reset", "keep"])),
            )
        )
    if is_subspace:
        options["rank"] = draw(st.sampled_from([1, 2, 4]))
        if draw(st.booleans()):
            options["normalize_directions"] = True
        bases = partial(
            ActivationBases,
            scaling=draw(st.sampled_from(["unit", "rms", "whitened"])),
            examples="batch",
            passes=1,
            refresh=draw(st.booleans()),
        )
        interval = draw(st.sampled_from([1, 2, 3, 100]))
        callbacks.append(partial(SubspaceResampling, interval=interval, bases=draw(st.sampled_from([None, bases]))))
        if draw(st.booleans()) and {"momentum", "betas", "power_rank"} & options.keys():
            callbacks.append(partial(MomentumTransport, how=draw(st.sampled_from(["project", "reset", "keep"]))))
    if draw(st.booleans()):
        callbacks.append(partial(LearningRateControl, interval=2, patience=1))

    evaluation: dict[str, Any] = {}
    if draw(st.booleans()):
        evaluation["micro_batch_size"] = draw(st.sampled_from([1, 3]))
    if draw(st.booleans()) and not isinstance(options.get("estimator"), PerExample):
        evaluation["evaluations_per_forward"] = draw(st.sampled_from([2, 4]))
    return Composition(
        method,
        options,
        callbacks,
        draw(st.sampled_from([None, {}, {"warmup": 0.3, "final": 0.1}])),
        evaluation,
        draw(st.sampled_from(["32-true", "bf16-true", "bf16-mixed"])),
        draw(st.sampled_from([None, 2, 3])),
    )


def assert_exact(composition: Composition, moments: list[float]) -> None:
    """Args: moments: where the process is killed, as shares of the evaluations that are left to the run."""
    with TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        try:
            straight, before = composition.fit(whole)
        except (ValueError, MisconfigurationException) as refusal:
            event(f"refused: {refusal}")
            assert "\n" not in str(refusal)
            assert not list(whole.glob("*.ckpt"))
            return
        for moment in moments:
            fatal = 1 + int(moment * straight.evaluations.number)
            try:
                resumed, _ = composition.fit(killed, fatal)
            except Killed:
                continue
            break  # it was at its end before that many evaluations
        else:
            resumed, _ = composition.fit(killed)
        weights = dict(straight.named_parameters())
        for name, parameter in resumed.named_parameters():
            assert torch.equal(parameter, weights[name]), name
            if not parameter.requires_grad and name in before:
                assert torch.equal(parameter, before[name].to(parameter.dtype)), name
        ledger = whole / "ledger.bin"
        assert (killed / "ledger.bin").read_bytes() == ledger.read_bytes()
        replayed = Layered()
        replay(ledger, replayed, composition.make_method)
        for name, parameter in replayed.named_parameters():
            assert torch.equal(parameter, weights[name]), name


MOMENTS = st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=2)


@given(compositions(), MOMENTS)
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
def test_what_is_composed_is_exact(composition: Composition, moments: list[float]) -> None:
    assert_exact(composition, moments)


@pytest.mark.slow
@given(compositions(), MOMENTS)
@settings(max_examples=300, deadline=None, phases=[Phase.generate])  # to shrink takes long
def test_hundreds_of_compositions_are_exact(composition: Composition, moments: list[float]) -> None:
    assert_exact(composition, moments)
