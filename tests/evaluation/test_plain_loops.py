"""What makes evaluations faster, in a loop without Lightning, where the network itself is attached."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_runs import CPUCapture
from zolightning.optim import MeZO, SubZero, ZerothOrderOptimizer

METHODS = {"mezo": partial(MeZO, lr=1e-2, num_queries=2), "subzero": partial(SubZero, lr=1e-2, rank=2, num_queries=2)}


class Network(nn.Module):
    """Two branches."""

    forwards = 0  # of all instances: a counter of its own would be state, which a graph cannot change

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.left, self.right = (nn.Linear(4, 3, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        Network.forwards += 1
        return self.left(x) * torch.tanh(self.right(x))


def losses(
    method: Any, trained: str = "", **settings: Any
) -> tuple[list[tuple[float, ...]], int, ZerothOrderOptimizer]:
    """Those of four steps, and how many forwards they took."""
    net, found, before = Network(), [], Network.forwards
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trained in name)
    optimizer = method(net.parameters(), seed=3)
    optimizer.attach(net, **settings)
    inputs = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    for _ in range(4):
        found.append(optimizer.estimate(lambda: net(inputs).square().mean()).losses)
        optimizer.step()
    return found, Network.forwards - before, optimizer


@pytest.mark.parametrize("trained", ["", "left"])  # a branch would be a smaller network, and run once alone
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_evaluations_share_a_forward(method: Any, trained: str) -> None:
    expected, one_by_one, _ = losses(method, trained)
    found, together, _ = losses(method, trained, evaluations_per_forward=4)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-12, atol=0)
    assert one_by_one - together == 4 * 3 - 4  # three fewer in each step; once four more, to compare


class WithLoss(nn.Module):
    """Computes its loss itself, from a network that holds all that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).square().mean()


def test_a_network_in_a_module_that_computes_the_loss() -> None:
    net, inputs = WithLoss(), torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4)
    optimizer = MeZO(net.parameters(), lr=1e-2, num_queries=2, seed=3)
    optimizer.attach(net, evaluations_per_forward=4)
    for _ in range(2):
        before = Network.forwards
        optimizer.estimate(lambda: net(inputs))
    assert Network.forwards - before == 1


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_graphs_give_the_same_bits(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = CPUCapture()
    monkeypatch.setattr("zolightning.evaluation.evaluator.CudaCapture", lambda device: capture)
    expected, _, _ = losses(method)
    found, _, optimizer = losses(method, cuda_graphs=True)
    assert found == expected
    assert capture.recorded >= 1 and capture.replayed > 8
    optimizer.detach()
    assert optimizer.evaluator.graphs is None


def test_memory_for_outputs_of_layers_stays_when_they_are_found_out_anew() -> None:
    _, _, optimizer = losses(METHODS["mezo"], keep_prefix_gib=0.5)
    assert optimizer.evaluator.prefix.keep_bytes == 2**29
    optimizer.evaluator.forget()
    assert optimizer.evaluator.prefix.keep_bytes == 2**29


def test_what_does_not_go() -> None:
    attach = partial(losses, METHODS["mezo"])
    with pytest.raises(ValueError, match="`cuda_graphs` is True, but the parameters are on 'cpu', which has none"):
        attach(cuda_graphs=True)
    with pytest.raises(ValueError, match=r"leave `keep_prefix_gib` at 0, got 1\.0"):
        attach(cuda_graphs=True, keep_prefix_gib=1.0)
    with pytest.raises(ValueError, match="`keep_prefix_gib` must not be negative, got -1"):
        attach(keep_prefix_gib=-1)
    both = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"`evaluations_per_forward` needs one submodule .* its children are 0, 1"):
        MeZO(both.parameters()).attach(both, evaluations_per_forward=2)
