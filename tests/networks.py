"""Networks that read their parameters in many ways, their losses, and perturbed weights to compare them at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.dense import directions
from zolightning.directions.perturbation import Perturbation

Loss = Callable[[nn.Module], Tensor]


def perturbations(module: nn.Module, eps: float = 0.05) -> dict[nn.Parameter, Perturbation]:
    named = dict(module.named_parameters())
    made = directions(named, seed=1, step=2, coefficients={0: eps}, kind="gaussian")
    return {parameter: made[name] for name, parameter in named.items()}


@contextmanager
def written_to_the_weights(module: nn.Module) -> Iterator[None]:
    """The plain way, without anything of Perturbed: the comparison."""
    originals = {p: p.detach().clone() for p in module.parameters()}
    with torch.no_grad():
        for parameter, perturbation in perturbations(module).items():
            out = torch.empty(parameter.shape, dtype=parameter.dtype)
            perturbation.add_to(parameter.detach().contiguous(), out)
            parameter.copy_(out)
    yield
    with torch.no_grad():
        for parameter, original in originals.items():
            parameter.copy_(original)


def snapshot(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def assert_unchanged(module: nn.Module, before: list[Tensor]) -> None:
    with torch._C.DisableTorchFunction():  # the stored bits, also inside the context
        for (name, parameter), original in zip(module.named_parameters(), before, strict=True):
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
            assert torch.equal(parameter.detach().view(integer), original.view(integer)), name


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids)))


class Borrower(nn.Module):
    """Reads the weight of a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = nn.Linear(4, 6)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.owner.weight, bias=self.owner.bias) * self.scale @ self.owner.weight


class Views(nn.Module):
    """Keeps views of parameters beyond the call that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(values(1, 1, 4))
        self.square = nn.Parameter(values(4, 4, seed=1))
        self.other = nn.Parameter(values(4, 4, seed=2))
        self.pair = nn.Parameter(values(2, 4, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        transposed, same = self.square.t(), self.square.to(x.dtype)
        property_view, detached, data = self.other.mT, self.other.detach(), self.other.data
        first, second = self.pair
        parts = self.square.split(2)
        row = self.other[1]
        # Every one of these reads another parameter in between
        y = F.linear(x, self.other) @ transposed + x @ same + x @ property_view + x @ detached + x @ data
        z = y * first + second + torch.cat([*parts]).sum(0) + row
        return torch.cat([token, z[:, None]], dim=1)


class Constant(nn.Module):
    """Returns its own parameter."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self) -> Tensor:
        return self.value


class Prompted(nn.Module):
    """Reads what another module returns as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = Constant(values(3, 4))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        prompt = self.prompt()
        return self.linear(x).sum() * prompt + self.linear(prompt) + prompt.square()


class FixedBias(nn.Linear):
    """Its bias is no parameter any more."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        bias = self.bias.detach()
        del self.bias
        self.register_buffer("bias", bias)


class AddMM(nn.Module):
    """GPT-2's way of a linear layer: weights of shape (inputs, outputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(values(4, 6)), nn.Parameter(values(6, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError


class Assorted(nn.Module):
    """Lists of parameters, writes from parameters, own autograd functions, einsum, vmap, sparse products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(values(4, 4)), nn.Parameter(values(4, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        written = torch.empty(4, 4)
        written.copy_(self.weight)
        written[0] = self.bias
        total = torch.zeros(4)
        total += self.bias
        total = total + torch.stack([self.bias, self.bias]).sum(0) + torch.cat((self.weight, self.weight)).sum(0)
        mapped = torch.vmap(lambda row: self.weight @ row + self.bias)(x)
        sparse = torch.sparse.mm(x.to_sparse(), self.weight)
        kept_sparse = self.weight.to_sparse()
        einsum = torch.einsum("ij,kj->ik", x, self.weight)
        return x @ written + total + OwnFunction.apply(x, self.weight) + mapped + sparse + einsum + x @ kept_sparse


class InputGradient(nn.Module):
    """Differentiates by its inputs, so that autograd saves what the layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x)[0]


class Transformed(nn.Module):
    """Is differentiated by its inputs, and mapped over them, by torch.func."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.conv, self.linear = nn.Conv1d(1, 2, 3), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        def output(x: Tensor) -> Tensor:
            return torch.tanh(self.linear(self.conv(x[None]).flatten())).sum()

        rows = torch.vmap(lambda example: self.embedding(example).mean(0))(ids)
        _, slopes = torch.func.jvp(torch.vmap(output), (rows,), (torch.ones_like(rows),))
        return torch.vmap(torch.func.grad(output))(rows) + torch.func.hessian(output)(rows[0]).sum(0) + slopes.sum()


def channels_last_net() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.Flatten())
    return net.to(memory_format=torch.channels_last)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 3))


IDS = torch.tensor([[1, 5, 5, 10], [0, 3, 1, 2]])


def applied(*inputs: Any, **kwargs: Any) -> Loss:
    def loss(module: nn.Module) -> Tensor:
        outputs = module(*inputs, **kwargs)
        return (outputs[0] if isinstance(outputs, tuple) else outputs).double().square().mean()

    return loss


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "mlp": (mlp, applied(values(3, 4))),
    "channels_last": (channels_last_net, applied(values(2, 3, 7, 7).to(memory_format=torch.channels_last))),
    "tied_head": (TiedHead, applied(IDS)),
    "borrowed_weight": (Borrower, applied(values(3, 4))),
    "views": (Views, applied(values(3, 4))),
    "returns_its_parameter": (Prompted, applied(values(3, 4))),
    "padding_idx": (partial(nn.Embedding, 11, 5, padding_idx=1), applied(IDS)),
    "embedding_bag": (partial(nn.EmbeddingBag, 11, 5), applied(IDS)),
    "bias_in_a_buffer": (FixedBias, applied(values(3, 4))),
    "addmm": (AddMM, applied(values(3, 4))),
    "assorted": (Assorted, applied(values(3, 4))),
    "input_gradient": (InputGradient, applied(values(3, 4))),
    "transformed": (Transformed, applied(IDS)),
    "attention": (partial(nn.MultiheadAttention, 8, 2, batch_first=True), applied(*[values(2, 5, 8)] * 3)),
    "attention_of_other_keys": (
        partial(nn.MultiheadAttention, 8, 2, kdim=6, vdim=4),
        applied(values(5, 2, 8), values(5, 2, 6), values(5, 2, 4)),
    ),
    "lstm": (partial(nn.LSTM, 4, 5, num_layers=2, bidirectional=True), applied(values(6, 2, 4))),
    "gru": (partial(nn.GRU, 4, 5), applied(values(6, 2, 4))),
    "bilinear": (partial(nn.Bilinear, 4, 4, 3), applied(values(2, 4), values(2, 4, seed=1))),
    "weight_norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)),
        applied(values(3, 4)),
    ),
    "spectral_norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)),
        applied(values(3, 4)),
    ),
    "no_elements": (lambda: nn.ParameterList([values(0, 3), values(2)])[:], lambda m: m[0].sum() + m[1].sum()),
}
