"""Only the first evaluation of a step leaves traces in a module: as many as one evaluation would have left."""

import random
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoConfig, AutoModelForCausalLM

from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO
from zolightning.optim.record import StepRecord

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


class Writer(nn.Module):
    """Each of its attributes is written to by :meth:`write`, in a way of its own."""

    def __init__(self, large: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("queue", torch.zeros(large * 2000))
        self.teacher = deepcopy(self.net).requires_grad_(False)
        self.big_teacher = nn.Parameter(torch.zeros(100, 100), requires_grad=False)
        self.data_teacher = nn.Parameter(torch.zeros(100, 100), requires_grad=False)
        self.set_teacher = nn.Parameter(torch.zeros(100, 100), requires_grad=False)
        self.hidden = torch.zeros(8, 3)
        self.calls = 0
        self.history: list[int] = []
        self.nested: dict[str, Any] = {"list": [0], "tensor": torch.zeros(2)}
        self.generator = torch.Generator().manual_seed(1)
        self.generators = [
            random.Random(1),
            np.random.RandomState(1),
            *[np.random.Generator(bits(1)) for bits in (np.random.PCG64, np.random.MT19937)],
        ]

    def state(self) -> dict[str, Any]:
        names = ("mean", "queue", "big_teacher", "data_teacher", "set_teacher", "hidden")
        tensors = {name: getattr(self, name).clone() for name in names} | {"weight": self.teacher.weight.clone()}
        plain = {"calls": self.calls, "history": list(self.history), "nested": deepcopy(self.nested)}
        drawn = [deepcopy(generator).normal() for generator in self.generators[1:]]  # RandomState keeps a second number
        generators = {"generator": self.generator.get_state(), "python": self.generators[0].getstate(), "numpy": drawn}
        return tensors | plain | generators | {"made": getattr(self, "made", None)}

    def write(self) -> None:
        self.mean += 1
        self.queue[:5] = self.queue[:5] + 1
        self.teacher.weight.mul_(0.5)
        self.big_teacher.lerp_(torch.ones(100, 100), 0.1)
        self.data_teacher.data.mul_(0.5).add_(1)
        self.set_teacher.data = self.set_teacher.data + 1
        self.hidden = self.hidden + 1
        self.calls += 1
        self.history.append(self.calls)
        self.nested["list"].append(1)
        self.nested["tensor"].add_(1)
        self.nested[str(self.calls)] = None
        self.made = self.calls
        torch.rand(2, generator=self.generator)
        self.generators[0].random()
        for generator in self.generators[1:]:
            generator.normal()

    def loss(self) -> Tensor:
        begins.append(self.state())
        self.write()
        return self.net(X).square().mean()


begins: list[dict[str, Any]] = []


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_every_evaluation_begins_alike_and_one_is_left() -> None:
    net, twin = Writer(), Writer()
    optimizer = MeZO(net.net.named_parameters(), num_queries=2, seed=0)
    optimizer.attach(net)
    for _ in range(3):
        begins.clear()
        optimizer.estimate(net.loss)
        optimizer.step()
        assert len(begins) >= 4
        for begin in begins:
            assert_equal(begin, twin.state())
        with torch.no_grad():
            twin.write()
        assert_equal(net.state(), twin.state())


def test_an_evaluation_that_fails_leaves_nothing() -> None:
    net = Writer()
    optimizer = MeZO(net.net.named_parameters(), seed=0)
    optimizer.attach(net)
    for failing in (1, 2, 6, 2):  # in the audit, in the first probe, in the second one
        before, calls = net.state(), []

        def loss(failing: int = failing, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            value = net.loss()
            return value if len(calls) < failing else value * (1 / 0)

        with pytest.raises(ZeroDivisionError):
            optimizer.estimate(loss)
        assert_equal(net.state(), before)


def test_a_large_tensor_that_is_written_later_is_copied_from_then_on() -> None:
    net, twin = Writer(), Writer()
    optimizer = MeZO(net.net.named_parameters(), seed=0)
    optimizer.attach(net)
    for step in range(6):
        seen = []

        def loss(step: int = step, seen: list[Tensor] = seen) -> Tensor:
            seen.append(net.big_teacher.clone())
            if step >= 2:
                net.big_teacher.add_(1)
            return net.net(X).square().mean()

        optimizer.estimate(loss)
        optimizer.step()
        if step >= 2:
            twin.big_teacher += 1
        assert torch.equal(net.big_teacher, twin.big_teacher)
        if step != 2:
            assert all(torch.equal(value, seen[0]) for value in seen)


def test_an_ema_teacher_by_torchs_own_class() -> None:
    net = nn.Linear(100, 100)
    teacher = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9)).requires_grad_(False)
    module = nn.ModuleDict({"net": net, "teacher": teacher})
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(module)
    x = torch.ones(2, 100)

    def loss() -> Tensor:
        teacher.update_parameters(net)
        return F.mse_loss(net(x), teacher(x)) + net(x).square().mean()

    for step in range(3):
        optimizer.estimate(loss)
        optimizer.step()
        assert int(teacher.n_averaged) == step + 1


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.targets = torchmetrics.CatMetric()
        self.batches = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        labels = (targets[:, 0] > 0).long()
        logits = self.net(inputs)
        self.batches += 1
        self.accuracy(logits, labels)
        self.targets.update(labels)
        self.log("train/accuracy", self.accuracy, on_step=True, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def on_train_epoch_end(self) -> None:
        self.counted = int(self.accuracy.tp.sum() + self.accuracy.fn.sum())
        self.seen = len(self.targets.compute())

    def configure_optimizers(self) -> None:
        return None


def test_metrics_count_every_example_once(make_trainer: Any, regression_data: Callable[..., Any]) -> None:
    module = Classifier()
    trainer = make_trainer(max_epochs=1, callbacks=[ZerothOrder(partial(MeZO, lr=0.01, num_queries=3, seed=1))])
    trainer.fit(module, regression_data(num_batches=7, batch_size=4))
    assert (module.counted, module.seen, module.batches) == (28, 28, 7)
    assert 0 < trainer.callback_metrics["train/accuracy_epoch"] <= 1


def test_what_is_logged_and_returned_is_of_the_first_probe(make_trainer: Any, make_regression: Any) -> None:
    """In the first step too, whose evaluations begin with the audit of the parameters."""
    module, losses, seen = make_regression(), [], []
    own = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = own(batch, batch_idx)
        losses.append(loss.item())
        module.log("own", loss)
        return loss

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append((trainer.callback_metrics["own"].item(), trainer.optimizers[0].record.losses[0], outputs))

    module.training_step = training_step
    data = torch.utils.data.DataLoader([(torch.ones(4), torch.ones(1))] * 8, batch_size=4)
    make_trainer(max_epochs=1, callbacks=[ZerothOrder(partial(MeZO, eps=0.1, seed=1)), Recorder()]).fit(module, data)
    for logged, first, outputs in seen:
        assert logged == pytest.approx(first) == outputs["loss"].item()


def test_hidden_states_that_are_first_asked_for_in_an_evaluation() -> None:
    """For which a network of transformers hooks its layers once."""
    net = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=13, hidden_size=8, num_hidden_layers=3, num_attention_heads=2)
    )
    ids = torch.arange(12).view(2, 6)

    def records(net: nn.Module) -> list[StepRecord]:
        def loss() -> Tensor:
            states = net(ids, output_hidden_states=True).hidden_states
            assert len(states) == 4
            return states[-2].double().square().mean()

        optimizer = MeZO(net.named_parameters(), lr=0.1, eps=0.1, num_queries=2, seed=1)
        optimizer.attach(net)
        found = []
        for _ in range(3):
            found.append(replace(optimizer.estimate(loss), leaves_traces=False))
            optimizer.step()
        return found

    hooked = deepcopy(net)
    hooked(ids, output_hidden_states=True)
    assert records(net) == records(hooked)
    assert len(net(ids, output_hidden_states=True).hidden_states) == 4


def test_forward_hooks() -> None:
    """One that an evaluation adds, and one, called with keywords, that it removes."""
    net, calls = nn.Linear(4, 3), []
    once = net.register_forward_hook(lambda _, args, kwargs, output: calls.append("once"), with_kwargs=True)

    def loss() -> Tensor:
        result = net(X).square().mean()
        once.remove()
        net.register_forward_hook(lambda *_: calls.append("added"))
        return result

    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)
    optimizer.estimate(loss)
    assert set(calls) == {"once"}
    net(X)
    assert calls[-1] == "added"
    assert len(net._forward_hooks) == 1


def test_python_objects_behind_attributes_are_left_alone() -> None:
    net = nn.Linear(4, 3)
    net.random = random.SystemRandom()  # which has no state
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)
    optimizer.estimate(lambda: net(X).square().mean())
    assert isinstance(net.random, random.Random)


class Packed(nn.Parameter):
    """A weight that the first forward stores in another way, as bitsandbytes' 4-bit ones on a CPU."""

    is_packed: bool


def test_a_weight_that_keeps_what_its_numbers_mean_is_left_alone() -> None:
    net = nn.Linear(4, 3)
    net.base = Packed(torch.ones(4), requires_grad=False)
    net.base.is_packed = False
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)

    def loss() -> Tensor:
        if not net.base.is_packed:
            net.base.data, net.base.is_packed = -net.base.data[None], True
        return net(-X * net.base).square().mean()

    for _ in range(2):
        record = optimizer.estimate(loss)
        assert list(record.losses) == pytest.approx([net(X).square().mean().item()] * 2, rel=0.1)


@pytest.mark.parametrize("write", [lambda net: setattr(net, "table", torch.ones(5000)), lambda net: net.table.add_(1)])
def test_what_others_do_between_steps_stays(write: Callable[[nn.Module], Any]) -> None:
    net = nn.Linear(4, 3)
    net.register_buffer("table", torch.zeros(5000))  # so large that it is not copied unless an evaluation writes to it
    optimizer = MeZO(net.named_parameters(), seed=0)
    optimizer.attach(net)
    for step in range(3):
        optimizer.estimate(lambda: net(X).square().mean() + net.table.mean())
        assert torch.equal(net.table, torch.full((5000,), float(step > 0)))
        if step == 0:
            write(net)
