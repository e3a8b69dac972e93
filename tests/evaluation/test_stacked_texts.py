"""Texts of several evaluations that grow together are those that each would write alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stacked_runs import METHODS, WARN_ONLY_WHERE_EXPECTED, LanguageModel, Method
from tape import Tape
from zolightning.optim import MeZO, StepRecord
from zolightning.optim.estimators import ZScores

pytestmark = WARN_ONLY_WHERE_EXPECTED

MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])  # prompts of three lengths


class Writer(LanguageModel):
    """The loss is the mean token of the texts that it writes; keeps the texts, and how many rows each token took."""

    def __init__(self, architecture: str, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(architecture, dtype)
        self.options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1} | options
        self.texts = Tape()

    def loss(self) -> Tensor:
        mask = MASK[: len(self.ids)]
        written = self.net.generate(input_ids=self.ids, attention_mask=mask, **self.options)[:, 5:]
        self.texts.append([[id for id in row if id > 1] for row in written.tolist()])  # without padding and end
        return written.double().mean()


def written(make: Callable[[], Writer], method: Method, size: int) -> tuple[list[Any], list[int]]:
    """The texts of two steps' evaluations, and the rows of each run of the network in the last step."""
    module = make()
    optimizer = method(module.parameters(), seed=4, eps=0.1, lr=1e-4)
    optimizer.attach(module, size)
    texts = []
    for _ in range(2):
        module.texts.clear()
        module.rows.clear()
        count = optimizer.estimate(module.loss).forward_passes
        texts.append(list(module.texts)[-count:])
        optimizer.step()
    return texts, list(module.rows)


@pytest.mark.parametrize(
    ("architecture", "method", "num_beams"), [("llama", "lozo", 1), ("gpt2", "mopi", 1), ("llama", "mezo", 2)]
)
def test_the_same_texts(architecture: str, method: str, num_beams: int) -> None:
    make = partial(Writer, architecture, torch.float64, num_beams=num_beams)
    expected, alone = written(make, METHODS[method], 1)
    evaluations = len(expected[-1])
    assert any(len(set(map(str, step))) > 1 for step in expected)  # evaluations write different texts
    assert set(alone) == {3 * num_beams}
    found, rows = written(make, METHODS[method], evaluations)
    assert found == expected
    assert set(rows) == {3 * num_beams * evaluations} and len(rows) < len(alone)


def test_members_of_a_population_share_forwards_in_groups() -> None:
    method = partial(MeZO, lr=1e-3, num_queries=5, estimator=ZScores())
    make = partial(Writer, "llama", torch.float64)
    expected, _ = written(make, method, 1)
    found, rows = written(make, method, 2)
    assert found == expected and set(rows) == {6, 3}


@pytest.mark.filterwarnings("default:.*evaluations_per_forward")
def test_sampled_texts_are_written_one_by_one() -> None:
    make = partial(Writer, "llama", torch.float64, do_sample=True)
    expected, _ = written(make, METHODS["mezo"], 1)
    with pytest.warns(UserWarning, match="`evaluations_per_forward` is 1 from here on: the network draws random"):
        found, rows = written(make, METHODS["mezo"], 4)
    assert found == expected and set(rows) == {3}


def test_an_error_gives_generate_back() -> None:
    module = Writer("llama", torch.float64)
    own, calls = module.net.generate, []
    optimizer = MeZO(module.parameters(), lr=1e-3, seed=0)
    optimizer.attach(module, 2)

    def loss() -> Tensor:
        found = module.loss()
        calls.append(module.net.generate != own)
        if sum(calls) == 2:  # of those in which it is replaced
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        optimizer.estimate(loss)
    assert module.net.generate == own and "generate" not in vars(module.net)
    assert isinstance(optimizer.estimate(module.loss), StepRecord)
