"""ZerothOrder trains modules that know nothing of it, at every precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from training import Records, assert_equal, weights
from zolightning import zeroth_order_step
from zolightning.callbacks import ZerothOrder
from zolightning.optim import MeZO, MeZOAdam, ZerothOrderOptimizer

MakeTrainer = Callable[..., L.Trainer]
MakeData = Callable[..., DataLoader]
MakeModule = Callable[..., L.LightningModule]

NORMALIZED = partial(MeZO, lr=0.04, eps=1e-2, normalize=True, num_queries=4)


class Images(L.LightningModule):
    """A convolutional network with batch norm, its weights and images in channels-last layout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2)
        ).to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        return {"loss": F.cross_entropy(self.net(images.to(memory_format=torch.channels_last)), labels)}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(64, 1, 6, 6, generator=generator)
        labels = (images[:, 0, :3].mean((1, 2)) > images[:, 0, 3:].mean((1, 2))).long()
        return DataLoader([(images, labels)], batch_size=None)


class Bert(L.LightningModule):
    """A Hugging Face classifier, as its users write it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=12, **sizes))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        outputs = self.model(**batch)
        self.log("train/loss", outputs.loss)
        self.log("train/accuracy", (outputs.logits.argmax(-1) == batch["labels"]).float().mean(), prog_bar=True)
        return outputs.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @staticmethod
    def data() -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 20, (32, 8), generator=generator)
        mask = torch.arange(8) < torch.randint(4, 9, (32, 1), generator=generator)
        labels = (ids[:, 0] > 10).long()
        batch = {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": labels}
        return DataLoader([batch], batch_size=None)


def loss_of(module: L.LightningModule, batch: Any) -> float:
    module.eval()
    log, module.log = module.log, lambda *_, **__: None
    with torch.no_grad():
        outputs = module.training_step(batch) if isinstance(module, Images) else module.training_step(batch, 0)
    module.log = log
    module.train()
    return (outputs["loss"] if isinstance(outputs, dict) else outputs).item()


class TestUnchangedModules:
    @pytest.fixture(params=["regression", "images", "bert"])
    def module_and_data(
        self, request: pytest.FixtureRequest, make_regression: MakeModule, regression_data: MakeData
    ) -> tuple[L.LightningModule, Any]:
        L.seed_everything(0)
        if request.param == "regression":
            return make_regression(), regression_data(num_batches=1, batch_size=32)
        cls = {"images": Images, "bert": Bert}[request.param]
        return cls().train(), cls.data()

    def test_they_train_with_it_and_without_it(
        self, module_and_data: tuple[L.LightningModule, Any], make_trainer: MakeTrainer
    ) -> None:
        module, data = module_and_data
        (batch,) = iter(data)
        start = module.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        before = loss_of(module, batch)

        make_trainer(max_steps=40, callbacks=[ZerothOrder(NORMALIZED)]).fit(module, data)
        assert loss_of(module, batch) < 0.8 * before
        assert all(parameter.grad is None for parameter in module.parameters())

        module.load_state_dict(start)
        make_trainer(max_steps=40).fit(module, data)
        assert loss_of(module, batch) < 0.8 * before
        assert any(parameter.grad is not None for parameter in module.parameters())

    @pytest.mark.parametrize("takes_index", [True, False])
    def test_signatures_of_training_step(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer, takes_index: bool
    ) -> None:
        module, indices = make_regression(), []
        own_step = module.training_step

        def with_index(batch: Any, batch_idx: int) -> Tensor:
            indices.append(batch_idx)
            return own_step(batch, batch_idx)

        def without_index(batch: Any) -> Tensor:
            return own_step(batch, 0)

        module.training_step = with_index if takes_index else without_index
        recorder = Records()
        make_trainer(max_steps=3, callbacks=[ZerothOrder(MeZO), recorder]).fit(module, regression_data())
        assert [record.forward_passes for record in recorder.records] == [2, 2, 2]
        assert indices == ([0] * 7 + [1] * 2 + [2] * 2 if takes_index else [])

    def test_dictionaries_without_a_loss(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        module = make_regression()
        module.training_step = lambda batch, batch_idx: {"logits": batch[0]}
        with pytest.raises(TypeError, match="got None: a dictionary with `logits`, and no `loss`"):
            make_trainer(max_steps=1, callbacks=[ZerothOrder(MeZO)]).fit(module, regression_data())

    def test_it_is_the_step_of_a_module_that_calls_it_itself(
        self, make_regression: MakeModule, regression_data: MakeData, make_trainer: MakeTrainer
    ) -> None:
        class Own(type(make_regression())):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> None:
                zeroth_order_step(self, lambda: super(Own, self).training_step(batch, batch_idx))

            def configure_optimizers(self) -> ZerothOrderOptimizer:
                return MeZO(self.parameters(), lr=1e-2)

        own, plain = Own(), make_regression()
        make_trainer(max_steps=9).fit(own, regression_data())
        make_trainer(max_steps=9, callbacks=[ZerothOrder(partial(MeZO, lr=1e-2))]).fit(plain, regression_data())
        assert_equal(weights(own), weights(plain))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
        ("64-true", torch.float64),
    ],
)
@pytest.mark.parametrize("method", [NORMALIZED, partial(MeZOAdam, lr=0.04, eps=1e-2, num_queries=4)])
def test_precisions(
    make_regression: MakeModule,
    regression_data: MakeData,
    make_trainer: MakeTrainer,
    precision: str,
    dtype: torch.dtype,
    method: Any,
) -> None:
    module, recorder = make_regression(), Records()
    trainer = make_trainer(max_steps=40, precision=precision, callbacks=[ZerothOrder(method), recorder])
    trainer.fit(module, regression_data(num_batches=1, batch_size=32))
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    losses = [record.loss for record in recorder.records]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    state = [value for entry in trainer.optimizers[0].state.values() for value in entry.values()]
    wide = {torch.float64} if precision == "64-true" else {torch.float32, torch.int16}
    assert {value.dtype for value in state if isinstance(value, Tensor)} <= wide
