"""A step whose evaluations are made in parts has the record of a step made at once, whatever the method."""

import warnings

import pytest
import torch
from torch import Tensor

from optimizer_steps import MakeProblem, Method, attached, run
from zolightning.optim import MeZO, StepRecord, ZerothOrderOptimizer
from zolightning.optim.share import Share

pytestmark = pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")


class Exchanged(Exception):
    """Ends an estimate of which only the part that a rank would send is of interest."""


def estimated_in_parts(optimizer: ZerothOrderOptimizer, problem: torch.nn.Module, count: int) -> StepRecord:
    """The record of the last of some ranks, all on one optimizer: an estimate that fails leaves nothing behind."""
    sent: list[Tensor] = []

    def send(totals: Tensor) -> Tensor:
        sent.append(totals)
        raise Exchanged

    for index in range(count):
        with pytest.raises(Exchanged):
            optimizer.estimate(problem, Share(send, index=index, count=count))
    return optimizer.estimate(problem, Share(lambda totals: sum(sent), index=count - 1, count=count))


def test_parts_of_a_step_make_the_whole_to_the_last_bit(method: Method, make_problem: MakeProblem) -> None:
    whole, parted = make_problem(), make_problem()
    reference, optimizer = attached(method, whole), attached(method, parted)
    evaluations = len(optimizer.estimator.probes(optimizer.num_queries))
    for count in (2, evaluations, 3):
        record = estimated_in_parts(optimizer, parted, min(count, evaluations))
        optimizer.step()
        assert record == run(whole, reference, 1)[0]
    for parameter, expected in zip(parted.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("evaluations", range(1, 9))
@pytest.mark.parametrize("count", range(1, 6))
def test_parts_are_even_and_in_order_and_the_first_is_never_empty(evaluations: int, count: int) -> None:
    parts = [Share(index=index, count=count).of(evaluations) for index in range(count)]
    assert [place for part in parts for place in part] == list(range(evaluations))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and parts[0]


def test_a_step_without_a_share_in_one_of_several_processes_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under Fabric: weights would drift apart."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    weight = torch.nn.Parameter(torch.ones(2))
    alone, together = (attached(MeZO, torch.nn.ParameterList([weight])) for _ in range(2))
    with pytest.warns(UserWarning, match="2 processes run, but `estimate` has no `share`"):
        alone.estimate(lambda: weight.square().sum())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone.estimate(lambda: weight.square().sum())  # said once
        together.estimate(lambda: weight.square().sum(), Share(lambda sums: sums))
