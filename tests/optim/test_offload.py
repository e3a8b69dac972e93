"""Low words in host memory: the same bits as on the device, and none of them left there."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from live_bytes import LiveBytes
from zolightning.callbacks.folding import choose_folding
from zolightning.optim import LOZO, ZOMOPI, MeZO, SubspaceOptimizer, SubZero

METHODS = [
    partial(LOZO, lr=0.05, rank=2, momentum=0.5),
    partial(SubZero, lr=0.05, rank=3),
    partial(ZOMOPI, lr=0.05, rank=3, power_rank=2, vector_lr=0.05),
]
STEPS, INTERVAL = 12, 4


class Net(nn.Module):
    """Matrices, one of which has its columns first in memory, and vectors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        self.up, self.down = (nn.Parameter((draw(*shape) * 0.3).to(dtype)) for shape in ((8, 6), (8, 4)))
        self.down.data = self.down.data.T.contiguous().T
        self.bias = nn.Parameter(draw(8).to(dtype))
        self.inputs = draw(5, 6).to(dtype)

    def forward(self) -> Tensor:
        hidden = (self.inputs @ self.up.T + self.bias).tanh()
        return ((hidden @ self.down).double() - 0.5).square().mean()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.optim.cores._CHUNK", 18)  # three rows of `up` at a time
    monkeypatch.setattr("zolightning.optim.cores.chunk_size", lambda _: 18)


def attached(method: Callable[..., SubspaceOptimizer], net: Net, **kwargs: Any) -> SubspaceOptimizer:
    optimizer = method(net.named_parameters(), seed=3, **kwargs)
    optimizer.attach(net)
    optimizer.fold_every_step = False
    return optimizer


def train(net: Net, optimizer: SubspaceOptimizer, steps: range) -> None:
    for step in steps:
        if step and step % INTERVAL == 0:
            optimizer.resample()
        optimizer.estimate(net)
        optimizer.step()


def assert_same_content(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_content(one[key], other[key])
    elif isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.func.__name__)
@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "exact"), (torch.bfloat16, "low_byte"), (torch.float16, "exact")]
)
def test_weights_and_checkpoints_have_the_same_bits(method: Any, dtype: torch.dtype, precision: str) -> None:
    """Also those of runs that go on from a checkpoint with the other setting, in the middle of an interval."""
    method = partial(method, update_precision=precision)
    net, other = Net(dtype), Net(dtype)
    optimizer, offloaded = attached(method, net), attached(method, other, offload_low_words=True)
    for start, stop in ((0, 3), (3, 10), (10, STEPS)):
        train(net, optimizer, range(start, stop))
        train(other, offloaded, range(start, stop))
        for name, value in net.state_dict().items():  # with what is pending
            assert torch.equal(other.state_dict()[name], value), name
        saved, twin = optimizer.state_dict(), offloaded.state_dict()
        assert_same_content(saved, twin)
        others = [Net(dtype), Net(dtype)]
        for fresh, is_offloaded, from_checkpoint in zip(others, (True, False), (saved, twin), strict=True):
            resumed = attached(method, fresh, offload_low_words=is_offloaded)
            fresh.load_state_dict(net.state_dict())
            resumed.load_state_dict(copy.deepcopy(from_checkpoint))
            train(fresh, resumed, range(stop, STEPS))
            resumed.detach()
        for one, two in zip(*(fresh.parameters() for fresh in others), strict=True):
            assert torch.equal(one, two)
    optimizer.detach(), offloaded.detach()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), others[0].parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_where(dtype: torch.dtype) -> None:
    """Of matrices nothing is in ``state``, which Trainers move to the device; a restored run is no exception."""
    method, bytes_of_a_weight = METHODS[0], {torch.bfloat16: 2, torch.float16: 4}[dtype]
    net, plain, restored = Net(dtype), Net(dtype), Net(dtype)
    optimizer, on_device = attached(method, net, offload_low_words=True), attached(method, plain)
    train(net, optimizer, range(6)), train(plain, on_device, range(6))
    fresh = attached(method, restored, offload_low_words=True)
    fresh.load_state_dict(on_device.state_dict())
    assert on_device.host_bytes() == 0
    for one, module in ((optimizer, net), (fresh, restored)):
        assert one.host_bytes() == bytes_of_a_weight * (net.up.numel() + net.down.numel())
        assert not {"low_word", "master"} & (one.state[module.up].keys() | one.state[module.down].keys())
        assert {"low_word", "master"} & one.state[module.bias].keys()
    assert optimizer.state_bytes() + optimizer.host_bytes() == on_device.state_bytes()


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_restoring_takes_no_second_copy_of_the_weights(is_offloaded: bool) -> None:
    """Nor, where they are offloaded, one of the low words beside that in host memory."""
    net, restored = nn.Linear(256, 128, dtype=torch.bfloat16), nn.Linear(256, 128, dtype=torch.bfloat16)
    method = partial(LOZO, rank=2, offload_low_words=is_offloaded)
    optimizer, fresh = method(net.named_parameters()), method(restored.named_parameters())
    optimizer.attach(net), fresh.attach(restored)
    optimizer.fold_every_step = fresh.fold_every_step = False
    for _ in range(2):
        optimizer.fold()
        optimizer.estimate(lambda: net(torch.ones(1, 256, dtype=torch.bfloat16)).double().sum())
        optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0].keys() == {"core", "low_word", "base"}
    with LiveBytes() as live:
        fresh.load_state_dict(saved)
    assert torch.equal(net.weight, restored.weight)
    low_words, cores, biases = 2 * 256 * 128, 4 * 128 * 2, 2 * 128
    assert live.peak == low_words + cores + biases


@pytest.mark.parametrize("left_state", ["reset", "keep"])
def test_blocks_leave_it_or_keep_it(left_state: Any) -> None:
    nets = Net(torch.bfloat16), Net(torch.bfloat16)
    for net, is_offloaded in zip(nets, (True, False), strict=True):
        optimizer = attached(METHODS[0], net, offload_low_words=is_offloaded)
        optimizer.set_blocks([[net.up], [net.down, net.bias]], left_state)
        for step in range(STEPS):
            optimizer.activate([step // INTERVAL % 2])
            optimizer.estimate(net)
            optimizer.step()
        optimizer.fold()
        kept = {"reset": net.up.nbytes, "keep": net.up.nbytes + net.down.nbytes}[left_state]
        assert optimizer.host_bytes() == kept * is_offloaded
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_float32_weights_have_nothing_to_offload() -> None:
    net = Net(torch.float32)
    optimizer = attached(METHODS[0], net, offload_low_words=True)
    train(net, optimizer, range(6))
    assert optimizer.host_bytes() == 0


def test_refused_where_there_is_nothing_or_no_subspace() -> None:
    net = Net(torch.bfloat16)
    with pytest.raises(ValueError, match="`offload_low_words` is True, but with `update_precision` 'native'"):
        attached(METHODS[0], net, offload_low_words=True, update_precision="native")
    with pytest.raises(TypeError, match="offload_low_words"):
        MeZO(net.parameters(), offload_low_words=True)


def test_a_transfer_at_every_step_is_said() -> None:
    class Reader(Callback):
        def on_train_batch_end(self, *_: Any) -> None: ...

    optimizer = attached(METHODS[0], Net(torch.bfloat16), offload_low_words=True)
    choose_folding(optimizer, [], L.LightningModule())
    assert not optimizer.fold_every_step
    with pytest.warns(UserWarning, match="low words go to the device and back .* because of Reader.on_train_batch_end"):
        choose_folding(optimizer, [Reader()], L.LightningModule())


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.func.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(method: Any, dtype: torch.dtype) -> None:
    """Pinned, in transfers that are over when the host reads, with the bits of low words that stay on the device."""
    found = []
    for is_offloaded in (True, False):
        net = nn.Linear(512, 1024, device="cuda", dtype=dtype)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
        inputs = torch.ones(1, 512, device="cuda", dtype=dtype)
        optimizer = method(net.named_parameters(), seed=3, offload_low_words=is_offloaded)
        optimizer.attach(net)
        optimizer.fold_every_step = False
        for step in range(6):
            if step % 2:
                optimizer.resample()
            optimizer.estimate(lambda net=net, inputs=inputs: net(inputs).double().square().mean())
            optimizer.step()
        optimizer.fold()
        state = optimizer.state_dict()["state"][0]
        extra_bits = state["low_word" if dtype == torch.bfloat16 else "master"]
        assert extra_bits.is_pinned() == is_offloaded and extra_bits.is_cuda != is_offloaded
        found.append((net.weight.detach().cpu(), extra_bits.cpu()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
