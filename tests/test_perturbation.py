"""A loss under Perturbed is the loss of perturbed weights, whatever reads them, and the weights stay as they are."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.audit import FlippedBit, audit, find_readers
from zolightning.direction import directions
from zolightning.perturbation import Perturbation, Perturbed, Scratch

Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
    "addmm": (AddMM, applied(values(3, 4))),
    "assorted": (Assorted, applied(values(3, 4))),
    "input_gradient": (InputGradient, applied(values(3, 4))),
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


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Loss]:
    make, loss = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), loss


class TestPerturbed:
    def test_the_loss_is_that_of_perturbed_weights(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before, plain = snapshot(module), loss(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
            assert_unchanged(module, before)
        with written_to_the_weights(module):
            expected = loss(module)
        assert torch.equal(exchanged, expected) and not torch.equal(exchanged, plain)
        assert torch.equal(loss(module), plain)

    def test_in_place_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
        with Perturbed(perturbations(module), in_place=module.parameters()):
            in_place = loss(module)
        assert_unchanged(module, before)
        assert torch.equal(in_place, exchanged)

    def test_a_mixture_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
        with Perturbed(perturbations(module), in_place=list(module.parameters())[::2]):
            mixed = loss(module)
        assert_unchanged(module, before)
        assert torch.equal(mixed, exchanged)

    def test_the_audit_finds_nothing_to_do(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        assert audit(module.parameters(), lambda: loss(module)) == set()
        assert_unchanged(module, before)

    def test_watching_the_readers_only_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        readers = find_readers(module, set(module.parameters()), lambda: loss(module))
        before, forwards = snapshot(module), [m.forward for m in module.modules()]
        with Perturbed(perturbations(module)):
            everywhere = loss(module)
        with Perturbed(perturbations(module), readers=readers):
            exchanged = loss(module)
        assert torch.equal(exchanged, everywhere)
        assert_unchanged(module, before)
        assert [m.forward for m in module.modules()] == forwards

    def test_scratch_is_shared_between_contexts(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        scratch = Scratch()
        losses = []
        for _ in range(3):
            with Perturbed(perturbations(module), scratch=scratch):
                losses.append(loss(module))
        assert losses[0] == losses[1] == losses[2]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("name", ["mlp", "tied_head", "channels_last"])
    def test_other_dtypes(self, name: str, dtype: torch.dtype) -> None:
        make, loss = NETWORKS[name]
        module = make().eval().to(dtype)

        def cast_loss(module: nn.Module) -> Tensor:
            if name == "tied_head":
                return loss(module)
            inputs = values(3, 4) if name == "mlp" else values(2, 3, 7, 7).to(memory_format=torch.channels_last)
            return module(inputs.to(dtype)).double().square().mean()

        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = cast_loss(module)
        assert_unchanged(module, before)
        with written_to_the_weights(module):
            assert torch.equal(cast_loss(module), exchanged)

    @pytest.mark.parametrize("padding", [False, True])
    def test_transformer_layer_with_a_fast_path(self, padding: bool) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
        loss = applied(values(2, 5, 8), src_key_padding_mask=mask)
        before = snapshot(layer)
        with Perturbed(perturbations(layer)):
            exchanged = loss(layer)
        # Under a function mode, even an empty one, torch takes the layer's slow path, which adds in another order
        with written_to_the_weights(layer), Perturbed({}):
            assert torch.equal(loss(layer), exchanged)
        with written_to_the_weights(layer):
            fast = loss(layer)
        assert_unchanged(layer, before)
        if not padding:  # where the fast path leaves zeros, and the slow one does not
            torch.testing.assert_close(exchanged, fast, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_in_the_loss_leaves_the_weights_alone(
        self, dtype: torch.dtype, in_place: bool, error: type[BaseException]
    ) -> None:
        module = mlp().to(dtype)
        before = snapshot(module)
        with (
            pytest.raises(error),
            Perturbed(perturbations(module), in_place=module.parameters() if in_place else ()),
        ):
            module(values(3, 4).to(dtype))
            raise error
        assert_unchanged(module, before)
        assert not torch.overrides._get_current_function_mode()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_while_perturbing_in_place_restores_what_was_done(self, error: type[BaseException]) -> None:
        class Failing:
            def add_to(self, weight: Tensor, out: Tensor) -> None:
                raise error("out of memory")

        module = mlp()
        before = snapshot(module)
        made = perturbations(module)
        made[module[3].weight] = Failing()
        with pytest.raises(error), Perturbed(made, in_place=module.parameters()):
            raise AssertionError("the context was entered")
        assert_unchanged(module, before)
        assert not torch.overrides._get_current_function_mode()

    def test_descriptions_of_a_parameter_do_not_count_as_reading(self) -> None:
        weight = nn.Parameter(values(3, 4))
        with Perturbed({weight: FlippedBit()}) as perturbed:
            described = (weight.shape, weight.dtype, weight.device, weight.requires_grad, weight.grad, weight.numel())
            assert described == (torch.Size([3, 4]), torch.float32, torch.device("cpu"), True, None, 12)
            assert (weight.size(0), weight.dim(), weight.stride(), len(weight), weight.ndim) == (3, 2, (4, 1), 3, 2)
            assert weight.is_leaf and weight.is_contiguous() and {weight: 1}[weight] == 1
        assert not perturbed.seen

    def test_other_tensors_pass_untouched(self) -> None:
        weight, other = nn.Parameter(values(3, 4)), nn.Parameter(values(3, 4, seed=1))
        with Perturbed({weight: FlippedBit()}) as perturbed:
            assert torch.equal(other + 1, other.data + 1) and other.view(-1).data_ptr() == other.data_ptr()
        assert not perturbed.seen

    def test_memory_is_that_of_the_largest_layer(self) -> None:
        net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)], nn.Linear(32, 64))
        scratch = Scratch()
        for _ in range(3):
            with Perturbed(perturbations(net), scratch=scratch):
                net(values(2, 32))
        (free,) = scratch._free.values()
        # A layer reads its weight and its bias at once; both buffers grew to what they were last used for
        assert len(free) == 2 and sum(map(len, free)) <= 2 * 64 * 32 * 4

    def test_modules_see_perturbed_weights_in_hooks_too(self) -> None:
        net, seen = mlp(), []
        handle = net[0].register_forward_hook(lambda module, args, output: seen.append(module.weight * 1))
        with Perturbed(perturbations(net)):
            net(values(3, 4))
        handle.remove()
        with written_to_the_weights(net):
            assert torch.equal(seen[0], net[0].weight)


class TestAudit:
    @pytest.mark.parametrize(
        "compiler", [torch.jit.script, partial(torch.jit.trace, example_inputs=values(3, 5)), lambda net: net]
    )
    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_torch_script_is_found_and_perturbed_in_place(self, compiler: Callable[[nn.Module], nn.Module]) -> None:
        net = nn.Sequential(nn.Linear(4, 5), compiler(mlp_without_norm()), nn.Linear(3, 2))
        loss, before = applied(values(3, 4)), snapshot(net)
        found = audit(net.parameters(), lambda: loss(net))
        assert found == (set(net[1].parameters()) if isinstance(net[1], torch.jit.ScriptModule) else set())
        assert_unchanged(net, before)
        with Perturbed(perturbations(net), in_place=found):
            mixed = loss(net)
        assert_unchanged(net, before)
        with written_to_the_weights(net):
            assert torch.equal(loss(net), mixed)

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
    def test_parameters_that_are_read_both_ways_put_all_in_place(self) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.scripted = nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4))

            def forward(self, x: Tensor) -> Tensor:
                return self.scripted(self.first(x)) + F.linear(x, self.scripted.weight, self.scripted.bias)

        net = Both()
        assert audit(net.parameters(), lambda: applied(values(3, 4))(net)) == set(net.parameters())

    def test_unused_parameters_are_perturbed_in_place(self) -> None:
        net = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)})
        assert audit(net.parameters(), lambda: net["used"](values(3, 4)).sum()) == set(net["unused"].parameters())

    @pytest.mark.parametrize("whole", [True, pytest.param(False, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_compiled_networks(self, whole: bool, warm: bool) -> None:
        """Right through the audit: a compiled graph does not see the exchange, and reads the weights it is given."""
        torch._dynamo.reset()
        net = nn.Sequential(nn.Linear(4, 5), mlp_without_norm())
        loss, before = applied(values(3, 4)), snapshot(net)
        (net if whole else net[1]).compile()
        if warm:
            loss(net)
        found = audit(net.parameters(), lambda: loss(net))
        assert_unchanged(net, before)
        for eps in (0.05, -0.05, 0.2):  # a graph that had kept the noise of one would miss the next
            with Perturbed(perturbations(net, eps), in_place=found):
                compiled = loss(net)
            with Perturbed(perturbations(net, eps), in_place=net.parameters()):
                expected = loss(net)
            torch.testing.assert_close(compiled, expected, rtol=1e-6, atol=0)
        assert_unchanged(net, before)

    def test_a_forward_pass_that_changes_its_weights_is_refused(self) -> None:
        net = nn.Embedding(11, 5, max_norm=1.0)
        loss = applied(IDS)
        loss(net)  # from here on the norms are what they should be
        before = snapshot(net)
        with pytest.raises(ValueError, match=r"A parameter of shape \(11, 5\) is changed by the forward pass itself"):
            audit(net.parameters(), lambda: loss(net))
        assert_unchanged(net, before)

    def test_a_loss_that_is_not_finite_gives_no_verdict(self) -> None:
        net = mlp()
        assert audit(net.parameters(), lambda: net(values(3, 4)).sum() * float("nan")) is None

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_an_error_in_the_loss_leaves_the_weights_alone(self, dtype: torch.dtype) -> None:
        net, calls = channels_last_net().to(dtype), []

        def fails_at(call: int) -> Tensor:
            calls.append(call)
            if len(calls) == call:
                raise KeyboardInterrupt
            return net(values(2, 3, 7, 7).to(dtype)).double().sum()

        before = snapshot(net)
        for call in (1, 2, 3):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                audit(net.parameters(), partial(fails_at, call))
            assert_unchanged(net, before)

    def test_order_of_sums_may_vary_a_little(self) -> None:
        net, calls = mlp(), []

        def jittering() -> Tensor:
            calls.append(1)
            return net(values(3, 4)).double().square().mean() * (1 + 1e-6 * (-1) ** len(calls))

        assert audit(net.parameters(), jittering) == set()


def mlp_without_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
class TestFlippedBit:
    def test_flipping_twice_restores_every_bit(self, dtype: torch.dtype) -> None:
        weight = values(64, 3).to(dtype).t()  # not contiguous
        flipped = weight.clone()
        FlippedBit().flip_(flipped)
        # One bit, four below the top of the mantissa: between 1/64 and 1/32 of the number
        change = ((flipped - weight).abs() / weight.abs()).double()
        assert (change > 1 / 65).all() and (change < 1 / 31).all()
        FlippedBit().flip_(flipped)
        assert torch.equal(flipped, weight)

    def test_rows(self, dtype: torch.dtype) -> None:
        table, whole = values(6, 3).to(dtype), torch.empty(6, 3, dtype=dtype)
        rows, out = torch.tensor([5, 0, 5]), torch.empty(3, 3, dtype=dtype)
        FlippedBit().add_to(table, whole)
        FlippedBit().add_to_rows(table, rows, out)
        assert torch.equal(out, whole[rows])


class TestAutocast:
    """Autocast keeps the casts it has made of parameters, which must never outlive a change of the weights."""

    def loss(self, net: nn.Module) -> Tensor:
        return net(values(3, 4)).double().square().mean()

    @pytest.mark.parametrize("in_place", ["nothing", "everything", "half"])
    def test_no_stale_casts(self, in_place: str) -> None:
        net = mlp()
        chosen = {"nothing": [], "everything": list(net.parameters()), "half": list(net.parameters())[:2]}[in_place]
        with written_to_the_weights(net), torch.autocast("cpu", torch.bfloat16):
            expected = self.loss(net)
        with torch.autocast("cpu", torch.bfloat16):
            plain = self.loss(net)  # fills the cache
            for _ in range(2):
                with Perturbed(perturbations(net), in_place=chosen):
                    assert torch.equal(self.loss(net), expected)
                assert torch.equal(self.loss(net), plain)

    def test_audit(self) -> None:
        net = mlp()
        with torch.autocast("cpu", torch.bfloat16):
            plain = self.loss(net)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert audit(net.parameters(), lambda: self.loss(net)) == set()
            assert torch.equal(self.loss(net), plain)
