"""Evaluations that share a run of the network give the losses of separate runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stacked_runs import (
    DEVICES,
    METHODS,
    WARN_ONLY_WHERE_EXPECTED,
    LanguageModel,
    Method,
    Regressor,
    assert_close,
    mlp,
    run,
)
from waits import Waits
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.optim import ZOMOPI, MeZO, StepRecord

pytestmark = WARN_ONLY_WHERE_EXPECTED


class Scaled(nn.Sequential):
    """A network that owns a parameter itself, beside those of its layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.scale = nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class IdleExperts(nn.Module):
    """A mixture of experts, some of which get no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.expert, self.idle, self.table = nn.Linear(4, 3), nn.Linear(4, 3), nn.Embedding(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        none = x.flatten(1)[:0]
        return self.expert(x.flatten(1)) + self.idle(none).sum() + self.table(none.long()).sum()


# Every architecture along matrices of low rank and along dense ones, and every method on one of them
PAIRS = [(architecture, method) for architecture in ("opt", "gpt2", "llama", "qwen3") for method in ("subzero", "mezo")]
PAIRS += [("gpt2", "lozo"), ("gpt2", "eggroll"), ("opt", "mopi"), ("llama", "mopi-one-sided")]


class TestSameLosses:
    @pytest.mark.parametrize(("architecture", "method"), PAIRS)
    def test_of_language_models(self, architecture: str, method: str) -> None:
        """Embeddings that are tied (opt, gpt2) or not, biases, transposed weights (gpt2), norms, shared positions."""
        make = partial(LanguageModel, architecture, torch.float64)
        expected = run(make, METHODS[method], 1)
        assert len({record.loss for record in expected}) == 3  # the weights move
        for size in (2, 4):
            assert_close(run(make, METHODS[method], size), expected, loss=1e-9, grad=1e-6)

    @DEVICES
    @pytest.mark.parametrize("tied", [True, False])
    def test_in_float32(self, tied: bool, device: str) -> None:
        """1e-6 of a loss of 2.6 over 2 eps = 2e-3 makes 1e-3 of a projected gradient; 1e-5 is what is trusted."""
        make = partial(LanguageModel, "llama", torch.float32, device, tie_word_embeddings=tied)
        loss, grad = (1e-6, 4e-3) if device == "cpu" else (1e-5, 4e-2)
        for method in METHODS.values():
            assert_close(run(make, method, 4, steps=2), run(make, method, 1, steps=2), loss, grad)

    @DEVICES
    def test_in_bfloat16(self, device: str) -> None:
        make = partial(LanguageModel, "gpt2", torch.bfloat16, device)
        for method in METHODS.values():
            found, expected = run(make, method, 4, steps=2), run(make, method, 1, steps=2)
            assert found[0].loss == pytest.approx(expected[0].loss, rel=1e-3 if device == "cpu" else 5e-3)

    def test_of_every_method(self, method: Method) -> None:
        make = partial(Regressor, mlp, 6, 4)
        assert_close(run(make, method, 3), run(make, method, 1), loss=1e-9, grad=1e-6)

    @pytest.mark.parametrize(
        "make_net",
        [
            lambda: nn.Sequential(
                nn.Conv1d(2, 12, 1), nn.BatchNorm1d(12), nn.PReLU(12), nn.Flatten(), nn.Linear(24, 2)
            ),
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False), nn.RMSNorm(3)),
            lambda: Scaled(nn.Flatten(), nn.Linear(4, 5), nn.Linear(5, 3)),
            IdleExperts,
        ],
        ids=["convolution", "norm", "scaled", "experts"],
    )
    def test_of_other_functions(self, make_net: Callable[[], nn.Module]) -> None:
        """With 6 rows and 2 groups the 12 channels of a batch norm's statistics must not be taken for rows."""
        make = partial(Regressor, make_net, 6, 2, 2)
        for method in (METHODS["mopi"], METHODS["mezo"]):
            assert_close(run(make, method, 2), run(make, method, 1), loss=1e-9, grad=1e-6)

    def test_where_only_biases_train(self) -> None:
        def make() -> Regressor:
            module = Regressor(mlp, 6, 4)
            module.net[0].weight.requires_grad_(False)
            module.net[3].weight.requires_grad_(False)
            return module

        assert_close(run(make, METHODS["mezo"], 4), run(make, METHODS["mezo"], 1), loss=1e-9, grad=1e-6)

    @pytest.mark.parametrize("size", [4, 2])
    def test_inputs_are_compared_with_one_wait_for_the_device(self, size: int) -> None:
        """For all evaluations, inputs and runs together, and with none where these are the same tensors."""

        def waits(inputs: Callable[[Tensor], Tensor]) -> int:
            module = Regressor(mlp, 6, 4)
            optimizer = MeZO(module.parameters(), lr=1e-2, num_queries=2, seed=0)
            optimizer.attach(module, size)
            for watch in (Waits(), Waits()):  # the first step checks
                with watch:
                    optimizer.estimate(lambda: module.net(inputs(module.inputs)).square().mean())
            return len(watch.found)

        assert waits(Tensor.clone) == waits(lambda x: x) + 1

    def test_of_batches_of_changing_size(self) -> None:
        def losses(size: int) -> list[StepRecord]:
            module = Regressor(mlp, 6, 4)
            optimizer = MeZO(module.parameters(), lr=1e-2, num_queries=2, seed=0)
            optimizer.attach(module, size)
            records = []
            for rows in (6, 1, 4, 3):
                module.inputs = torch.linspace(-1, 1, rows * 4).double().view(rows, 4)
                records.append(optimizer.estimate(module.loss))
                optimizer.step()
            return records

        assert_close(losses(4), losses(1), loss=1e-9, grad=1e-6)


class TestUnderZerothOrder:
    @pytest.mark.parametrize("micro_batch_size", [None, 3])
    def test_the_same_training(
        self,
        make_regression: Callable[..., L.LightningModule],
        regression_data: Callable[..., DataLoader],
        make_trainer: Callable[..., L.Trainer],
        micro_batch_size: int | None,
    ) -> None:
        """Micro-batches of 3, 3 and 1 examples: a network that runs several times in an evaluation."""

        def fit(size: int) -> dict[str, Tensor]:
            module, rows = make_regression(), []
            module.net[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
            callback = ZerothOrder(
                partial(ZOMOPI, rank=3, power_rank=2, num_queries=2, lr=1e-2, seed=3),
                micro_batch_size=micro_batch_size,
                evaluations_per_forward=size,
            )
            trainer = make_trainer(max_steps=5, callbacks=[callback, SubspaceResampling(interval=2)])
            trainer.fit(module, regression_data(5, 7))
            parts = [7] if micro_batch_size is None else [3, 3, 1]
            assert rows[-4 * len(parts) // size :] == [size * part for part in parts] * (4 // size)
            return module.state_dict()

        stacked, expected = fit(4), fit(1)
        for name in expected:
            torch.testing.assert_close(stacked[name], expected[name], rtol=1e-4, atol=1e-4)

    def test_a_network_is_needed(
        self, regression_data: Callable[..., DataLoader], make_trainer: Callable[..., L.Trainer]
    ) -> None:
        class TwoNetworks(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

            def training_step(self, batch: Any) -> Tensor:
                return (self.head(self.body(batch[0])) - batch[1]).square().mean()

            def configure_optimizers(self) -> None: ...

        callback = ZerothOrder(partial(MeZO, lr=1e-3), evaluations_per_forward=2)
        with pytest.raises(ValueError, match=r"one submodule that holds all .* its children are body, head"):
            make_trainer(max_steps=1, callbacks=[callback]).fit(TwoNetworks(), regression_data())

    def test_bad_values(self) -> None:
        with pytest.raises(ValueError, match="`evaluations_per_forward` must be an integer, at least 1, got 0"):
            ZerothOrder(MeZO, evaluations_per_forward=0)
