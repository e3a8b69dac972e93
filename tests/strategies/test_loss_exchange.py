"""What ranks exchange in a step, and whom they blame, without processes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zolightning.optim import MeZO
from zolightning.optim.share import Share
from zolightning.strategies.ranks import Layout, LossExchange, RanksError

STEP, BATCHES, WEIGHTS, ROWS = 0, 1, 3, 5  # columns of what a rank says; checksums have two


class OthersAdded:
    """A strategy with ranks that say what this one says, but for one number of one of them."""

    check_interval = 3

    def __init__(self, ranks: int, changed: tuple[int, int] | None = None) -> None:
        self.ranks, self.changed = ranks, changed
        self.sent: list[int] = []
        self.batches: list[float] = []

    def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        self.sent.append(tensor.nbytes)
        if tensor.ndim == 1:
            said = tensor[-6 * self.ranks :].view(self.ranks, 6)
            said[:] = said[0].clone()
            self.batches.append(said[0, BATCHES].item())
            if self.changed is not None:
                said[self.changed] += 1
        return tensor


def estimate(
    strategy: OthersAdded, layout: Layout, optimizer: MeZO, net: nn.Module, num_batches: float = 10, max_steps: int = -1
) -> None:
    trainer = SimpleNamespace(
        strategy=strategy,
        global_rank=0,
        global_step=0,
        num_training_batches=num_batches,
        max_steps=max_steps,
        world_size=4,
    )
    module: Any = SimpleNamespace(trainer=trainer, global_rank=0, device=torch.device("cpu"), parameters=net.parameters)
    optimizer.estimate(lambda: net(torch.ones(1, 3)).sum(), Share(LossExchange(module, optimizer, layout)))
    optimizer.step()


@pytest.fixture
def net() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ((2, STEP), "Rank 2 is at step 1 and rank 0 at step 0"),
        ((0, BATCHES), "Rank 0 has 11 batches an epoch and rank 1 has 10"),
        ((3, WEIGHTS), "The weights of rank 3 are not those of rank 0 before step 0"),
        ((0, WEIGHTS), "The weights of rank 0 are not those of rank 1 before step 0"),  # of four, three agree
        ((3, WEIGHTS - 1), "The weights of rank 3 are not those of rank 0 before step 0"),
        ((3, ROWS - 1), "Rank 3 was given a different batch from rank 2 at step 0"),
        ((3, ROWS), "Rank 3 was given a different batch from rank 2 at step 0"),  # the other rank of its group
    ],
)
def test_the_rank_is_named_that_is_not_like_the_others(net: nn.Module, changed: tuple[int, int], message: str) -> None:
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(RanksError, match=message):
        estimate(OthersAdded(4, changed), Layout(4, 2), MeZO(net.parameters()), net)
    assert all(map(torch.equal, net.parameters(), before))


def test_batches_that_no_step_takes_may_differ(net: nn.Module) -> None:
    strategy = OthersAdded(4)
    for num_batches, max_steps in ((10, -1), (float("inf"), -1), (10, 20), (10, 5), (8, 5), (float("inf"), 5)):
        estimate(strategy, Layout(4), MeZO(net.parameters()), net, num_batches, max_steps)
    assert strategy.batches == [10, -1, 10, 5, 5, 5]


def test_rows_may_differ_between_groups(net: nn.Module) -> None:
    estimate(OthersAdded(4, (3, ROWS)), Layout(4, 1), MeZO(net.parameters()), net)


def test_checks_come_at_an_interval_and_bytes_do_not_depend_on_the_model() -> None:
    for width in (1, 100):
        net, strategy = nn.Linear(3, width), OthersAdded(4)
        optimizer = MeZO(net.named_parameters(), lr=1e-3)
        optimizer.attach(net)
        for _ in range(5):
            estimate(strategy, Layout(4), optimizer, net)
        plain, check = 2 * 2 * 8, 4 * 6 * 8
        assert strategy.sent == [plain + check, plain, plain, plain + check, plain]
