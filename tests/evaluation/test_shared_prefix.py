"""Layers below the first trained one run once a step, and no loss changes by a bit."""

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import chain, repeat
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stacked_runs import DEVICES, LanguageModel
from tape import Tape
from zolightning.callbacks import ZerothOrder
from zolightning.evaluation import shared_prefix
from zolightning.evaluation.shared_prefix import layers_of
from zolightning.optim import MeZO, StepRecord
from zolightning.optim.estimators import Estimator, OneSided, Population, TwoSided

GREEDILY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


class Layers(nn.Module):
    """Four layers that count how often they run, an embedding before and a head after them."""

    def __init__(self, dtype: torch.dtype = torch.float32, way: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.embedding = nn.Embedding(20, 8)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
            self.head = nn.Linear(8, 3)
        self.to(dtype)
        self.way = way
        self.shift = 0  # of the token ids: another batch
        self.runs = Tape([0] * 4)
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._run, index, layer.forward)

    def _run(self, index: int, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        self.runs[index] += 1
        hidden = hidden + forward(hidden)
        self.outputs.append(hidden)
        return hidden

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        self.outputs = Tape()
        after = []
        for layer in [*self.layers] * (2 if self.way == "loop" else 1):
            hidden = layer(hidden)
            after.append(hidden)
        match self.way:
            case "skip":
                hidden = hidden + after[0]
            case "collected by layers":
                hidden = hidden + self.outputs[3]
        return self.head(hidden).mean(1)

    def loss(self, parts: int = 1) -> Tensor:
        ids, labels = (torch.arange(48).view(8, 6) + self.shift) % 20, torch.arange(8) % 3
        pairs = zip(ids.chunk(parts), labels.chunk(parts), strict=True)
        return sum(F.cross_entropy(self(i).float(), y) for i, y in pairs) / parts

    def train_only(self, *names: str) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(names))


class Module(L.LightningModule):
    """Trains layer 2 on batches that are told apart by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Layers()
        self.net.train_only("layers.2")

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        self.net.shift = int(batch)
        return self.net.loss()

    def configure_optimizers(self) -> None:
        return None


def step(
    net: Layers, share: bool = True, parts: int = 1, estimator: Estimator | None = None, queries: int = 1
) -> tuple[list[StepRecord], list[int]]:
    """Two steps' records, and how often each layer ran in the second one."""
    optimizer = MeZO(net.parameters(), lr=0.1, eps=0.1, num_queries=queries, estimator=estimator, seed=0)
    optimizer.attach(net)
    if not share:
        optimizer.evaluator.prefix.layers = ()
    records = [optimizer.estimate(partial(net.loss, parts))]
    optimizer.step()
    net.runs[:] = [0] * 4
    records.append(optimizer.estimate(partial(net.loss, parts)))
    optimizer.step()
    return records, net.runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("estimator", "queries"), [(TwoSided(), 2), (OneSided(), 3), (Population(), 4)])
def test_losses_keep_all_their_bits(dtype: torch.dtype, parts: int, estimator: Estimator, queries: int) -> None:
    shared, plain = Layers(dtype), Layers(dtype)
    for net in (shared, plain):
        net.train_only("layers.2", "head")
    evaluations = len(estimator.probes(queries))
    records, runs = step(shared, parts=parts, estimator=estimator, queries=queries)
    assert runs == [parts, parts, evaluations * parts, evaluations * parts]
    expected, runs = step(plain, share=False, parts=parts, estimator=estimator, queries=queries)
    assert runs == [evaluations * parts] * 4
    assert records == expected
    for one, other in zip(shared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@DEVICES
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_losses_of_language_models_keep_all_their_bits(architecture: str, device: str) -> None:
    """What is shared is proven by one evaluation more, which needs kernels that give the same bits each time."""

    def step_twice(share: bool) -> tuple[list[StepRecord], int]:
        module, runs = LanguageModel(architecture, torch.bfloat16, device), Tape()
        first, second = layers_of(module)
        module.requires_grad_(False)
        second.requires_grad_(True)
        first.forward = partial(
            lambda forward, *args, **kwargs: (runs.append(1), forward(*args, **kwargs))[1], first.forward
        )
        optimizer = MeZO(module.parameters(), lr=1e-2, seed=0)
        optimizer.attach(module)
        if not share:
            optimizer.evaluator.prefix.layers = ()
        records = []
        for _ in range(2):
            runs.clear()
            records.append(optimizer.estimate(module.loss))
            optimizer.step()
        return records, len(runs)

    (records, runs), (expected, all_runs) = step_twice(share=True), step_twice(share=False)
    assert (runs, all_runs) == (1, 2)
    assert records == expected


@pytest.mark.parametrize(
    ("architecture", "first", "keep_bytes"),
    [("llama", 1, 10**6), ("llama", 6, 0), ("gpt2", 1, 0), ("gpt2", 6, 10**6)],
)
def test_evaluations_that_write_texts_share_nothing(architecture: str, first: int, keep_bytes: int) -> None:
    """Each goes on from its own tokens, also where the first one, of one token, has not shown that it would."""

    def texts_and_records(share: bool) -> tuple[list[list[int]], list[StepRecord]]:
        module, texts = LanguageModel(architecture, torch.float32), []
        module.requires_grad_(False)
        layers_of(module)[1].requires_grad_(True)

        def loss(length: int) -> Tensor:
            text = module.net.generate(
                input_ids=module.ids, attention_mask=torch.ones_like(module.ids), max_new_tokens=length, **GREEDILY
            )
            texts.append(text.tolist())
            return text.double().mean()

        optimizer = MeZO(module.parameters(), lr=1e-3, eps=0.5, num_queries=2, seed=1)
        optimizer.attach(module)
        optimizer.evaluator.prefix.keep_bytes = keep_bytes
        if not share:
            optimizer.evaluator.prefix.layers = ()
        records = []
        for lengths in (repeat(1), chain([first], repeat(6)), repeat(6)):
            records.append(optimizer.estimate(lambda lengths=lengths: loss(next(lengths))))
            optimizer.step()
        return texts[-4:], records

    with pytest.warns(UserWarning, match="each generates its own text"):
        texts, records = texts_and_records(share=True)
    assert len({str(text) for text in texts}) > 2
    assert (texts, records) == texts_and_records(share=False)


@pytest.mark.parametrize(
    ("trained", "runs"),
    [
        (("layers.0",), [2, 2, 2, 2]),
        (("layers.3",), [1, 1, 1, 2]),
        (("head",), [1, 1, 1, 1]),
        (("embedding",), [2, 2, 2, 2]),
        (("layers.1", "layers.3"), [1, 2, 2, 2]),
        (("",), [2, 2, 2, 2]),
    ],
)
def test_all_up_to_the_first_trained_parameter_is_shared(trained: tuple[str, ...], runs: list[int]) -> None:
    net = Layers()
    net.train_only(*trained)
    assert step(net)[1] == runs


@pytest.mark.parametrize(
    ("way", "reason"),
    [("skip", "between them"), ("collected by layers", "between them"), ("loop", "runs them again")],
)
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_is_shared_where_layers_do_more_than_run_once_in_a_row(way: str, reason: str, parts: int) -> None:
    net, plain = Layers(way=way), Layers(way=way)
    for one in (net, plain):
        one.train_only("layers.2")
    with pytest.warns(UserWarning, match=f"cannot be shared by the forwards of a step, because .* {reason}"):
        found = step(net, parts=parts)
    assert found == step(plain, share=False, parts=parts)


def test_hooks_of_others_see_every_run() -> None:
    net, seen = Layers(), []
    net.train_only("layers.3")
    net.layers[1][0].register_forward_hook(lambda *_: seen.append(1))
    _, runs = step(net)
    assert runs == [1, 2, 2, 2] and len(seen) >= 4


def test_an_error_leaves_the_layers_as_they_were() -> None:
    net, calls = Layers(), []
    net.train_only("layers.2")
    forwards = [layer.forward for layer in net.layers]
    optimizer = MeZO(net.parameters(), lr=0.1, seed=0)
    optimizer.attach(net)

    def loss(failing: int) -> Tensor:
        calls.append(1)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return net.loss()

    for failing in range(1, 8):
        calls.clear()
        with suppress(KeyboardInterrupt):
            optimizer.estimate(partial(loss, failing))
        assert [layer.forward for layer in net.layers] == forwards
        assert not any(layer._forward_hooks for layer in net.layers)
    # Nothing that an interrupted step kept is used by the next one.
    fresh = Layers()
    fresh.train_only("layers.2")
    other = MeZO(fresh.parameters(), lr=0.1, seed=0)
    other.attach(fresh)
    assert optimizer.estimate(net.loss).projected_grads == other.estimate(fresh.loss).projected_grads


def batches(net: Layers, optimizer: MeZO, numbers: list[int]) -> list[StepRecord]:
    records = []
    for number in numbers:
        net.shift = number
        records.append(optimizer.estimate(net.loss))
        optimizer.step()
    return records


def test_what_is_kept_from_step_to_step_changes_no_bit() -> None:
    order = [0, 1, 2, 0, 2, 1, 1, 3]
    net, plain = Layers(), Layers()
    optimizers = []
    for one in (net, plain):
        one.train_only("layers.2")
        optimizers.append(MeZO(one.parameters(), lr=0.1, eps=0.1, seed=0))
        optimizers[-1].attach(one)
    kept, reference = optimizers
    kept.evaluator.prefix.keep_bytes = 10**6
    first = batches(net, kept, order[:1])
    net.runs[:] = [0] * 4
    assert first + batches(net, kept, order[1:]) == batches(plain, reference, order)
    # The first step only finds out how deep the shared part is: batches 1, 2, 0 and 3 are new after it.
    assert net.runs == [4, 4, 14, 14]
    assert len(kept.evaluator.prefix.kept) == 4


@pytest.mark.parametrize(("trained", "is_shared"), [("", False), ("layers.2", True)])
def test_inputs_of_later_parts_are_read_only_if_layers_are_shared(
    trained: str, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read them waits for a device and copies them from it: as many bytes as the layers' outputs have."""
    made: list[Any] = []
    monkeypatch.setattr(shared_prefix, "_digest", lambda value: made.append(value) or b"")
    net = Layers()
    net.train_only(trained)
    step(net, parts=2)
    assert bool(made) == is_shared


def test_no_more_is_kept_than_allowed_and_nothing_for_other_parameters() -> None:
    net = Layers()
    net.train_only("layers.2")
    optimizer = MeZO(net.parameters(), lr=0.1, eps=0.1, seed=0)
    optimizer.attach(net)
    size = 8 * 6 * 8 * 4  # the output of a layer for one batch
    optimizer.evaluator.prefix.keep_bytes = 2 * size
    batches(net, optimizer, [0, 1, 2, 3])
    assert len(optimizer.evaluator.prefix.kept) == 2
    # Layer 1 is below what was kept, and moves: nothing of before may come back afterwards.
    net.train_only("layers.1")
    batches(net, optimizer, [1])
    net.train_only("layers.2")
    net.runs[:] = [0] * 4
    batches(net, optimizer, [1])
    assert net.runs == [1, 1, 2, 2]


@pytest.mark.parametrize("trained", ["layers.2", ""])
def test_nothing_of_a_step_waits_for_the_garbage_collector(trained: str) -> None:
    """Which comes after some steps: directions, snapshots and caches of a device's memory would add up until then."""
    net = Layers()
    net.train_only(trained)
    optimizer = MeZO(net.parameters(), lr=0.1, eps=0.1, seed=0)
    optimizer.attach(net)
    gc.disable()
    try:
        batches(net, optimizer, [0, 1])
        gc.collect()
        batches(net, optimizer, [2])
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_the_callback_says_how_much_is_kept(make_trainer: Callable[..., L.Trainer]) -> None:
    module = Module()
    callback = ZerothOrder(partial(MeZO, lr=0.1, seed=0), keep_prefix_gib=0.5)
    trainer = make_trainer(max_epochs=3, callbacks=[callback], logger=False)
    trainer.fit(module, DataLoader(range(4), batch_size=None))
    assert len(trainer.optimizers[0].evaluator.prefix.kept) == 4
    # Five evaluations audit the parameters, the first step finds the depth, and each batch is then new once.
    assert module.net.runs[0] == 5 + 1 + 4

    with pytest.raises(ValueError, match="`keep_prefix_gib` must not be negative, got -1"):
        ZerothOrder(partial(MeZO, lr=0.1), keep_prefix_gib=-1)
