"""Functions are watched in the modules that read perturbed parameters, and only where these are all that do."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.trials import FlippedBit
from zolightning.evaluation.find_reads import find_readers
from zolightning.evaluation.perturbed import Perturbed
from zolightning.optim import MeZO, SubZero

X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Two layers, and what an experimenter may do with the second one's weight."""

    def __init__(self, also: Callable[["Net", Tensor], Tensor] = lambda net, x: x) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        return self.also(self, self.second(torch.tanh(self.first(x))))

    def loss(self) -> Tensor:
        return self(X).square().mean()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def readers_of(net: Net, layer: nn.Module) -> tuple[nn.Module, ...] | None:
    readers = find_readers(net, set(layer.parameters()), net.loss)
    return None if readers is None else tuple(readers)


class TestFindReaders:
    def test_owners_that_are_called(self) -> None:
        net = Net()
        assert readers_of(net, net) == (net.first, net.second)
        assert readers_of(net, net.second) == (net.second,)

    def test_all_owners_of_a_tied_parameter(self) -> None:
        net = Net()
        net.second.weight = net.first.weight
        assert readers_of(net, net.second) == (net.first, net.second)

    def test_what_each_of_them_reads(self) -> None:
        """An owner inside another one's forward, and one that reads its sibling's weight: a few parameters may move."""
        net = Net(lambda net, x: net.reader(x) * net.scale)
        net.reader, net.scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.5))
        net.reader.forward = lambda x: F.linear(x, net.reader.weight) @ net.first.weight
        first, second, reader = ([layer.weight, layer.bias] for layer in (net.first, net.second, net.reader))
        assert find_readers(net, {*first, *second, net.reader.weight, net.scale}, net.loss) == {
            net: {net.scale},
            net.first: set(first),
            net.second: set(second),
            net.reader: {net.first.weight, reader[0]},
        }

    def test_a_parent_that_owns_one_too(self) -> None:
        net = Net(lambda net, x: x * net.scale)
        net.scale = nn.Parameter(torch.tensor(1.5))
        assert readers_of(net, net) == (net, net.first, net.second)

    @pytest.mark.parametrize(
        "also",
        [
            lambda net, x: F.linear(x, net.second.weight),
            lambda net, x: x + net.second.bias[0],
            lambda net, x: x + net.second.bias.mean(),
            lambda net, x: x @ net.second.weight.T,
            lambda net, x: x if net.second.weight[0, 0] < 100 else -x,  # which moves no loss in the trial
        ],
    )
    def test_none_where_others_read_too(self, also: Callable[[Net, Tensor], Tensor]) -> None:
        net = Net(also)
        assert readers_of(net, net.second) is None
        assert readers_of(net, net.first) == (net.first,)

    def test_none_where_others_read_zeros(self) -> None:
        net = Net(lambda net, x: x + net.second.bias.mean())
        nn.init.zeros_(net.second.bias)
        assert readers_of(net, net.second) is None

    def test_none_where_a_hook_reads(self) -> None:
        net = Net()
        net.second.register_forward_hook(lambda module, _, output: output * module.weight.mean())
        assert readers_of(net, net.second) is None

    def test_none_where_the_owner_is_never_called(self) -> None:
        net = nn.MultiheadAttention(4, 2)
        weight = net.out_proj.weight
        assert find_readers(net, {weight}, lambda: net(X, X, X)[0].square().mean()) is None
        everything = set(net.parameters())
        assert net in (find_readers(net, everything, lambda: net(X, X, X)[0].square().mean()) or ())

    def test_none_where_hooks_would_change_what_is_read(self) -> None:
        """nn.TransformerEncoderLayer calls its submodules where it finds hooks, and otherwise reads what they own."""
        net = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval()
        assert find_readers(net, set(net.parameters()), lambda: net(X[None]).square().mean()) is None

    def test_losses_that_cannot_be_compared(self) -> None:
        net = Net(lambda _, x: x * float("nan"))
        assert readers_of(net, net.second) is None


class TestPerturbed:
    def test_functions_elsewhere_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        net, watched, run = Net(), [], []

        def spy(calls: list[object], own: Callable[..., object]) -> Callable[..., object]:
            return lambda mode, func, *args, **kwargs: (calls.append(func), own(mode, func, *args, **kwargs))[1]

        monkeypatch.setattr(Perturbed, "__torch_function__", spy(watched, Perturbed.__torch_function__))
        monkeypatch.setattr(Perturbed, "run", spy(run, Perturbed.run))
        net.second.add_module("scaled", Scaled())
        net.also = lambda net, x: net.second.scaled(x)
        with (
            torch.no_grad(),
            Perturbed(dict.fromkeys(net.second.parameters(), FlippedBit()), readers=(net.second, net.second.scaled)),
        ):
            net.loss()
        assert watched == [Tensor.mul] and run == [F.linear, Tensor.mul]

    def test_a_reader_inside_of_a_reader(self) -> None:
        net = Net(lambda net, x: x * net.scale)
        net.scale = nn.Parameter(torch.tensor(1.5))
        changes = dict.fromkeys(net.parameters(), FlippedBit())
        with torch.no_grad():
            with Perturbed(changes):
                expected = net.loss()
            with Perturbed(changes, readers=(net, net.first, net.second)):
                assert torch.equal(net.loss(), expected)

    @pytest.mark.parametrize("own", [False, True])
    def test_forwards_are_given_back_after_an_error(self, own: bool) -> None:
        net = Net()
        mine = net.second.forward
        if own:
            net.second.forward = mine
        with pytest.raises(KeyboardInterrupt), Perturbed({}, readers=(net.second,)):
            assert net.second.forward is not mine
            raise KeyboardInterrupt
        assert vars(net.second).get("forward") is (mine if own else None)


class TestMethods:
    def losses(self, net: Net, watch_everything: bool) -> list[float]:
        optimizer = MeZO(net.parameters(), lr=1e-2, seed=0)
        optimizer.attach(net)
        if watch_everything:
            optimizer.evaluator._reads._find_readers = lambda *_: None
        losses = []
        for step in range(8):
            net.first.requires_grad_(step < 4)  # another set of parameters, other readers
            losses.append(optimizer.estimate(net.loss).loss)
            optimizer.step()
        return losses

    def test_the_same_bits(self) -> None:
        net, other = Net(), Net()
        other.load_state_dict(net.state_dict())
        assert self.losses(net, False) == self.losses(other, True)

    def test_transformer_encoders(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        net = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        optimizer = MeZO(net.named_parameters(), lr=1e-2, eps=0.1, seed=0)
        optimizer.attach(net)
        losses = optimizer.estimate(lambda: net(X[None])[..., 0].square().mean()).losses
        for loss, sign in zip(losses, (1, -1), strict=True):
            moved, changes = copy.deepcopy(net).eval(), optimizer.perturbations(0, sign)
            with torch.no_grad():
                for parameter, change in zip(moved.parameters(), changes.values(), strict=True):
                    change.add_to(parameter.clone(), parameter)
                assert loss == pytest.approx(moved(X[None])[..., 0].square().mean().item(), rel=1e-5)

    def test_what_a_frozen_matrix_has_pending_is_read(self) -> None:
        net = Net()
        optimizer = SubZero(net.parameters(), lr=0.1, rank=2, vector_lr=0.0, seed=0)
        optimizer.attach(net)
        optimizer.fold_every_step = False
        for _ in range(3):
            optimizer.estimate(net.loss)
            optimizer.step()
        net.first.requires_grad_(False)
        folded, other = Net(), []
        folded.load_state_dict(net.state_dict())
        with torch.no_grad(), Perturbed(optimizer.offsets()):
            other.append(net.loss())
        torch.testing.assert_close(other[0], folded.loss().detach())
        optimizer.estimate(net.loss)  # watches what is pending, and does not share what lies below it
        optimizer.step()
        assert optimizer.record.loss == pytest.approx(folded.loss().item(), rel=1e-2)
