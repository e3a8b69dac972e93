"""A run that is resumed goes on with what its scope had chosen."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from training import Save, weights, zeroth_order
from zolightning.callbacks import DominantLayer, RandomLayer, TrainLayers, TrainParameters
from zolightning.optim import MeZO, MeZOAdam
from zolightning.scopes.parts import OutlierChannels, WithoutOutlierChannels
from zolightning.scopes.scope import Scope

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13


@pytest.mark.parametrize(
    ("make", "make_later"),
    [
        (DominantLayer, DominantLayer),
        (partial(DominantLayer, OutlierChannels(0.1)), partial(DominantLayer, OutlierChannels(0.1))),
        (partial(DominantLayer, WithoutOutlierChannels(0.1)), partial(TrainLayers, [4], OutlierChannels(0.5))),
        (DominantLayer, partial(TrainLayers, "all")),
        (partial(RandomLayer, seed=1), partial(RandomLayer, seed=2)),
        (partial(TrainParameters, ["q_proj"]), partial(TrainParameters, ["v_proj"])),
    ],
)
@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2, momentum=0.9), partial(MeZOAdam, lr=1e-2)])
def test_resuming_goes_on_with_what_was_chosen(
    make: Any, make_later: Any, method: Any, make_module: Any, make_trainer: Any, make_loader: Any, tmp_path: Path
) -> None:
    def run(scope: Scope, ckpt_path: Path | None = None) -> tuple[dict[str, Tensor], L.Trainer]:
        plain = make_loader()
        loader = StatefulDataLoader(plain.dataset, batch_size=3, collate_fn=plain.collate_fn)
        module = make_module("llama", outlier=2)
        trainer = make_trainer(max_steps=4, callbacks=[scope, zeroth_order(method), Save(2, tmp_path / "two.ckpt")])
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return weights(module), trainer

    whole, trainer = run(make())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    chosen = torch.load(tmp_path / "two.ckpt", weights_only=True)["scope"]
    resumed, trainer = run(make_later(), tmp_path / "two.ckpt")
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")

    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for path in ("four.ckpt", "resumed.ckpt"):
        assert repr(torch.load(tmp_path / path, weights_only=True)["scope"]) == repr(chosen)


def test_a_checkpoint_without_a_scope(
    make_module: Callable[..., Any], fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    fit(make_module(), zeroth_order(), max_steps=2).save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(
        MisconfigurationException, match="`ckpt_path` is a checkpoint of a run without a scope, and Train"
    ):
        fit(make_module(), TrainLayers([1]), zeroth_order(), ckpt_path=tmp_path / "whole.ckpt")
