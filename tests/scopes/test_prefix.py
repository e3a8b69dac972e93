"""Prefix tuning: keys and values before the text, trained, resumed, exported, read by PEFT."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from zolightning import CausalLM
from zolightning.callbacks import SubspaceResampling, TrainLayers, ZerothOrder
from zolightning.models.attention_masks import causal_mask
from zolightning.models.scoring import last_logits
from zolightning.network.adapters import adapter_settings, remove_adapter
from zolightning.network.prefix import add_prefix, prefix_of, remove_prefix
from zolightning.optim import LOZO, MeZO, ZOMuon
from zolightning.scopes import LoRA, PrefixTuning

TOKENS = 3
DECODERS = ("llama", "opt", "gpt2", "qwen3", "gemma3_text", "mistral")


def zeroth_order(**evaluation: Any) -> ZerothOrder:
    return ZerothOrder(partial(MeZO, lr=1e-2, eps=1e-1), **evaluation)


def prefix_weight(module: L.LightningModule) -> Tensor:
    (weight,) = (w for name, w in module.named_parameters() if "prompt_encoder" in name)
    return weight.detach().clone()


@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_a_prefix_is_what_tokens_before_the_text_would_be(
    architecture: str, make_module: Any, make_batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of some tokens are what a text that follows these tokens attends to."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    network = make_module(architecture).network.eval()
    tokens = torch.randint(50, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    state = torch.get_rng_state()
    for batch in make_batches(size=3):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        plain = last_logits(network, ids, mask, count=2)
        # padding between the tokens and the text: it is masked, and no position
        before = tokens.expand(len(ids), -1)
        longer, longer_mask = torch.cat([before, ids], 1), torch.cat([torch.ones_like(before), mask], 1)
        expected = last_logits(network, longer, longer_mask, count=2)
        add_prefix(network, TOKENS)
        found = last_logits(network, ids, mask, count=2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)  # as on a GPU
        as_on_gpu = network(input_ids=ids, attention_mask=causal_mask(mask), position_ids=positions).logits[:, -2:]
        torch.testing.assert_close(as_on_gpu, found, rtol=1e-4, atol=1e-4)
        remove_prefix(network)
        assert torch.equal(last_logits(network, ids, mask, count=2), plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", DECODERS)
def test_texts_are_written_after_it(architecture: str, make_module: Any) -> None:
    network = make_module(architecture).network.eval()
    prefix = add_prefix(network, TOKENS)
    ids, mask = torch.tensor([[1, 1, 7, 8], [5, 9, 3, 22]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        prefix.embedding.weight.mul_(1.5)
        written = network.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=49
        )
        for _ in range(5):
            choice = last_logits(network, ids, mask, count=1)[:, 0].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, choice], 1), torch.cat([mask, torch.ones_like(choice)], 1)
    assert torch.equal(written, ids)


@pytest.mark.parametrize(
    ("architecture", "trains"),
    [("llama", zeroth_order), ("opt", zeroth_order), ("gpt2", zeroth_order), ("qwen3", None)],
)
def test_the_prefix_trains_and_nothing_else(
    architecture: str, trains: Any, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    module = make_module(architecture)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    untouched = copy.deepcopy(module)
    callbacks = [PrefixTuning(TOKENS), *([] if trains is None else [trains()])]
    make_trainer(max_steps=2, callbacks=callbacks).fit(module, make_loader())
    add_prefix(untouched.network, TOKENS)
    first, last = prefix_weight(untouched), prefix_weight(module)
    assert last.shape == first.shape and not torch.isclose(last, first).all(dim=1).any()
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    "method", [partial(MeZO, lr=1e-2), partial(LOZO, lr=1e-2, rank=2), partial(ZOMuon, lr=1e-2, rank=2)]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_stacked_evaluations_see_prefixes_of_their_own(
    method: Any, batch_size: int, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    """Also where the prefix has as many tokens as there are rows."""

    def trained(evaluations_per_forward: int) -> Tensor:
        module = make_module()
        evaluation = ZerothOrder(partial(method, num_queries=2), evaluations_per_forward=evaluations_per_forward)
        resampling = [] if method.func is MeZO else [SubspaceResampling()]
        trainer = make_trainer(max_steps=2, callbacks=[PrefixTuning(4), *resampling, evaluation])
        trainer.fit(module, make_loader(batch_size=batch_size))
        return prefix_weight(module)

    torch.testing.assert_close(trained(4), trained(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resuming_equals_not_stopping(train: Callable[..., Any], folder: Path, precision: str) -> None:
    whole, *_ = train(PrefixTuning(TOKENS), precision=precision)
    for scope in (PrefixTuning(TOKENS), PrefixTuning(2), TrainLayers("all", LoRA(2))):
        resumed, *_ = train(scope, ckpt_path=folder / "two.ckpt", precision=precision)
        assert adapter_settings(resumed.model) == adapter_settings(whole.model)
        assert torch.equal(prefix_weight(resumed), prefix_weight(whole))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # and with 5.24
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_an_export_loads_with_peft_and_as_a_starting_point(
    architecture: str, train: Callable[..., Any], folder: Path, write_tiny_model: Callable[..., Path]
) -> None:
    write_tiny_model(folder / "model", architecture)
    model, _, data = train(PrefixTuning(TOKENS))
    model.export(folder / "export")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    loaded = PeftModel.from_pretrained(base, folder / "export").eval()
    straight = AutoPeftModelForCausalLM.from_pretrained(folder / "export").eval()  # finds the base model by itself
    again = CausalLM(str(folder / "model"), adapter=str(folder / "export")).eval()
    assert [name for name, p in again.named_parameters() if p.requires_grad] == [
        "model.prompt_encoder.embedding.weight"
    ]
    batch = next(iter(data.train_dataloader()))
    ids, mask = batch["input_ids"].flatten(0, 1), batch["attention_mask"].flatten(0, 1)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = last_logits(model.model.eval(), ids, mask, count=1)
        assert torch.equal(last_logits(again.model, ids, mask, count=1), expected)
        for by_peft in (loaded, straight):
            logits = by_peft(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1:]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        remove_adapter(model.model)
        assert not torch.allclose(last_logits(model.model, ids, mask, count=1), expected, atol=1e-3)


@pytest.mark.filterwarnings(r"ignore:.* split were cut to 19 tokens \(the model's context length\)")
def test_texts_leave_room_for_it(train: Callable[..., Any], folder: Path) -> None:
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | {"max_position_embeddings": 22}))
    model, _, data = train(PrefixTuning(TOKENS))
    assert data.largest_batch()[1] == 19 and model.context_length == 19


def test_what_is_refused(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    def fit(module: L.LightningModule, scope: L.Callback) -> None:
        make_trainer(max_steps=1, callbacks=[scope, zeroth_order()]).fit(module, make_loader())

    with pytest.raises(ValueError, match="`num_virtual_tokens` must be an integer, at least 1, got 0"):
        PrefixTuning(0)
    with pytest.raises(
        ValueError, match="every layer of a decoder attends to, and BertForSequenceClassification keeps"
    ):
        fit(make_module("bert"), PrefixTuning())
    module = make_module()
    fit(module, PrefixTuning(TOKENS))
    ids = torch.ones(1, 62, dtype=torch.long)  # of 64 positions
    with pytest.raises(ValueError, match=r"A text of 62 tokens after a prefix of 3 is longer than .* context of 64"):
        last_logits(module.network, ids, torch.ones_like(ids), count=1)
    last_logits(module.network, ids[:, :61], torch.ones_like(ids)[:, :61], count=1)
    with pytest.raises(ValueError, match="another adapter already: num_virtual_tokens 3, not 4"):
        fit(module, PrefixTuning(4))
    with pytest.raises(
        ValueError, match=r"`part` is LoRA.* another adapter already: peft_type 'PREFIX_TUNING', not 'LORA'"
    ):
        fit(module, TrainLayers("all", LoRA(2)))
    assert prefix_of(module.network) is not None
