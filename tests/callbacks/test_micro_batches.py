"""Batches in parts: the same loss, in less memory."""

from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from training import Records
from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.micro_batches import evaluate_in_parts, in_examples, micro_batches
from zolightning.optim import MeZO, StepRecord

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]


class TestMicroBatches:
    Pair = namedtuple("Pair", ["x", "y"])

    @dataclass
    class Example:
        x: Tensor
        name: str = "a"

    X, Y = torch.arange(7), torch.arange(14).view(7, 2)

    @pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
    @pytest.mark.parametrize(
        "batch",
        [
            X,
            (X, Y),
            [X, Y],
            {"x": X, "nested": {"y": Y, "list": [X]}},
            Pair(X, Y),
            Example(X),
            UserDict({"x": X, "y": Y}),
        ],
        ids=lambda batch: type(batch).__name__,
    )
    def test_parts_make_up_the_batch(self, batch: Any, size: int) -> None:
        parts = list(micro_batches(batch, size))
        assert all(type(part) is type(batch) for part in parts)

        def tensors(data: Any) -> Iterator[Tensor]:
            if isinstance(data, Tensor):
                yield data
            elif isinstance(data, self.Example):
                yield data.x
            else:
                for value in data.values() if hasattr(data, "values") else data:
                    yield from tensors(value)

        split = [list(tensors(part)) for part in parts]
        assert [len(part[0]) for part in split] == [min(size, 7 - at) for at in range(0, 7, size)]
        for whole, pieces in zip(tensors(batch), zip(*split, strict=True), strict=True):
            assert torch.equal(torch.cat(pieces), whole)

    def test_the_rest_goes_into_every_part(self) -> None:
        batch = {"x": self.X, "names": ["a", "b"], "temperature": torch.tensor(2.0), "bias": torch.ones(1, 5), "n": 3}
        for part in micro_batches(batch, 4):
            assert {name: part[name] for name in ("names", "temperature", "n")} == {
                "names": ["a", "b"],
                "temperature": torch.tensor(2.0),
                "n": 3,
            }
            assert torch.equal(part["bias"], torch.ones(1, 5))

    def test_parts_that_are_skipped_or_have_no_terms_do_not_count(self) -> None:
        outputs = iter([None, {"loss": torch.tensor(torch.nan), "num_terms": 0}, torch.tensor(2.0), torch.tensor(5.0)])
        found = evaluate_in_parts(lambda _: next(outputs), self.X, 2)
        assert found == {"loss": (2 * 2.0 + 5.0) / 3, "num_terms": 3}
        assert evaluate_in_parts(lambda _: None, self.X, 2) is None

    def test_examples_have_their_numbers_in_the_batch_of_all_ranks(self) -> None:
        parts = in_examples(Tensor.tolist, self.X, 3, rank=1, ranks=4)
        assert [part.loss() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
        found = [{number: loss() for number, loss in part.examples.items()} for part in parts]
        assert found == [{1: [0], 5: [1], 9: [2]}, {13: [3], 17: [4], 21: [5]}, {25: [6]}]
        (whole,) = in_examples(Tensor.tolist, self.X, None, rank=0, ranks=1)
        assert list(whole.examples) == self.X.tolist()

    @pytest.mark.parametrize("batch", [["a", "b"], {"n": 3}, None])
    def test_there_must_be_something_to_cut(self, batch: Any) -> None:
        with pytest.raises(ValueError, match=r"`micro_batch_size` is 4, but a batch of type .* has no tensor to cut"):
            list(micro_batches(batch, 4))

    @pytest.mark.parametrize("size", [1, 3, 4, 10, 11])
    @pytest.mark.parametrize("token_weighted", [False, True])
    def test_the_loss_is_that_of_the_whole_batch(
        self,
        make_regression: MakeModule,
        regression_data: MakeData,
        make_trainer: MakeTrainer,
        size: int,
        token_weighted: bool,
    ) -> None:
        """Means over examples, or over as many terms as the module says, the last part being a smaller one."""

        def fit(micro_batch_size: int | None) -> list[StepRecord]:
            module, recorder = make_regression(), Records()

            def training_step(batch: Any, batch_idx: int) -> Any:
                inputs, targets = batch
                assert len(inputs) == 10 if micro_batch_size is None else len(inputs) <= micro_batch_size
                errors = (module.net(inputs) - targets).double().square()[:, 0]
                if not token_weighted:
                    return errors.mean()
                counts = (inputs[:, 0].abs() * 5).long() + 1  # "tokens" of each example
                return {"loss": (errors * counts).sum() / counts.sum(), "num_terms": counts.sum()}

            module.training_step = training_step
            callback = ZerothOrder(partial(MeZO, lr=1e-2), micro_batch_size=micro_batch_size)
            make_trainer(max_steps=4, callbacks=[callback, recorder]).fit(module, regression_data(4, 10))
            return recorder.records

        for part, whole in zip(fit(size), fit(None), strict=True):
            # Float32 layers over fewer rows at once may add in another order: 1e-6 of a loss of order 1
            assert part.loss == pytest.approx(whole.loss, rel=1e-5)
            # ... and 1e-6 / (2 eps) of a projected gradient
            assert part.projected_grads == pytest.approx(whole.projected_grads, abs=2e-3)
            assert (part.step, part.forward_passes) == (whole.step, whole.forward_passes)

    def test_bad_sizes(self) -> None:
        with pytest.raises(ValueError, match="`micro_batch_size` must be an integer, at least 1, got 0"):
            ZerothOrder(MeZO, micro_batch_size=0)
