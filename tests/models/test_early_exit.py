"""Networks whose head reads a middle layer: what they compute, save, resume and replay."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Gemma4TextConfig, PreTrainedModel, T5Config

from masked_models import write_tiny
from zolightning import CausalLM
from zolightning.callbacks import KeepLedger, LinearProbing, SaveLast, ZerothOrder
from zolightning.checkpoints.replay import replay
from zolightning.data import PromptDataModule
from zolightning.layers import find_layers
from zolightning.models import SequenceClassifier
from zolightning.network.adapters import add_adapter, lora_settings
from zolightning.network.early_exit import at_each_exit, keep_first_layers
from zolightning.optim import MeZO
from zolightning.scopes import TrainLayers

TOKENS = torch.arange(2, 12)[None]


@torch.no_grad()
def test_it_is_the_network_of_fewer_layers(
    architecture: str, make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_model(architecture)
    whole = model(TOKENS).logits
    keep_first_layers(model, 1)
    cut = model(TOKENS).logits
    assert not torch.allclose(cut, whole, atol=0.1)

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # with the layers that its config says
    assert torch.equal(loaded(TOKENS).logits, cut)
    assert sum(".1." in name for name, _ in loaded.named_parameters()) == 0

    untouched = make_model(architecture)
    keep_first_layers(untouched, 2)
    assert torch.equal(untouched(TOKENS).logits, whole)


@torch.no_grad()
def test_one_run_of_the_layers_serves_all_exits(architecture: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model(architecture)
    runs: list[int] = []
    layers = find_layers(model).layers
    for index, layer in enumerate(layers):  # what a layer computes with, which nobody replaces
        next(layer.children()).register_forward_hook(lambda *_, index=index: runs.append(index))
    found = at_each_exit(model, [1, 2], lambda: model(TOKENS, use_cache=False).logits)
    assert runs == [0, 1] and find_layers(model).layers == layers

    assert torch.equal(found[1], model(TOKENS).logits)
    keep_first_layers(model, 1)
    assert torch.equal(found[0], model(TOKENS).logits)
    assert not torch.allclose(found[0], found[1], atol=0.1)


def test_an_encoder_of_classes_can_exit_too(tmp_path: Path) -> None:
    module = SequenceClassifier(str(write_tiny(tmp_path, "bert")), num_classes=2, num_layers=1)
    assert len(find_layers(module.model)) == module.model.config.num_hidden_layers == 1


@pytest.mark.parametrize("num_layers", [0, 3, True, 1.5])
def test_a_number_that_cannot_be_names_the_field_and_the_range(tiny_folder: Path, num_layers: Any) -> None:
    with pytest.raises(ValueError, match=rf"`num_layers` is {num_layers}, .* has 2 layers: 1 to 2 are"):
        CausalLM(str(tiny_folder), num_layers=num_layers)


def test_a_probed_run_is_resumed_and_replayed(
    tmp_path: Path, write_tiny_model: Callable[..., Path], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder = str(write_tiny_model(tmp_path / "model", "gpt2"))
    data = PromptDataModule("sentiment", num_train=20, num_validation=8, num_test=8, batch_size=4)
    method = partial(MeZO, lr=1e-2)

    def fit(steps: int, **settings: Any) -> tuple[CausalLM, L.Trainer]:
        module = CausalLM(folder, num_layers=1)
        callbacks = [LinearProbing(cs=[1.0]), TrainLayers([0]), ZerothOrder(method)]
        keep = [KeepLedger(tmp_path), SaveLast(tmp_path)]
        trainer = make_trainer(
            max_steps=steps, limit_val_batches=0, callbacks=[*callbacks, *keep], enable_checkpointing=True
        )
        trainer.fit(module, data, weights_only=True, **settings)
        return module, trainer

    fit(2)
    module, trainer = fit(4, ckpt_path=tmp_path / "last.ckpt")
    (expected,) = trainer.test(module, data, verbose=False)

    replayed = CausalLM(folder)  # its base model
    assert replay(tmp_path / "ledger.bin", replayed, method).sealed
    assert all(torch.equal(weight, replayed.state_dict()[name]) for name, weight in module.state_dict().items())

    def test(module: CausalLM, name: str) -> Any:
        return make_trainer().test(module, data, ckpt_path=tmp_path / name, weights_only=True, verbose=False)[0]

    assert test(CausalLM(folder), "last.ckpt") == expected
    make_trainer(max_steps=1, callbacks=[ZerothOrder(method)]).fit(whole := CausalLM(folder), data)
    whole.trainer.save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="`num_layers` is 1, but the weights to load are of all layers"):
        test(CausalLM(folder, num_layers=1), "whole.ckpt")


def test_what_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    config = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="`num_layers` is 1, but T5ForConditionalGeneration has an encoder and a deco"):
        keep_first_layers(AutoModelForSeq2SeqLM.from_config(config), 1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1}
    tables = {"head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": 9, "hidden_size_per_layer_input": 0}
    config = Gemma4TextConfig(vocab_size=9, num_key_value_heads=1, **sizes, **tables)  # its last layer has no window
    with pytest.raises(ValueError, match="`num_layers` is 2, but the first layers of a Gemma4ForCausalLM are no netwo"):
        keep_first_layers(AutoModelForCausalLM.from_config(config), 2)
    module = CausalLM(str(tiny_folder), num_layers=1)
    add_adapter(module.model, lora_settings(2, 4.0, ["model.layers.0.self_attn.q_proj"]))
    with pytest.raises(ValueError, match="`num_layers` is 1, which an adapter's folder cannot record"):
        module.export(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
