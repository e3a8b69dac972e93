"""Checkpoints that leave out frozen weights: what they hold, that they load as whole ones do, and what is refused."""

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from zolightning.callbacks import LinearProbing, ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.directions.shards import whole
from zolightning.models import CausalLM, SequenceClassifier
from zolightning.optim import MeZO
from zolightning.scopes import LoRA, TrainLayers, TrainParameters
from zolightning.strategies import ZerothOrderFSDP

Fit = Callable[..., dict[str, Any]]
UP = "layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(write_tiny_model: Callable[..., Path], tmp_path: Path) -> str:
    return str(write_tiny_model(tmp_path / "model"))


@pytest.fixture
def fit(folder: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path) -> Fit:
    """Fits two steps, unless it is told how many, and returns the checkpoint, which is also saved as `name`."""

    def run(
        name: str,
        cls: Any = CausalLM,
        settings: dict[str, Any] | None = None,
        callbacks: Any = (),
        precision: Any = "32-true",
        max_steps: int = 2,
        ckpt_path: Path | None = None,
    ) -> dict[str, Any]:
        L.seed_everything(3, verbose=False)
        module = cls(folder, **(settings or {}))
        callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), *callbacks]
        trainer = make_trainer(max_steps=max_steps, callbacks=callbacks, precision=precision)
        data = PromptDataModule("sentiment", num_train=16, num_validation=8, num_test=8, batch_size=4)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / name)
        return torch.load(tmp_path / name, weights_only=True)

    return run


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("cls", "settings", "callbacks", "precision", "saved"),
    [
        (CausalLM, {}, lambda: [TrainLayers([1])], "32-true", ["layers.1."]),
        (CausalLM, {}, lambda: [TrainLayers([1])], "bf16-true", ["layers.1."]),
        (CausalLM, {"dtype": "bfloat16"}, lambda: [TrainLayers([1], part=LoRA())], "bf16-true", [".lora_"]),
        (CausalLM, {"quantization": "int8"}, lambda: [TrainLayers([1], part=LoRA())], "32-true", [".lora_"]),
        (CausalLM, {}, lambda: [TrainLayers([1]), LinearProbing(cs=[1.0])], "32-true", ["layers.1.", "lm_head"]),
        (SequenceClassifier, {"num_classes": 2}, lambda: [TrainParameters([UP])], "32-true", [UP, "score"]),
    ],
)
def test_it_holds_what_has_changed_and_loads_as_a_whole_one_does(
    fit: Fit, tmp_path: Path, cls: Any, settings: dict[str, Any], callbacks: Any, precision: str, saved: list[str]
) -> None:
    whole = fit("whole.ckpt", cls, settings, callbacks(), precision)
    small = fit("small.ckpt", cls, settings | {"save_frozen": False}, callbacks(), precision)
    has = small["state_dict"]
    assert has and all(any(part in name for part in saved) for name in has), list(has)
    assert all(any(part in name for name in has) for part in saved), list(has)
    assert_equal(has, {name: whole["state_dict"][name] for name in has})
    loaded = [
        cls.load_from_checkpoint(tmp_path / name, weights_only=True).state_dict()
        for name in ("whole.ckpt", "small.ckpt")
    ]
    assert_equal(loaded[1], loaded[0])


def test_a_resumed_run_takes_the_same_steps_and_leaves_out_the_same(fit: Fit, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"settings": {"save_frozen": False}}
    straight = fit("straight.ckpt", callbacks=[TrainLayers([1])], max_steps=4, **settings)
    fit("half.ckpt", callbacks=[TrainLayers([1])], max_steps=2, **settings)
    resumed = fit(
        "resumed.ckpt", callbacks=[TrainLayers([1])], max_steps=4, ckpt_path=tmp_path / "half.ckpt", **settings
    )
    assert_equal(resumed["state_dict"], straight["state_dict"])
    assert resumed["frozen_weights"] == straight["frozen_weights"] != {}


def test_a_frozen_weight_that_a_callback_changes_is_saved(fit: Fit, tmp_path: Path) -> None:
    class Clamp(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            pl_module.get_parameter("model.model.layers.0.mlp.up_proj.weight").data.clamp_(-0.01, 0.01)

    has = fit("run.ckpt", settings={"save_frozen": False}, callbacks=[TrainLayers([1]), Clamp()])["state_dict"]
    assert [name for name in has if ".layers.1." not in name] == ["model.model.layers.0.mlp.up_proj.weight"]
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.get_parameter("model.model.layers.0.mlp.up_proj.weight").abs().max() <= 0.01


def test_what_an_earlier_fit_or_checkpoint_trained_is_saved(
    fit: Fit, folder: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    fit("first.ckpt", settings={"save_frozen": False}, callbacks=[TrainLayers([1])])
    loaded = CausalLM.load_from_checkpoint(tmp_path / "first.ckpt", weights_only=True, save_frozen=False)
    twice = CausalLM(folder, save_frozen=False)
    data = PromptDataModule("sentiment", num_train=16, num_validation=8, num_test=8, batch_size=4)
    for module, layers in ((loaded, [0]), (twice, [1]), (twice, [0])):
        trainer = make_trainer(max_steps=2, callbacks=[ZerothOrder(partial(MeZO, lr=0.1)), TrainLayers(layers)])
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        names = torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"]
        assert {name.split(".")[3] for name in names} == ({"1"} if layers == [1] else {"0", "1"})
        again = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert_equal(again.state_dict(), {name: module.state_dict()[name] for name in again.state_dict()})


def test_what_was_loaded_or_written_before_an_adapter_is_saved(
    fit: Fit, folder: str, tmp_path: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    fit("whole.ckpt", callbacks=[TrainLayers([1])])
    loaded = CausalLM.load_from_checkpoint(tmp_path / "whole.ckpt", weights_only=True, save_frozen=False)
    written = CausalLM(folder, save_frozen=False)
    with torch.no_grad():
        written.get_parameter("model.model.layers.1.mlp.up_proj.weight").mul_(2)
    data = PromptDataModule("sentiment", num_train=16, num_validation=8, num_test=8, batch_size=4)
    trainer = make_trainer()
    trainer.validate(written, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")  # before any fit: all of it
    assert_equal(torch.load(tmp_path / "whole.ckpt", weights_only=True)["state_dict"], written.state_dict())
    for weight in written.state_dict().values():
        weight.copy_(weight)  # as strategies of several processes do, from rank 0
    for module in (loaded, written):
        callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), TrainLayers([1], part=LoRA())]
        trainer = make_trainer(max_steps=2, callbacks=callbacks)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "run.ckpt")
        again = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        assert_equal(again.state_dict(), {name: module.state_dict()[name] for name in again.state_dict()})
    assert len(torch.load(tmp_path / "run.ckpt", weights_only=True)["frozen_weights"]) == 20  # all but one


def test_weights_that_a_run_replaces_do_not_stay_in_memory(folder: str, make_trainer: Callable[..., L.Trainer]) -> None:
    module = CausalLM(folder, quantization="int8", save_frozen=False)
    replaced = weakref.ref(module.get_parameter("model.model.layers.1.mlp.up_proj.weight"))
    callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), TrainLayers([1])]
    make_trainer(max_steps=1, callbacks=callbacks).fit(module, PromptDataModule("sentiment", batch_size=4))
    gc.collect()
    assert replaced() is None


def test_other_weights_are_refused(fit: Fit, folder: str, tmp_path: Path) -> None:
    fit("run.ckpt", settings={"save_frozen": False}, callbacks=[TrainLayers([1])])
    other = CausalLM(folder)
    with torch.no_grad():
        other.get_parameter("model.model.layers.0.mlp.up_proj.weight").mul_(2)
    other.model.save_pretrained(folder)
    message = r"leaves out 12 frozen weights .* 1 of this model are different from them \(model.model.layers.0.mlp.up"
    with pytest.raises(ValueError, match=message):
        CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=message):
        fit("again.ckpt", callbacks=[TrainLayers([1])], max_steps=4, ckpt_path=tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    checkpoint["frozen_weights"]["model.model.layers.2.more"] = ("torch.float32", "")  # of a larger network
    torch.save(checkpoint, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"leaves out 13 frozen weights .* 2 of this model are different"):
        CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def one_group() -> Iterator[None]:
    """Leaves the process group that Lightning makes after the last test of this module.

    To leave it after each test would not do: DTensor keeps what it has found out about the first mesh, and takes its
    groups, which are gone, for those of the next one.
    """
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def one_shard(monkeypatch: pytest.MonkeyPatch, one_group: None) -> ZerothOrderFSDP:
    """A strategy that shards weights, for a Trainer with one device."""
    monkeypatch.setattr("os.environ", dict(os.environ))  # which Lightning changes
    return ZerothOrderFSDP()


@pytest.mark.parametrize("validates", [False, True])
def test_weights_are_sharded_before_or_in_the_fit(
    folder: str, make_trainer: Callable[..., L.Trainer], tmp_path: Path, one_shard: ZerothOrderFSDP, validates: bool
) -> None:
    """Those that were loaded do not stay in memory."""
    module = CausalLM(folder, save_frozen=False)
    replaced = weakref.ref(module.get_parameter("model.model.layers.1.mlp.up_proj.weight"))
    callbacks = [ZerothOrder(partial(MeZO, lr=0.1)), TrainLayers([1])]
    trainer = make_trainer(max_steps=1, callbacks=callbacks, strategy=one_shard)
    data = PromptDataModule("sentiment", num_train=16, num_validation=8, num_test=8, batch_size=4)
    if validates:
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    gc.collect()
    assert replaced() is None
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert {name.split(".")[3] for name in saved["state_dict"]} == {"1"} and len(saved["frozen_weights"]) == 12
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert_equal(loaded.state_dict(), {name: whole(tensor) for name, tensor in module.state_dict().items()})
