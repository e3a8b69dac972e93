"""The head alone: untied where it is tied, trained, resumed, exported."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from training import num_trained, zeroth_order
from zolightning import CausalLM
from zolightning.callbacks import TrainLayers, ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.models import Seq2SeqLM, answer_log_probs
from zolightning.network.head import has_untied_head
from zolightning.optim import MeZO
from zolightning.scopes import LoRA, TrainHead

TIED = {"opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte", "gemma3_text": "model.embed_tokens"}
HEADS = {"bert": {"classifier.weight", "classifier.bias"}}


@pytest.mark.parametrize("untie", [True, False])
def test_the_head_trains_and_nothing_else(
    architecture: str, untie: bool, make_module: Any, make_loader: Any, make_trainer: Any
) -> None:
    module = make_module(architecture)
    before = {name: weight.clone() for name, weight in module.network.state_dict().items()}
    trainer = make_trainer(max_steps=2, callbacks=[TrainHead(untie=untie), zeroth_order()])
    trainer.fit(module, make_loader())

    after = module.network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    tied = {f"{TIED[architecture]}.weight"} if architecture in TIED and not untie else set()
    assert moved == HEADS.get(architecture, {"lm_head.weight"}) | tied
    assert num_trained(trainer) == sum(after[name].numel() for name in moved - tied)
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_lies_below_runs_once_a_step(make_module: Any, make_loader: Any, make_trainer: Any) -> None:
    def runs_of_the_first_layer(steps: int) -> int:
        module, runs = make_module("gpt2"), []
        first = module.network.transformer.h[0]
        own = first.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return own(*args, **kwargs)

        first.forward = counted
        callbacks = [TrainHead(), ZerothOrder(partial(MeZO, lr=1e-2, num_queries=3))]  # 6 evaluations
        make_trainer(max_steps=steps, callbacks=callbacks).fit(module, make_loader())
        return len(runs)

    assert runs_of_the_first_layer(4) - runs_of_the_first_layer(1) == 3


def test_a_tied_head_is_untied_in_checkpoints_and_exports(
    train: Callable[..., Any], folder: Path, make_trainer: Callable[..., L.Trainer], write_tiny_model: Any
) -> None:
    write_tiny_model(folder / "model", "opt")
    model, trainer, data = train(TrainHead(), precision="bf16-true")
    resumed, *_ = train(TrainHead(), ckpt_path=folder / "two.ckpt", precision="bf16-true")
    expected = model.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed.state_dict().items())

    trainer.save_checkpoint(folder / "end.ckpt")
    (expected_metrics,) = trainer.test(model, data, verbose=False)
    fresh = CausalLM(str(folder / "model"))
    plain = make_trainer(precision="bf16-true")
    (found,) = plain.test(fresh, data, ckpt_path=folder / "end.ckpt", verbose=False)
    assert found == expected_metrics
    fresh.load_structure_dict({})  # as of a checkpoint of a run that trained something else
    assert not has_untied_head(fresh.model)
    assert fresh.model.lm_head.weight is fresh.model.get_input_embeddings().weight

    model.export(folder / "export")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad():
        assert torch.equal(answer_log_probs(loaded, batch)[0], answer_log_probs(model.model.eval(), batch)[0])


def test_what_is_refused(make_module: Any, make_loader: Any, make_trainer: Any, make_regression: Any) -> None:
    def fit(module: L.LightningModule) -> None:
        make_trainer(max_steps=1, callbacks=[TrainHead(), zeroth_order()]).fit(module, make_loader())

    with pytest.raises(ValueError, match="`scope` is TrainHead, which needs a PreTrainedModel of transformers"):
        fit(make_regression())
    module = make_module()
    module.network = module.network.base_model
    with pytest.raises(ValueError, match="LlamaModel has no parameters beyond its base model"):
        fit(module)
    module = make_module()
    make_trainer(max_steps=1, callbacks=[TrainLayers("all", LoRA(2)), zeroth_order()]).fit(module, make_loader())
    with pytest.raises(ValueError, match="`scope` is TrainHead, but the model has an adapter"):
        fit(module)


def test_an_encoder_decoder_trains_a_head_that_it_does_not_share(
    folder: Path, make_trainer: Callable[..., L.Trainer], write_tiny_model: Any
) -> None:
    tied, untied = str(write_tiny_model(folder / "model", "t5")), str(folder / "untied")  # as of T5, and of FLAN-T5
    config = AutoConfig.from_pretrained(tied, tie_word_embeddings=False)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(untied)
    AutoTokenizer.from_pretrained(tied).save_pretrained(untied)
    data = PromptDataModule("sst2", path=str(folder), num_train=12, num_validation=4, num_test=8, batch_size=4)

    def moved(name: str, **scope: Any) -> set[str]:
        module = Seq2SeqLM(name)
        before = {name: weight.clone() for name, weight in module.model.named_parameters()}
        callbacks = [TrainHead(**scope), zeroth_order()]
        make_trainer(max_steps=1, limit_val_batches=0, callbacks=callbacks).fit(module, data)
        return {name for name, weight in module.model.named_parameters() if not weight.equal(before[name])}

    assert moved(untied) == {"lm_head.weight"}
    assert moved(tied, untie=False) == {"shared.weight"}
    with pytest.raises(ValueError, match="head of T5ForConditionalGeneration cannot be untied from its embeddings"):
        moved(tied)
