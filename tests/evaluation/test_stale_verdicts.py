"""Where parameters are read is found out anew when it changes in the middle of a run."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO, ZerothOrderOptimizer
from zolightning.optim.estimators import Estimator, Population, ZScores
from zolightning.optim.probing import Probed
from zolightning.optim.record import FLAT_IN_A_ROW

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
EPS = 1e-2


class Net(nn.Module):
    """A small network whose forward may change."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.double()
        self.read: Callable[[Tensor], Tensor] = lambda x: self.net(x)

    def loss(self) -> Tensor:
        return (self.read(X.double()) - 1).square().mean()


def expected_losses(net: Net, optimizer: ZerothOrderOptimizer) -> list[float]:
    """The losses of a two-sided step with one query, the weights perturbed where they lie."""
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            stored = {parameter: parameter.clone() for parameter in net.parameters()}
            for parameter, change in optimizer.perturbations(0, sign).items():
                change.add_to(stored[parameter], parameter.data)
            found.append(net.loss().item())
            for parameter, value in stored.items():
                parameter.data.copy_(value)
    return found


def attached(net: Net, **kwargs: Any) -> ZerothOrderOptimizer:
    optimizer = MeZO(net.named_parameters(), lr=1e-3, eps=EPS, seed=3)
    optimizer.attach(net, **kwargs)
    return optimizer


def functional(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: net.net[2](torch.tanh(F.linear(x, net.net[0].weight, net.net[0].bias)))


def all_functional(net: Net) -> Callable[[Tensor], Tensor]:
    first, last = net.net[0], net.net[2]
    return lambda x: F.linear(torch.tanh(F.linear(x, first.weight, first.bias)), last.weight, last.bias)


def read_elsewhere(net: Net) -> None:
    net.read = functional(net)


def read_elsewhere_throughout(net: Net) -> None:
    net.read = all_functional(net)


def pruned(net: Net) -> None:
    prune.l1_unstructured(net.net[0], "weight", 0.3)


def parametrized(net: Net) -> None:
    parametrize.register_parametrization(net.net[0], "weight", nn.Identity())


@pytest.mark.parametrize("stacked", [1, 2])
@pytest.mark.parametrize("change", [read_elsewhere, read_elsewhere_throughout, pruned, parametrized])
@pytest.mark.filterwarnings("ignore:`evaluations_per_forward` is 1")
def test_a_weight_that_is_read_elsewhere_is_still_perturbed(change: Callable[[Net], None], stacked: int) -> None:
    net = Net()
    optimizer = attached(net, evaluations_per_forward=stacked)
    for step in range(6):
        if step == 3:
            change(net)
        expected = expected_losses(net, optimizer)
        record = optimizer.estimate(net.loss)
        assert list(record.losses) == pytest.approx(expected, rel=1e-12)
        assert record.projected_grads[0] != 0
        optimizer.step()


def test_the_next_step_finds_out_nothing() -> None:
    net, calls = Net(), []
    optimizer = attached(net)

    def loss() -> Tensor:
        calls.append(1)
        return net.loss()

    counts = []
    for step in range(6):
        if step == 3:
            read_elsewhere(net)
        calls.clear()
        optimizer.estimate(loss)
        optimizer.step()
        counts.append(len(calls))
    assert counts[1] == counts[2] == counts[4] == counts[5] == 2 < counts[3]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_network_that_is_compiled_in_mid_run_is_perturbed_in_place() -> None:
    net = Net()
    optimizer = attached(net)
    optimizer.estimate(net.loss)
    optimizer.step()
    compiled = torch.jit.trace(net.net, X.double())
    net.read = lambda x: compiled(x)
    expected = expected_losses(net, optimizer)
    with pytest.warns(UserWarning, match="perturbed in place"):
        record = optimizer.estimate(net.loss)
    assert list(record.losses) == pytest.approx(expected, rel=1e-12)


def test_a_layer_that_not_every_batch_reads() -> None:
    """As experts of a mixture: perturbed in place from the first batch on that leaves it out."""
    net = Net()
    optimizer = attached(net)
    for step in range(6):
        skips = step % 2
        net.read = (lambda x: net.net[0](x).mean(1, keepdim=True)) if skips else (lambda x: net.net(x))
        expected = expected_losses(net, optimizer)
        if step == 1:
            with pytest.warns(UserWarning, match="2 parameters are unused"):
                record = optimizer.estimate(net.loss)
        else:
            record = optimizer.estimate(net.loss)
        assert list(record.losses) == pytest.approx(expected, rel=1e-12)
        optimizer.step()


class Cached(nn.Linear):
    """Keeps in evaluation mode what it has computed from its weight, as attention biases in timm, DoRA in PEFT."""

    cache: Tensor | None = None

    def train(self, mode: bool = True) -> "Cached":
        assert mode, "asked to do what belongs to the end of training"
        self.cache = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return F.linear(x, self.weight / self.weight.norm(), self.bias)
        if self.cache is None:
            self.cache = self.weight / self.weight.norm()
        return F.linear(x, self.cache, self.bias)


def test_what_modules_keep_in_evaluation_mode_is_not_that_of_other_weights() -> None:
    net = Net()
    net.net[0] = Cached(4, 8, dtype=torch.float64)
    optimizer = attached(net)
    for _ in range(3):
        net.net[0].training = False  # as Lightning's validation sets it: it calls `eval`, and then restores the flag
        net.loss()
        net.net[0].training = True
        expected = expected_losses(net, optimizer)
        record = optimizer.estimate(net.loss)
        assert net.net[0].cache is None
        assert list(record.losses) == pytest.approx(expected, rel=1e-12)
        optimizer.step()


class TestEqualLosses:
    def test_are_said_after_some_steps_and_once(self) -> None:
        class Counting(Net):
            count = 0

            def loss(self) -> Tensor:
                self.count += 1
                return super().loss()

        net = Counting()
        optimizer = MeZO(net.named_parameters(), eps=1e-30, seed=3)
        optimizer.attach(net)
        for step in range(6):
            expected = pytest.warns(
                UserWarning, match=r"^All losses of a step were equal.*`eps` \(1e-30\) is too small"
            )
            with expected if step == FLAT_IN_A_ROW else nullcontext():  # another warning would be an error
                assert optimizer.estimate(net.loss).projected_grads == (0.0,)
            optimizer.step()
            assert net.count == step + 1  # one evaluation of each step leaves traces

    @pytest.mark.parametrize("estimator", [Population(), ZScores()])
    def test_are_equal_though_their_mean_is_rounded(self, estimator: Estimator) -> None:
        losses = torch.full((3,), 0.1, dtype=torch.float64)
        assert Probed(losses.tolist(), estimator.projected_grads(losses, EPS).tolist(), is_empty=False).is_flat

    def test_have_the_verdicts_renewed(self) -> None:
        net = Net()
        optimizer = attached(net)
        optimizer.estimate(net.loss)
        optimizer.step()

        def read(x: Tensor) -> Tensor:
            net.net(x)  # for show: every parameter is seen to be read
            with torch._C.DisableTorchFunction():
                return all_functional(net)(x)

        net.read = read
        for _ in range(FLAT_IN_A_ROW):
            assert optimizer.estimate(net.loss).projected_grads == (0.0,)
            optimizer.step()
        for renewed in (True, False):
            expected = expected_losses(net, optimizer)
            with pytest.warns(UserWarning, match="perturbed in place") if renewed else nullcontext():
                record = optimizer.estimate(net.loss)
            optimizer.step()
            assert list(record.losses) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", ["pruning", "functional"])
def test_under_a_trainer(case: str, make_trainer: Any, regression_data: Callable[..., Any]) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net.float()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            inputs, targets = batch
            if case == "functional" and self.current_epoch >= 2:
                hidden = F.linear(inputs, self.net[0].weight, self.net[0].bias)
                return F.mse_loss(F.linear(torch.tanh(hidden), self.net[2].weight, self.net[2].bias), targets)
            return F.mse_loss(self.net(inputs), targets)

        def configure_optimizers(self) -> None:
            return None

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            grads.append(trainer.optimizers[0].record.projected_grads[0])

    grads: list[float] = []
    module = Module()
    callbacks: list[L.Callback] = [ZerothOrder(partial(MeZO, lr=1e-3, seed=1)), Recorder()]
    if case == "pruning":
        names = [(module.net[0], "weight"), (module.net[2], "weight")]
        names += [(module.net[0], "bias"), (module.net[2], "bias")]
        options = {"use_lottery_ticket_hypothesis": False, "amount": 0.3, "apply_pruning": lambda epoch: epoch == 1}
        callbacks.append(ModelPruning("l1_unstructured", names, **options))
    make_trainer(max_epochs=4, callbacks=callbacks).fit(module, regression_data(num_batches=3))
    assert len(grads) == 12 and all(grads)
