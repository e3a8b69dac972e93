"""Models that would score an answer they read, or a row by its neighbours, are refused before the first step."""

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BertConfig, MambaConfig, PretrainedConfig, RobertaConfig, RwkvConfig

from zolightning.models import CausalLM
from zolightning.models.scoring import last_logits
from zolightning.models.suitability import refuse_unsuitable

SIZES = {"vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}


class Batches(L.LightningDataModule):
    """The same batch in every stage."""

    num_classes = 2

    def __init__(self, batch: dict) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch], batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def make(config: PretrainedConfig):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_are_accepted_as_they_were(architecture, make_model, dtype):
    model = make_model(architecture).to(dtype).train()
    state = torch.get_rng_state()
    refuse_unsuitable(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_decoders_and_recurrent_models_that_honour_the_mask_are_accepted():
    refuse_unsuitable(make(BertConfig(**SIZES, **HEADS, is_decoder=True)))
    refuse_unsuitable(make(MambaConfig(**SIZES)))


@torch.no_grad()
def test_positions_of_roberta_begin_after_that_of_padding(monkeypatch):
    model, ids = (
        make(RobertaConfig(**SIZES, **HEADS, is_decoder=True, initializer_range=0.3)).eval(),
        torch.arange(9, 17),
    )
    logits = last_logits(model, ids[None], torch.ones(1, 8, dtype=torch.long), count=8)
    torch.testing.assert_close(logits, model(ids[None]).logits)
    refuse_unsuitable(model)
    monkeypatch.setattr("zolightning.models.scoring._first_position", lambda _: 0)
    with pytest.raises(MisconfigurationException, match="does not mask padding"):
        refuse_unsuitable(model)


@pytest.mark.parametrize("config", [BertConfig(**SIZES, **HEADS), RobertaConfig(**SIZES, **HEADS)])
def test_bidirectional_attention_is_refused(config):
    with pytest.raises(MisconfigurationException, match=r"see those after them.*`is_decoder`"):
        refuse_unsuitable(make(config))


def test_scores_that_depend_on_padding_are_refused():
    with pytest.raises(MisconfigurationException, match="RwkvForCausalLM, which does not mask padding"):
        refuse_unsuitable(make(RwkvConfig(**SIZES)))


def test_values_that_float16_cannot_hold_are_refused(make_model):
    model = make_model().half()
    refuse_unsuitable(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    with pytest.raises(MisconfigurationException, match="float16 cannot hold: use bfloat16"):
        refuse_unsuitable(model)
    refuse_unsuitable(model.bfloat16())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_run_refuses_first(stage, tiny_folder, make_trainer, make_batch):
    make(BertConfig(**SIZES, **HEADS)).save_pretrained(tiny_folder)
    module = CausalLM(str(tiny_folder))
    batch = make_batch([([5, 9, 3], [[6], [11]])], [1], prompt_only=True)
    trainer = make_trainer(max_steps=1)
    with pytest.raises(MisconfigurationException, match="read the answers"):
        getattr(trainer, stage)(module, datamodule=Batches(batch))
    assert trainer.global_step == 0
