"""ForwardGradient: derivatives of networks along directions, against backpropagation."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from zolightning.callbacks import ZerothOrder
from zolightning.directions.slices import Slice
from zolightning.models import answer_log_probs, candidate_scores, classification_loss
from zolightning.optim import LOZO, MeZO, NonFiniteLossError, SparseMeZO
from zolightning.optim.estimators import ForwardGradient, TwoSided
from zolightning.optim.share import Share

EXAMPLES = [([5, 9, 3], [[6, 2], [11]]), ([2, 4, 8, 7], [[6], [11, 3, 9]])]


def forward_mezo(module: nn.Module, num_queries: int = 1, **options: object) -> MeZO:
    options = {"lr": 1e-2, "seed": 3, "estimator": ForwardGradient(), "num_queries": num_queries} | options
    optimizer = MeZO(module.named_parameters(), **options)
    optimizer.attach(module)
    return optimizer


def derivatives(module: nn.Module, optimizer: MeZO, loss) -> list[float]:
    """Inner products of gradient and directions, by backpropagation."""
    own = {parameter: parameter for parameter in module.parameters() if parameter.requires_grad}
    gradients = dict(zip(own, torch.autograd.grad(loss(), list(own)), strict=True))
    found = []
    for query in range(optimizer.num_queries):
        products = []
        for parameter, direction in optimizer.unit_directions(query).items():
            z = torch.zeros_like(parameter)
            direction.add_to(torch.zeros_like(parameter), z)
            products.append((gradients[parameter].double() * z.double()).sum())
        found.append(sum(products).item())
    return found


@pytest.mark.parametrize("attention", [None, "eager"])
def test_projected_gradients_are_those_of_backpropagation(make_model, make_batch, architecture, attention):
    """Of eight architectures, tied embeddings among them; and nothing of the module has changed.

    In float64 where the attention is fused; eager attention computes its softmax in float32, which masks of float64
    do not fit into.
    """
    model = make_model(architecture, attention)
    if model.config._attn_implementation == "sdpa":
        model.double()
    batch = make_batch(EXAMPLES, labels=[1, 0])

    def loss() -> torch.Tensor:
        return classification_loss(candidate_scores(*answer_log_probs(model, batch)), batch["label"])

    before = copy.deepcopy(model.state_dict())
    optimizer = forward_mezo(model, num_queries=2)
    record = optimizer.estimate(loss)
    # log-probabilities are float32 whatever the model is
    rel = 1e-5 if model.dtype is torch.float64 else 1e-4
    assert record.projected_grads == pytest.approx(derivatives(model, optimizer, loss), rel=rel)
    assert record.losses == pytest.approx([loss().item()] * 2)
    assert record.forward_passes == 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_to_round_off_and_the_step_that_follows():
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    loss = lambda: F.cross_entropy(net(inputs), targets)  # noqa: E731
    optimizer = forward_mezo(net, num_queries=3)
    expected = derivatives(net, optimizer, loss)
    weight = net[0].weight
    (z,) = torch.zeros(1, *weight.shape, dtype=torch.float64)
    record = optimizer.estimate(loss)
    assert record.projected_grads == pytest.approx(expected, rel=1e-13)
    for query, g in enumerate(expected):
        direction = torch.zeros_like(z)
        optimizer.unit_directions(query)[weight].add_to(torch.zeros_like(z), direction)
        z += g / 3 * direction
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - 1e-2 * z, rtol=1e-6, atol=1e-7)  # coefficients are float32


def test_parameters_read_twice_frozen_ones_and_slices():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.table.weight
            self.frozen, self.scale = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
            self.frozen.requires_grad_(False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.frozen(self.table(ids)) * self.scale.exp())

    net, ids = Net().double(), torch.tensor([1, 3, 3])
    loss = lambda: F.cross_entropy(net(ids), ids)  # noqa: E731
    optimizer = forward_mezo(net)
    assert optimizer.estimate(loss).projected_grads == pytest.approx(derivatives(net, optimizer, loss), rel=1e-12)

    optimizer = forward_mezo(net)
    optimizer.slices[net.table.weight] = Slice(0, torch.tensor([1, 4]))
    (g,) = optimizer.estimate(loss).projected_grads
    directions = optimizer.unit_directions(0)
    table, scale = torch.autograd.grad(loss(), [net.table.weight, net.scale])
    z_rows, z_scale = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    directions[net.table.weight].add_to(torch.zeros_like(z_rows), z_rows)
    directions[net.scale].add_to(torch.zeros_like(z_scale), z_scale)
    assert g == pytest.approx(((table[[1, 4]] * z_rows).sum() + (scale * z_scale).sum()).item(), rel=1e-12)


def test_in_bfloat16_it_says_more_than_differences_do(make_model, make_batch):
    batch = make_batch(EXAMPLES, labels=[1, 0])

    def loss(model: nn.Module) -> torch.Tensor:
        return classification_loss(candidate_scores(*answer_log_probs(model, batch)), batch["label"])

    model, exact = make_model("llama").bfloat16(), make_model("llama").bfloat16().double()
    expected = torch.tensor(derivatives(exact, forward_mezo(exact, num_queries=8), partial(loss, exact)))
    error = {
        type(estimator): (
            torch.tensor(
                forward_mezo(model, num_queries=8, estimator=estimator).estimate(partial(loss, model)).projected_grads
            )
            - expected
        ).norm()
        for estimator in (ForwardGradient(), TwoSided())
    }
    assert error[ForwardGradient] < 0.4 * expected.norm()
    assert error[ForwardGradient] < error[TwoSided]


def test_ranks_that_share_queries_find_what_one_does():
    net, inputs = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=torch.float64)
    loss = lambda: (net(inputs).square().mean(), 6)  # noqa: E731
    whole = forward_mezo(net, num_queries=3).estimate(loss)
    sent: list[torch.Tensor] = []

    def send(sums: torch.Tensor) -> torch.Tensor:
        sent.append(sums)
        return sum(sent)

    for index in range(2):
        record = forward_mezo(net, num_queries=3).estimate(loss, Share(send, index=index, count=2))
    assert record.projected_grads == whole.projected_grads
    assert record.losses == whole.losses


class Regression(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        self.log("train/mse", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_under_a_trainer_it_learns_what_gradient_descent_does(tmp_path, micro_batch_size):
    torch.manual_seed(1)
    inputs = torch.randn(64, 3, dtype=torch.float64)
    module, loader = Regression(), DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=8)
    method = partial(MeZO, lr=0.02, estimator=ForwardGradient(), num_queries=4, seed=0)
    callback = ZerothOrder(method, micro_batch_size=micro_batch_size)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    before = F.mse_loss(module.net.eval()(inputs), inputs.sum(1, keepdim=True)).item()
    module.train()
    trainer = L.Trainer(max_steps=40, callbacks=callback, enable_model_summary=False, **options)
    trainer.fit(module, loader)
    after = F.mse_loss(module.net.eval()(inputs), inputs.sum(1, keepdim=True)).item()
    assert after < 0.5 * before
    assert trainer.optimizers[0].param_groups[0]["forward_passes"] == 40 * 4 * 3


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda net, x: F.ctc_loss(net(x)[:, None].log_softmax(-1), *CTC),
            "the network uses .*ctc_loss.*, which has",
        ),
        (lambda net, x: Scaled.apply(net(x)).mean(), "the network uses a custom function, which has"),
        (lambda net, x: torch.tensor(net(x).mean().item()), "the loss carries no derivative: it is detached"),
        (lambda net, x: F.linear(x, net.weight).mean(), r"1 parameter is unused, or .*: bias\. Freeze them"),
    ],
)
@pytest.mark.filterwarnings("ignore:. parameters? (is|are) unused or read")
def test_a_loss_that_cannot_be_differentiated(loss, message):
    net, inputs = nn.Linear(4, 5), torch.randn(6, 4)
    with pytest.raises(ValueError, match=rf"`estimator` is ForwardGradient\(\), but {message}"):
        forward_mezo(net).estimate(lambda: loss(net, inputs))


CTC = (torch.tensor([[1, 2]]), (6,), (2,))


def test_a_derivative_that_is_not_finite_stops_the_step():
    net = nn.Linear(4, 1, bias=False)
    with pytest.raises(NonFiniteLossError, match="The loss is not finite at step 0: nan"):
        forward_mezo(net).estimate(lambda: (net.weight - net.weight.detach()).square().sum().sqrt() + net.weight.sum())
    skipped = forward_mezo(net).estimate(lambda: net.weight.sum() * torch.nan, skip_nonfinite=True)
    assert skipped.projected_grads == ()


def test_an_empty_batch_and_equal_losses_say_nothing_wrong(recwarn):
    net = nn.Linear(4, 1, bias=False)
    optimizer = forward_mezo(net, num_queries=2)
    assert optimizer.estimate(lambda: (net.weight.sum() * torch.nan, 0)).projected_grads == ()
    for _ in range(4):  # all losses of a step are the same ones
        optimizer.estimate(lambda: net.weight.sum())
        optimizer.step()
    assert not [warning for warning in recwarn if "torch.jit" not in str(warning.message)]  # torch's own


def test_what_it_does_not_go_with():
    net = nn.Linear(4, 4)
    for method in (LOZO, SparseMeZO):
        with pytest.raises(ValueError, match=rf"`estimator` is ForwardGradient\(\), but {method.__name__} searches"):
            method(net.named_parameters(), estimator=ForwardGradient())
    optimizer = MeZO(net.named_parameters(), estimator=ForwardGradient())
    with pytest.raises(ValueError, match=r"`evaluations_per_forward` is 2, but with ForwardGradient\(\)"):
        optimizer.attach(net, evaluations_per_forward=2)
