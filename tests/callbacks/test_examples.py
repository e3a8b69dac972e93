"""A direction for each example under a Trainer: what other callbacks see, and modules that run example by example."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from optimizer_steps import standard
from training import Records
from zolightning.callbacks import ZerothOrder
from zolightning.kernels.noise import key
from zolightning.optim import MeZO
from zolightning.optim.estimators import PerExample

EPS = 1e-3


class Logging(L.LightningModule):
    """Counts its steps, logs and returns something of its own; skips what has no positive target."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("steps", torch.zeros(()))
        self.outputs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any] | None:
        inputs, targets = batch
        self.steps += 1
        self.log("size", float(len(inputs)))
        if not (targets > 0).any():
            return None
        kept = targets > 0
        return {"loss": F.mse_loss(self.net(inputs)[kept], targets[kept]), "num_terms": kept.sum(), "size": len(inputs)}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.outputs.append((outputs["size"], self.trainer.callback_metrics.get("size")))

    def configure_optimizers(self) -> None:
        return None


def test_under_a_trainer(make_trainer: Callable[..., L.Trainer]) -> None:
    """Other callbacks see the evaluation of the whole batch, once; an example that is skipped has no terms."""
    module = Logging()
    inputs, targets = torch.randn(12, 4), torch.arange(12).float().remainder(4)[:, None]
    method, recorder = partial(MeZO, lr=1e-2, eps=EPS, estimator=PerExample(), num_queries=6), Records()
    trainer = make_trainer(max_steps=2, callbacks=[ZerothOrder(method), recorder])
    weight, bias = (parameter.detach().clone() for parameter in module.net.parameters())
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=6))
    assert module.steps == 2 and module.outputs == [(6, 6.0), (6, 6.0)]
    expected = []
    for e in range(6):
        moves = [standard(p.shape, key(0, 0, e, f"net.{n}")) for n, p in module.net.named_parameters()]
        plus, minus = ((inputs[e] @ (weight + s * EPS * moves[0]).T + bias + s * EPS * moves[1]) for s in (1, -1))
        square = ((plus - targets[e]).square() - (minus - targets[e]).square()).item()
        expected.append(0.0 if e in (0, 4) else 6 / 4 * square / (2 * EPS))
    assert recorder.records[0].projected_grads == pytest.approx(expected, abs=2e-3)


def test_a_first_loss_that_is_not_finite_is_not_held_against_the_network(
    make_trainer: Callable[..., L.Trainer],
) -> None:
    """Otherwise a run that resumes with such a step would round as networks do that run once per example."""
    module, rows = Logging(), []
    inputs, targets = torch.randn(18, 4), torch.ones(18, 1)
    targets[1] = float("inf")
    module.net.register_forward_hook(lambda net, args, output: rows.append(len(args[0])))
    method = partial(MeZO, lr=1e-2, estimator=PerExample(), num_queries=6)
    trainer = make_trainer(max_steps=3, callbacks=[ZerothOrder(method, skip_nonfinite=True)])
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=6))
    assert rows[-14:] == 2 * [6, *6 * [1]]  # for each sign the whole batch, whose output the examples share


class Slope(L.LightningModule):
    """Differentiates what its network computes by the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(self.net(inputs).sum(), inputs, create_graph=True)
        return (slope.square().sum(1) - 1).square().mean()

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:The network runs once per example from here on.*`training_step` differentiates")
def test_a_step_that_differentiates_runs_example_by_example(make_trainer: Callable[..., L.Trainer]) -> None:
    module, method = Slope(), partial(MeZO, lr=1e-2, estimator=PerExample(), num_queries=3)
    before = module.net[0].weight.detach().clone()
    trainer = make_trainer(max_steps=2, callbacks=[ZerothOrder(method)])
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=3))
    assert trainer.global_step == 2 and not torch.equal(module.net[0].weight, before)


class TwoNetworks(Logging):
    """Of which no submodule holds all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        inputs, targets = batch
        return {"loss": F.mse_loss(self.net(inputs) + self.other(inputs), targets), "size": len(inputs)}


def test_modules_without_one_network_run_example_by_example(make_trainer: Callable[..., L.Trainer]) -> None:
    module = TwoNetworks()
    callback = ZerothOrder(partial(MeZO, lr=1e-2, estimator=PerExample(), num_queries=2))
    with pytest.warns(
        UserWarning, match="once per example .*: no submodule of TwoNetworks holds all parameters that train"
    ):
        make_trainer(max_steps=1, callbacks=[callback]).fit(
            module, DataLoader(TensorDataset(torch.randn(2, 4), torch.randn(2, 1)), batch_size=2)
        )
