"""What parameter groups of subspace methods may set for themselves."""

from typing import Any

import pytest
import torch
from torch import nn

from zolightning.optim import GRZO, LOZO, SparseMeZO


def test_a_group_may_have_a_learning_rate_of_its_own_for_vectors() -> None:
    weight, bias = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(4))
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.5, "vector_lr": 0.1}]
    optimizer = LOZO(groups, lr=1.0, vector_lr=0.25)
    assert [group["vector_lr_ratio"] for group in optimizer.param_groups] == [0.25, 0.2]
    with pytest.raises(ValueError, match=r"`vector_lr` must not be negative, got -0\.1"):
        LOZO([{"params": [bias], "vector_lr": -0.1}])
    assert all("vector_lr" not in group for group in optimizer.param_groups)


def test_a_run_in_which_nothing_would_move_is_refused() -> None:
    norm = nn.LayerNorm(4)
    optimizer = LOZO(norm.parameters(), vector_lr=0.0)
    with pytest.raises(ValueError, match="`vector_lr` is 0, and no matrix is among the parameters that train"):
        optimizer.attach(norm)
    LOZO(norm.parameters(), vector_lr=0.1).attach(norm)


def test_a_group_that_is_added_in_mid_run_is_resampled_like_the_others() -> None:
    """By the choices of MomentumTransport and SubspaceResampling, which they made when the run began."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    optimizer = LOZO(net[0].parameters(), lr=0.05, momentum=0.9)
    optimizer.attach(net)
    optimizer.param_groups[0].update(transport="reset", anchor=2)
    optimizer.add_param_group({"params": list(net[1].parameters())})
    assert [(group["transport"], group["anchor"]) for group in optimizer.param_groups] == [("reset", 2)] * 2


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        (LOZO, {"weight_decay": 0.1}, r"`weight_decay` is 0\.1, but LOZO has none: use 0\."),
        (SparseMeZO, {"weight_decay": 0.1}, r"`weight_decay` is 0\.1, but SparseMeZO has none: use 0\."),
        (GRZO, {"momentum": 0.9}, r"`momentum` is 0\.9, but GRZO keeps none"),
        (LOZO, {"momentum": 0.9, "betas": (0.8, 0.9)}, r"`momentum` is 0\.9, but `betas` \(0\.8, 0\.9\) include one"),
    ],
)
def test_a_group_cannot_ask_for_what_a_method_does_not_do(method: Any, asked: dict[str, Any], message: str) -> None:
    group = {"params": list(nn.Linear(4, 3).named_parameters()), **asked}
    with pytest.raises(ValueError, match=message):
        method([group], lr=1e-2)
