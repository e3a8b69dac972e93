"""CUDA graphs as an option of the callback, with the stand-in of graph_runs.py on the CPU."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from graph_runs import CPUCapture
from training import assert_equal, weights
from zolightning.callbacks import RunOverview, SubspaceResampling, ZerothOrder, refusals
from zolightning.optim import MeZO, SubZero

METHODS = {
    "mezo": partial(MeZO, lr=1e-2, num_queries=2),
    "subzero": partial(SubZero, lr=1e-2, rank=2, momentum=0.5, vector_lr=1e-2),
}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zolightning.evaluation.evaluator.CudaCapture", CPUCapture)
    monkeypatch.setattr(refusals, "refuse_graphs", lambda device: None)


def test_devices_without_graphs_and_options_that_exclude_each_other(
    make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    with pytest.raises(MisconfigurationException, match="`cuda_graphs` is True, but the run is on 'cpu'"):
        make_trainer(max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2), cuda_graphs=True)]).fit(
            make_regression(), regression_data()
        )
    with pytest.raises(ValueError, match=r"`cuda_graphs` is True.* leave `keep_prefix_gib` at 0, got 1\.0"):
        ZerothOrder(partial(MeZO, lr=1e-2), cuda_graphs=True, keep_prefix_gib=1.0)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_module_without_one_network(make_trainer: Any, regression_data: Any, make_regression: Any) -> None:
    class Bare(type(make_regression())):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"`cuda_graphs` needs one submodule .* its children are net, other"):
        make_trainer(max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2), cuda_graphs=True)]).fit(
            Bare(), regression_data()
        )


@pytest.mark.usefixtures("on_the_cpu")
def test_a_module_that_is_its_own_network(make_trainer: Any, regression_data: Any) -> None:
    """Its `log` is another one in each step, but graphs stay on: a warning would be an error."""

    class Own(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.two(self.one(inputs).tanh())

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            loss = (self(batch[0]) - batch[1]).square().mean()
            self.log("own", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    zeroth_order = ZerothOrder(partial(MeZO, lr=1e-2), cuda_graphs=True)
    make_trainer(max_steps=6, precision="64-true", callbacks=[zeroth_order]).fit(Own(), regression_data())


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_same_bits_and_resuming(
    make_trainer: Any,
    make_regression: Any,
    regression_data: Any,
    method: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fit(cuda_graphs: bool, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        def save(trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

        callbacks = [
            ZerothOrder(method, cuda_graphs=cuda_graphs),
            RunOverview(),
            LambdaCallback(on_train_batch_end=save),
        ]
        callbacks += [SubspaceResampling(interval=2)] if method is METHODS["subzero"] else []
        trainer, module = (
            make_trainer(max_steps=6, precision="64-true", callbacks=callbacks),
            make_regression().double(),
        )
        data = StatefulDataLoader(regression_data().dataset, batch_size=4)  # whose place a checkpoint has
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return weights(module)

    caplog.set_level("INFO")
    plain = fit(cuda_graphs=False)
    assert not any("by CUDA graphs" in message for message in caplog.messages)
    assert_equal(plain, fit(cuda_graphs=True))
    assert any("forward passes by CUDA graphs" in message for message in caplog.messages)
    assert_equal(plain, fit(cuda_graphs=True, ckpt_path=tmp_path / "3.ckpt"))
