"""Networks that are spread over devices: over the CPU and the disk here, and with all of accelerate's hooks on one."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from accelerate import dispatch_model
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.callbacks import KeepLedger, LinearProbing, SubspaceResampling, ZerothOrder
from zolightning.callbacks.run_memory import memory_plan
from zolightning.data import PromptDataModule
from zolightning.memory import trained_by
from zolightning.models import CausalLM
from zolightning.models.spread import keep_in_place, refuse_misplaced
from zolightning.optim import LOZO, MeZO
from zolightning.scopes import LoRA, TrainLayers, WholeLayer

ON_DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"} | dict.fromkeys(
    ("model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


@pytest.fixture
def folder(write_tiny_model: Callable[..., Path], tmp_path: Path) -> str:
    return str(write_tiny_model(tmp_path / "model"))


@pytest.fixture
def data() -> PromptDataModule:
    return PromptDataModule("sentiment", batch_size=4, num_train=24, num_validation=8, num_test=8)


def hooked(folder: str, place: Callable[[str], Any] = lambda name: "cpu") -> CausalLM:
    """A module whose network has the hooks of one that is spread over devices."""
    module = CausalLM(folder)
    names = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {name: place(name) for name in names}
    dispatch_model(module.model, device_map, main_device="cpu", force_hooks=True)
    keep_in_place(module.model)
    return module


def test_weights_on_the_disk_are_evaluated(folder: str, data: PromptDataModule, make_trainer: Any) -> None:
    spread = CausalLM(folder, device_map=ON_DISK)
    assert {p.is_meta for p in spread.model.model.layers[1].parameters()} == {True}
    expected = make_trainer().validate(CausalLM(folder), data, verbose=False)
    assert make_trainer().validate(spread, data, verbose=False) == expected


@pytest.mark.parametrize("method", [partial(MeZO, lr=0.05), partial(LOZO, lr=0.05, rank=2), None])
def test_training_takes_the_same_steps(folder: str, data: PromptDataModule, make_trainer: Any, method: Any) -> None:
    trained = []
    for module in (CausalLM(folder), hooked(folder)):
        callbacks = [] if method is None else [ZerothOrder(method)]
        callbacks += [SubspaceResampling(2)] if method is not None and method.func is LOZO else []
        make_trainer(max_steps=3, callbacks=callbacks).fit(module, datamodule=copy.deepcopy(data))
        trained.append(module.state_dict())
    plain, spread = trained
    assert plain.keys() == spread.keys()
    assert all(torch.equal(spread[name], weight) for name, weight in plain.items())
    before = CausalLM(folder).state_dict()
    assert not torch.equal(before["model.lm_head.weight"], plain["model.lm_head.weight"])


def test_a_strategy_changes_dtypes_and_no_places(folder: str) -> None:
    module = CausalLM(folder, device_map="auto")
    again = copy.deepcopy(module)
    for each in (module, again):
        each.to("meta", torch.bfloat16)
        weights = list(each.parameters())
        assert {(w.device.type, w.dtype) for w in weights} == {("cpu", torch.bfloat16)} and len(weights) == 21
    assert not {id(w) for w in module.parameters()} & {id(w) for w in again.parameters()}


@pytest.mark.parametrize("part", [WholeLayer, LoRA])
def test_layers_train_above_weights_on_the_disk(
    folder: str, data: PromptDataModule, make_trainer: Any, tmp_path: Path, part: Any
) -> None:
    trained, plans = [], []
    for name, device_map in (("plain", None), ("spread", ON_DISK)):
        L.seed_everything(5, verbose=False)
        module = CausalLM(folder, device_map=device_map, save_frozen=False)
        callbacks = [ZerothOrder(partial(MeZO, lr=0.5)), TrainLayers([0], part=part())]
        trainer = make_trainer(max_steps=3, callbacks=callbacks, inference_mode=False)
        trainer.validate(module, datamodule=copy.deepcopy(data), verbose=False)  # which replaces parameters on the disk
        trainer.fit(module, datamodule=copy.deepcopy(data))
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        trained.append(torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"])
        (optimizer,) = trainer.optimizers
        plans.append(memory_plan(trainer, module, optimizer, trained_by(optimizer)))
    offloaded = [weight.nbytes for weight in CausalLM(folder).model.model.layers[1].parameters()]
    changes = [getattr(plans[1], name) - getattr(plans[0], name) for name in ("weights", "host", "scratch", "state")]
    assert changes == [-sum(offloaded), sum(offloaded), max(offloaded), 0]
    plain, spread = trained
    assert plain.keys() == spread.keys() and all(".layers.0." in name for name in plain)
    assert all(torch.equal(spread[name], weight) for name, weight in plain.items())
    # Weights that cannot be read are not compared, on either side.
    losses = {
        make_trainer().validate(CausalLM(folder, device_map=place), data, tmp_path / f"{name}.ckpt", verbose=False)[0][
            "val/loss"
        ]
        for name in ("plain", "spread")
        for place in (None, ON_DISK)
    }
    assert len(losses) == 1 and losses != {
        make_trainer().validate(CausalLM(folder), data, verbose=False)[0]["val/loss"]
    }


def test_what_does_not_work_is_refused(folder: str, data: PromptDataModule, make_trainer: Any, tmp_path: Path) -> None:
    spread = CausalLM(folder, device_map=ON_DISK)
    with pytest.raises(MisconfigurationException, match=r"leaves 9 weights \(model\.layers\.1\..*cannot be trained"):
        make_trainer(max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=0.05))]).fit(spread, data)
    frozen = [ZerothOrder(partial(MeZO, lr=0.05)), TrainLayers([0])]
    with pytest.raises(
        MisconfigurationException, match=r"no checkpoint can hold them\. Set `model\.save_frozen` to False"
    ):
        make_trainer(max_steps=1, callbacks=frozen).fit(spread, data)
    spread = CausalLM(folder, device_map=ON_DISK, save_frozen=False)
    with pytest.raises(MisconfigurationException, match=r"Set `trainer\.inference_mode` to False"):
        make_trainer(max_steps=1, callbacks=frozen).fit(spread, data)
    with pytest.raises(MisconfigurationException, match=r"no ledger can begin with .* Set `keep_ledger` to False"):
        make_trainer(max_steps=1, callbacks=[*frozen, KeepLedger()], inference_mode=False).fit(spread, data)
    head = CausalLM(folder, device_map=ON_DISK | {"lm_head": "disk"}, save_frozen=False)
    with pytest.raises(MisconfigurationException, match=r"`linear_probing` is given, but .* leaves the head"):
        make_trainer(max_steps=1, callbacks=[*frozen, LinearProbing()], inference_mode=False).fit(head, data)
    with pytest.raises(MisconfigurationException, match="they cannot be quantised"):
        CausalLM(folder, device_map=ON_DISK, quantization="int8")
    with pytest.raises(MisconfigurationException, match="no checkpoint can be loaded into them"):
        spread.on_load_checkpoint({"state_dict": CausalLM(folder).state_dict()})
    with pytest.raises(MisconfigurationException, match="cannot be written"):
        spread.export(tmp_path / "exported")
    with pytest.raises(MisconfigurationException, match=r"bfloat16, but `model\.device_map` leaves some .* Set"):
        make_trainer(precision="bf16-true").validate(spread, data)
    ranks: Any = SimpleNamespace(strategy=DDPStrategy(), world_size=2)
    with pytest.raises(MisconfigurationException, match=r"`trainer\.strategy` is DDPStrategy with 2 processes"):
        refuse_misplaced(CausalLM(folder, device_map="auto").model, ranks, "validate", save_frozen=True)
    refuse_misplaced(CausalLM(folder).model, ranks, "validate", save_frozen=True)  # is on one device
    with pytest.raises(ValueError, match=r"with `device_map` \{'': 7\}: there is no GPU 7; "):
        CausalLM(folder, device_map={"": 7})
    with pytest.raises(ValueError, match=r"with `device_map` 'everywhere': .*'auto'"):
        CausalLM(folder, device_map="everywhere")


@pytest.mark.gpu
def test_two_devices_take_the_steps_of_one(folder: str, data: PromptDataModule, make_trainer: Any) -> None:
    def place(name: str) -> Any:
        return 0 if name in ("model.layers.1", "lm_head") else "cpu"

    losses = []
    for module in (CausalLM(folder), hooked(folder, place)):
        make_trainer(max_steps=3, callbacks=[ZerothOrder(partial(MeZO, lr=0.05))]).fit(module, datamodule=data)
        losses.append(make_trainer().validate(module, data, verbose=False)[0]["val/loss"])
    assert {p.device.type for p in module.parameters()} == {"cpu", "cuda"}
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
