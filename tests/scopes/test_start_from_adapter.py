"""Adapters of PEFT's folders as starting points."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zolightning import CausalLM
from zolightning.callbacks import TrainLayers
from zolightning.models.scoring import last_logits
from zolightning.scopes import LoRA

# PEFT 0.21 with transformers 5.23
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

IDS = torch.tensor([[5, 9, 3, 22], [0, 7, 7, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return last_logits(model, IDS, torch.ones_like(IDS), count=2)


@pytest.fixture
def write_adapter(folder: Path) -> Callable[..., Path]:
    """Saves an adapter of random values that PEFT alone made."""

    def write(config: Any, target: str = "adapter") -> Path:
        base = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.manual_seed(3)
        model = get_peft_model(base, config)
        for name, weight in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                torch.nn.init.normal_(weight, std=0.1)
        model.save_pretrained(folder / target)
        return folder / target

    return write


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=3, use_rslora=True, rank_pattern={"q_proj": 2}, target_modules="all-linear"),
        LoraConfig(r=2, use_dora=True, target_modules=r".*\.1\.mlp\.up_proj"),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),  # PEFT's file repeats the embeddings
    ],
    ids=["dropout", "rslora", "dora", "embeddings"],
)
def test_training_begins_with_it_and_ends_in_peft(
    config: LoraConfig, write_adapter: Any, train: Callable[..., Any], folder: Path
) -> None:
    adapter = write_adapter(config)
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    expected = logits(PeftModel.from_pretrained(base, adapter).eval().base_model.model)
    model = CausalLM(str(folder / "model"), adapter=str(adapter))
    assert torch.equal(logits(model.model.eval()), expected)

    model, *_ = train(adapter=str(adapter))
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained and trained == {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    resumed, *_ = train(adapter=str(adapter), ckpt_path=folder / "two.ckpt")
    without, *_ = train(TrainLayers("all", LoRA(1)), ckpt_path=None)
    without.load_structure_dict(resumed.structure_dict())  # as for its checkpoints
    without.load_state_dict(resumed.state_dict())
    model.export(folder / "export")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    exported = logits(PeftModel.from_pretrained(base, folder / "export").eval().base_model.model)
    assert not torch.equal(exported, expected)
    for one in (model, resumed, without):
        assert torch.equal(logits(one.model.eval()), exported)


def test_a_scope_of_the_same_settings_goes_on_with_it(
    write_adapter: Any, train: Callable[..., Any], folder: Path
) -> None:
    adapter = write_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]))
    by_scope, *_ = train(TrainLayers("all", LoRA(3, 6.0)), adapter=str(adapter))
    by_itself, *_ = train(adapter=str(adapter))
    expected = by_itself.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in by_scope.state_dict().items())
    with pytest.raises(ValueError, match=r"another adapter already: lora_alpha 6, not 16\.0\. Load"):
        train(TrainLayers("all", LoRA(3)), adapter=str(adapter))


def damaged(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        weights = load_file(adapter / "adapter_model.safetensors")
        change(config, weights)
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        save_file(weights, adapter / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "is not a folder of PEFT's: it needs adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "is not a folder of PEFT's"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read: JSONDecodeError"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 20), "cannot be read: SafetensorError"),
        (damaged(lambda c, _: c.update(peft_type="NEW")), "cannot be read: "),
        (damaged(lambda c, _: c.update(bias="all")), "has bias 'all': it changes more than LoRA adds"),
        (damaged(lambda c, _: c.update(modules_to_save=["lm_head"])), r"has modules_to_save \['lm_head'\]"),
        (damaged(lambda c, _: c.update(init_lora_weights="pissa")), "has init_lora_weights 'pissa'"),
        (damaged(lambda c, _: c.update(target_modules=["c_attn"])), "does not fit LlamaForCausalLM .*: Target modules"),
        (damaged(lambda _, w: w.pop(Q)), "does not fit LlamaForCausalLM .*: 1 weights .*layers.0.self_attn.q_proj"),
        (damaged(lambda _, w: w.update({Q: torch.zeros(2, 16)})), "does not fit LlamaForCausalLM .*: 1 weights"),
    ],
)
def test_folders_that_are_refused(spoil: Callable[[Path], Any], message: str, write_adapter: Any, folder: Path) -> None:
    adapter = write_adapter(LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    spoil(adapter)
    with pytest.raises(ValueError, match=f"`adapter` '{adapter}' {message}") as refused:
        CausalLM(str(folder / "model"), adapter=str(adapter))
    assert "\n" not in str(refused.value)


def test_embeddings_of_an_adapter_s_own_are_refused(write_adapter: Any, folder: Path) -> None:
    adapter = write_adapter(LoraConfig(r=2, target_modules=["embed_tokens"]))
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    damaged(lambda _, weights: weights[name].add_(1))(adapter)
    with pytest.raises(ValueError, match=r"has a model.embed_tokens.base_layer.weight of shape .*, which is not the"):
        CausalLM(str(folder / "model"), adapter=str(adapter))


def test_what_is_no_adapter(write_adapter: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`adapter` './nowhere' is a path, but no folder is there"):
        CausalLM(str(folder / "model"), adapter="./nowhere")
    other = write_adapter(IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is of PEFT's type IA3; LORA and PREFIX_TUNING are supported"):
        CausalLM(str(folder / "model"), adapter=str(other))
