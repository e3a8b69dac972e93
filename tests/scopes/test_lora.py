"""LoRA: adapters in the chosen layers, trained, saved, restored and exported."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from training import num_trained, weights, zeroth_order
from zolightning import CausalLM
from zolightning.callbacks import DominantLayer, TrainLayers
from zolightning.layers import find_layers, mlp_of
from zolightning.models import answer_log_probs
from zolightning.network.adapters import adapter_settings, add_adapter, lora_settings, remove_adapter
from zolightning.scopes.calibration import calibration_forward
from zolightning.scopes.massive_direction import MassiveDirection
from zolightning.scopes.parts import LoRA

HIDDEN, KEY_VALUE, RANK = 16, 8, 4
# Input and output features of the linear maps that PEFT adapts in each architecture.
ADAPTED = {"gpt2": [(HIDDEN, 3 * HIDDEN)], "opt": [(HIDDEN, HIDDEN)] * 2, "bert": [(HIDDEN, HIDDEN)] * 2}
GATED = [(HIDDEN, HIDDEN), (HIDDEN, KEY_VALUE)]


@pytest.mark.parametrize("layers", [[3], "all"])
def test_adapters_train_and_nothing_else(
    architecture: str, layers: Any, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    module = make_module(architecture)
    before = weights(module)
    trainer = make_trainer(max_steps=2, callbacks=[TrainLayers(layers, LoRA(RANK)), zeroth_order()])
    trainer.fit(module, make_loader())

    after = weights(module)
    adapters = {name: weight for name, weight in after.items() if ".lora_" in name}
    shapes = ADAPTED.get(architecture, GATED)
    times = 1 if layers == [3] else 6
    assert sum(weight.numel() for weight in adapters.values()) == times * RANK * sum(map(sum, shapes))
    assert num_trained(trainer) == sum(weight.numel() for weight in adapters.values())
    assert all(".3." in name for name in adapters) or layers == "all"
    assert all(weight.any() for weight in adapters.values())  # B has left zero
    base = {name.replace(".base_layer", ""): weight for name, weight in after.items() if name not in adapters}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_backpropagation_trains_adapters(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    module = make_module()
    make_trainer(max_steps=2, callbacks=[TrainLayers([1], LoRA(RANK))]).fit(module, make_loader())
    assert any(weight.any() for name, weight in weights(module).items() if "lora_B" in name)


def test_an_adapter_changes_nothing_at_first_and_depends_on_the_seed_only(
    make_module: Any, make_loader: Any, make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapters(seed: str, before: int) -> list[Tensor]:
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        torch.manual_seed(before)
        state = torch.get_rng_state()
        module = make_module()
        LoRA(RANK).select(module, stack := find_layers(module), range(len(stack)), lambda: None)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(module.training_step(batch, 0), make_module().training_step(batch, 0))
        return [weight for name, weight in weights(module).items() if ".lora_A" in name]

    batch = next(iter(make_loader()))
    monkeypatch.setattr("lightning.LightningModule.log", lambda *_: None)
    one, two, three = adapters("1", 0), adapters("1", 99), adapters("2", 0)
    assert all(map(torch.equal, one, two))
    assert not any(map(torch.equal, one, three))


def test_named_targets(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    module = make_module()
    part = LoRA(RANK, target_modules=["gate_proj", "mlp.down_proj"])
    make_trainer(max_steps=1, callbacks=[TrainLayers([2], part), zeroth_order()]).fit(module, make_loader())
    adapted = {name.split(".lora_")[0] for name in weights(module) if ".lora_" in name}
    assert adapted == {f"network.model.layers.2.mlp.{name}_proj" for name in ("gate", "down")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(0), "`rank` must be an integer, at least 1, got 0"),
        (lambda: LoRA(alpha=0), "`alpha` must be a positive number, got 0"),
        (lambda: LoRA(target_modules=[]), "`target_modules` is empty"),
        (
            lambda: LoRA(target_modules=["q_proj", "query"]),
            r"`target_modules` matches nothing for query in layer 1 of .* linear maps are self_attn.q_proj, ",
        ),
    ],
)
def test_what_is_refused(
    make: Callable[[], LoRA], message: str, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=1, callbacks=[TrainLayers([1], make()), zeroth_order()]).fit(
            make_module(), make_loader()
        )


def test_models_without_adapters(
    make_module: Any, make_loader: Any, make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    callbacks = [TrainLayers([0], LoRA(), layers_name="net"), zeroth_order()]
    with pytest.raises(ValueError, match="`part` is LoRA, which needs a PreTrainedModel of transformers around `net`"):
        make_trainer(max_steps=1, callbacks=callbacks).fit(make_regression(), regression_data())
    module = make_module()
    module.network.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="`target_modules` has no default for unheard-of in layer 1"):
        make_trainer(max_steps=1, callbacks=[TrainLayers([1], LoRA()), zeroth_order()]).fit(module, make_loader())


def test_experts_are_not_adapted_in_place_of_a_linear_map() -> None:
    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 2}
    config = AutoConfig.for_model("qwen3_moe", **sizes, num_key_value_heads=1, head_dim=4, mlp_only_layers=[0])
    for attribute in ("intermediate_size", "moe_intermediate_size"):
        setattr(config, attribute, 8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"PEFT adapts down_proj of all experts of a Qwen3MoeForCausalLM"):
        add_adapter(model, lora_settings(2, 4.0, ["model.layers.0.mlp.down_proj"]))


def test_a_second_fit_goes_on_with_the_same_adapter_and_refuses_another(
    make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    module = make_module()
    fit = partial(make_trainer, max_steps=2)
    fit(callbacks=[TrainLayers("all", LoRA(RANK)), zeroth_order()]).fit(module, make_loader())
    first = weights(module)
    fit(callbacks=[TrainLayers("all", LoRA(RANK)), zeroth_order()]).fit(module, make_loader())
    second = weights(module)
    assert first.keys() == second.keys()
    assert {name for name in first if not torch.equal(first[name], second[name])} == {n for n in first if ".lora_" in n}
    with pytest.raises(ValueError, match=r"`part` is LoRA\(rank=5.*has another adapter already: r 4, not 5\. Load"):
        fit(callbacks=[TrainLayers("all", LoRA(5)), zeroth_order()]).fit(module, make_loader())


def lora(layer: int = 1, rank: int = RANK) -> TrainLayers:
    return TrainLayers([layer], LoRA(rank))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resuming_equals_not_stopping(train: Callable[..., Any], folder: Path, precision: str) -> None:
    whole, *_ = train(lora(), precision=precision)
    for scope in (lora(), lora(layer=0), lora(rank=2), TrainLayers("all")):
        resumed, *_ = train(scope, ckpt_path=folder / "two.ckpt", precision=precision)
        assert adapter_settings(resumed.model) == adapter_settings(whole.model)
        expected, got = weights(whole), weights(resumed)
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_checkpoint_is_tested_without_the_scope(
    train: Callable[..., Any], folder: Path, make_trainer: Callable[..., L.Trainer]
) -> None:
    model, trainer, data = train(lora())
    trainer.save_checkpoint(folder / "end.ckpt")
    (expected,) = trainer.test(model, data, verbose=False)
    (again,) = trainer.test(model, data, ckpt_path=folder / "end.ckpt", verbose=False)
    fresh = CausalLM(str(folder / "model"))
    (without,) = make_trainer().test(fresh, data, verbose=False)
    (restored,) = make_trainer().test(fresh, data, ckpt_path=folder / "end.ckpt", verbose=False)
    assert expected == again == restored != without

    model, trainer, _ = train(TrainLayers([1]))
    trainer.save_checkpoint(folder / "plain.ckpt")
    make_trainer().test(fresh, data, ckpt_path=folder / "plain.ckpt", verbose=False)
    assert adapter_settings(fresh.model) is None
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_checkpoint_holds_plain_values(train: Callable[..., Any], folder: Path) -> None:
    train(lora())
    checkpoint = torch.load(folder / "two.ckpt", weights_only=True)
    assert checkpoint["adapter"] == {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16.0,
        "target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"],
    }
    assert checkpoint["scope"]["layers"] == [1]
    assert all(".lora_" in name and part is None for name, part in checkpoint["scope"]["parameters"].items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
@pytest.mark.parametrize("scope", [lora(), TrainLayers("all", LoRA(RANK, alpha=32.0))])
def test_an_export_loads_with_peft_and_scores_the_same(
    scope: TrainLayers, train: Callable[..., Any], folder: Path
) -> None:
    model, _, data = train(scope)
    model.export(folder / "export")
    assert (folder / "export/adapter_model.safetensors").stat().st_size < 50_000
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    loaded = PeftModel.from_pretrained(base, folder / "export").eval()
    straight = AutoPeftModelForCausalLM.from_pretrained(folder / "export").eval()  # finds the base model by itself
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        expected = answer_log_probs(model.model.eval(), batch)[0]
        assert torch.equal(answer_log_probs(straight.base_model.model, batch)[0], expected)
        assert torch.equal(answer_log_probs(loaded.base_model.model, batch)[0], expected)
        remove_adapter(model.model)
        assert not torch.equal(answer_log_probs(model.model, batch)[0], expected)


def test_dominant_layer_with_adapters(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    module = make_module("llama", outlier=2)
    make_trainer(max_steps=1, callbacks=[DominantLayer(LoRA(RANK)), zeroth_order()]).fit(module, make_loader())
    adapted = {name.split(".")[3] for name in weights(module) if ".lora_" in name}
    assert adapted == {"2"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("trains", [zeroth_order, None], ids=["zeroth-order", "backpropagation"])
def test_the_massive_direction_of_a_layer_trains_and_nothing_else(
    architecture: str, trains: Any, make_module: Any, make_loader: Any, make_batches: Any, make_trainer: Any
) -> None:
    module = make_module(architecture)
    before, down, inputs = weights(module), mlp_of(find_layers(module).layers[2]).down, []
    hook = down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    (batch,) = make_batches(size=6)
    calibration_forward(module, batch)
    hook.remove()
    leading = torch.linalg.svd(inputs[0][batch["attention_mask"].bool()]).Vh[0]  # without padding

    callbacks = [DominantLayer(MassiveDirection(), layer=2), *([] if trains is None else [trains()])]
    trainer = make_trainer(max_steps=3, callbacks=callbacks)
    trainer.fit(module, make_loader())

    after = weights(module)
    (fixed,) = (after[name] for name in after if ".lora_A" in name)
    (trained,) = (after[name] for name in after if ".lora_B" in name)
    assert abs((fixed[0] @ leading).item()) == pytest.approx(1, abs=1e-5)
    assert fixed.norm().item() == pytest.approx(1, abs=1e-5)
    assert trained.shape == (HIDDEN, 1) and trained.all()
    base = {name.replace(".base_layer", ""): weight for name, weight in after.items() if ".lora_" not in name}
    assert all(torch.equal(base[name], before[name]) for name in before)
