"""Modules that Lightning makes of a checkpoint alone, ``load_from_checkpoint``."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from zolightning.callbacks import ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM, SequenceClassifier
from zolightning.optim import MeZO
from zolightning.scopes import LoRA, TrainLayers


@pytest.mark.parametrize(
    ("cls", "settings", "scope"),
    [
        (CausalLM, {"num_layers": 1, "dtype": "bfloat16"}, []),
        (CausalLM, {"quantization": "int8"}, [TrainLayers([1], part=LoRA())]),
        (SequenceClassifier, {"num_classes": 2}, []),
    ],
)
def test_it_computes_what_the_run_computed(
    cls: Any,
    settings: dict[str, Any],
    scope: list[Any],
    tmp_path: Path,
    make_trainer: Callable[..., L.Trainer],
    write_tiny_model: Callable[..., Path],
) -> None:
    module = cls(str(write_tiny_model(tmp_path / "model")), **settings)
    data = PromptDataModule("sentiment", num_train=8, num_validation=8, num_test=8, batch_size=4)
    precision = "bf16-true" if "dtype" in settings else "32-true"
    callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), *scope]
    trainer = make_trainer(max_steps=2, callbacks=callbacks, precision=precision)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = cls.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(tokens).logits, module.model.eval()(tokens).logits)
    assert next(loaded.parameters()).dtype == next(module.parameters()).dtype


def test_a_subclass_may_save_settings_of_its_own(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer], write_tiny_model: Callable[..., Path]
) -> None:
    class Own(CausalLM):
        def __init__(self, folder: str, size: int) -> None:
            super().__init__(f"{folder}/model")
            self.save_hyperparameters()

    write_tiny_model(tmp_path / "model")
    trainer = make_trainer(max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=0.1))])
    trainer.fit(Own(str(tmp_path), 3), PromptDataModule("sentiment", num_train=8, num_validation=8, batch_size=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert Own.load_from_checkpoint(tmp_path / "run.ckpt").hparams == {"folder": str(tmp_path), "size": 3}
