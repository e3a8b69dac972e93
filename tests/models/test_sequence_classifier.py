"""Classifiers of texts: scores and losses are those that transformers computes for each text alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    CanineConfig,
    CanineForSequenceClassification,
    FunnelConfig,
    FunnelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from masked_models import ARCHITECTURES, tiny_tokenizer, write_tiny
from zolightning.callbacks import LinearProbing, ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.data.batch import collate
from zolightning.data.bidirectional import encode_for_classifier
from zolightning.data.templates import MASK, SEPARATOR
from zolightning.models import MaskedLM, SequenceClassifier
from zolightning.models.correlation import Pearson, Spearman
from zolightning.models.loading import load_model
from zolightning.models.suitability import refuse_reading_padding
from zolightning.optim import MeZO
from zolightning.scopes import LoRA, TrainHead, TrainLayers

TASK = {"name": "nli", "prompt": "{{ one }}{{ sep }}{{ two }}", "answers": ["no", "yes", "maybe"], "labels": [0, 1, 2]}
ROWS = [("Ann left.", "Someone left."), ("It rains, and it rains on and on.", "It is dry."), ("No.", "Who?")]
HEAD = "AutoModelForSequenceClassification"


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PromptDataModule]:
    def make(**task: Any) -> PromptDataModule:
        rows = [{"one": one, "two": two, "label": label} for label, (one, two) in enumerate(ROWS)]
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return PromptDataModule(TASK | task, str(tmp_path), batch_size=3)

    return make


def logits_of(folder: Path, *texts: str) -> torch.Tensor:
    """Those of one text, or two, by transformers alone."""
    inputs = AutoTokenizer.from_pretrained(folder)(*texts, return_tensors="pt")
    with torch.no_grad():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits[0]


def write_llama(folder: Path) -> Path:
    """One that reads from left to right, and whose config knows no token for padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3, num_labels=3)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "llama"])
def test_logits_of_a_batch_are_those_of_each_pair_alone(architecture: str, tmp_path: Path) -> None:
    is_llama = architecture == "llama"
    folder = write_llama(tmp_path) if is_llama else write_tiny(tmp_path, architecture, HEAD, num_labels=3)
    module = SequenceClassifier(str(folder))
    examples = [
        encode_for_classifier(module.tokenizer, SEPARATOR.join(row), 3, label=1, id=0, max_length=256) for row in ROWS
    ]
    batch = collate(examples, 1, "classification", padding_side=module.padding_side)
    module.refuse_unsuitable()
    module.model.eval()
    with torch.no_grad():
        scores = module.score(batch)
    expected = torch.stack([logits_of(folder, *row) for row in ROWS])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_classifier_that_reads_the_end_of_a_text_is_accepted() -> None:
    sizes = {f"{part}_{size}": 2 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64}
    tokenizer = tiny_tokenizer()
    model = BartForSequenceClassification(BartConfig(vocab_size=len(tokenizer), init_std=0.3, **widths, **sizes))
    refuse_reading_padding(model, tokenizer, lambda ids, mask: model(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_a_classifier_that_pools_a_token_with_padding_is_refused() -> None:
    """Only a text with an odd number of tokens, or one token of padding, shows it."""
    tokenizer = tiny_tokenizer()
    sizes = {"block_sizes": [1, 1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "initializer_std": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FunnelForSequenceClassification(FunnelConfig(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(MisconfigurationException, match="FunnelForSequenceClassification, which does not mask padding"):
        refuse_reading_padding(model, tokenizer, lambda ids, mask: model(ids, attention_mask=mask).logits)


def test_a_classifier_of_hashed_characters_is_refused() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    model = CanineForSequenceClassification(CanineConfig(num_hash_functions=2, num_hash_buckets=8, **sizes))
    with pytest.raises(
        MisconfigurationException, match="CanineForSequenceClassification, which has no table of the emb"
    ):
        refuse_reading_padding(model, tiny_tokenizer(), lambda ids, mask: model(ids, attention_mask=mask).logits)


def test_a_new_head_is_drawn_said_and_trained(
    tmp_path: Path,
    data: Callable[..., PromptDataModule],
    make_trainer: Callable[..., L.Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_tiny(tmp_path / "model", "bert")  # a masked language model, without a pooler
    said: list[str] = []
    monkeypatch.setattr("zolightning.models.loading.rank_zero_info", said.append)
    module, again = (SequenceClassifier(str(folder), num_classes=3) for _ in range(2))
    assert said[0].startswith("BertForSequenceClassification has a new head of 3 classes: bert.pooler.dense.bias")
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))
    module.export(tmp_path / "exported")
    expected = torch.stack([logits_of(tmp_path / "exported", *row) for row in ROWS])
    labels = torch.arange(3)
    trainer = make_trainer(max_steps=2, callbacks=[ZerothOrder(partial(MeZO, lr=0.01))], limit_val_batches=0)
    (metrics,) = make_trainer().validate(module, data(), verbose=False)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
    assert metrics["val/accuracy"] == pytest.approx((expected.argmax(-1) == labels).float().mean().item())
    trainer.fit(module, data())
    assert not module.model.classifier.weight.equal(again.model.classifier.weight)


def test_the_objective_accuracy_is_the_share_of_wrong_classes(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = SequenceClassifier(str(write_tiny(tmp_path / "model", "roberta", HEAD, num_labels=3)))
    right = [logits_of(tmp_path / "model", *row).argmax().item() == label for label, row in enumerate(ROWS)]
    trainer = make_trainer(max_steps=1, callbacks=[ZerothOrder(partial(MeZO, lr=1e-9, eps=1e-9))], limit_val_batches=0)
    trainer.fit(module, data(objective="accuracy"))
    assert trainer.logged_metrics["train/loss"] == pytest.approx(1 - sum(right) / 3)


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder = write_tiny(tmp_path / "model", "roberta", HEAD, num_labels=2)
    validate = partial(make_trainer().validate, SequenceClassifier(str(folder)), verbose=False)
    with pytest.raises(MisconfigurationException, match="head of `model_name` has 2 classes, but the task 3"):
        validate(data())
    with pytest.raises(ValueError, match="needs a task with `answers` and the objective classification"):
        validate(data(objective="language_modeling"))
    for prompt in (f"a{SEPARATOR}b{SEPARATOR}c", f"a{MASK}"):
        with pytest.raises(ValueError, match="reads a text, or two"):
            encode_for_classifier(tiny_tokenizer(), prompt, 2, label=0, id=0, max_length=64)
    unknown = tiny_tokenizer()
    unknown.add_special_tokens({"pad_token": "<padding>"})
    unknown.save_pretrained(folder)
    with pytest.raises(MisconfigurationException, match="'<padding>', has the id"):
        SequenceClassifier(str(folder)).refuse_unsuitable()
    bare = tiny_tokenizer()
    bare.backend_tokenizer.post_processor = TemplateProcessing("$A", "$A $B", [])
    with pytest.raises(ValueError, match="the text is empty"):
        encode_for_classifier(bare, "", 2, label=0, id=0, max_length=64)
    long = encode_for_classifier(tiny_tokenizer(), "abcd" * 9, 2, label=0, id=0, max_length=8)
    assert long.truncated and long.prompt_ids == tiny_tokenizer()("abcdab")["input_ids"]
    with pytest.raises(ValueError, match=r"3 tokens .* do not hold a token of the text: at least 5 are needed"):
        encode_for_classifier(tiny_tokenizer(), f"a{SEPARATOR}b", 2, label=0, id=0, max_length=3)
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, or 1 for a number, got 0"):
        SequenceClassifier(str(folder), num_classes=0)
    with pytest.raises(ValueError, match=r"lacks 4 weights of RobertaForSequenceClassification .*num_classes"):
        SequenceClassifier(str(write_tiny(tmp_path / "headless")))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
def test_the_head_trains_with_adapters_and_is_exported_with_them(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder = write_tiny(tmp_path / "model", "bert")
    module = SequenceClassifier(str(folder), num_classes=3)
    before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
    callbacks = [TrainLayers("all", part=LoRA(rank=2)), ZerothOrder(partial(MeZO, lr=0.01))]
    make_trainer(max_steps=2, callbacks=callbacks, limit_val_batches=0).fit(module, data())
    after = {name.replace(".base_layer", ""): weight for name, weight in module.model.state_dict().items()}
    moved = {name for name, weight in before.items() if not weight.equal(after[name])}
    assert moved == set(module.head_parameters) > {"classifier.weight", "bert.pooler.dense.weight"}

    module.export(tmp_path / "exported")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    elsewhere = PeftModel.from_pretrained(base, tmp_path / "exported").eval()
    assert elsewhere.peft_config["default"].task_type == "SEQ_CLS"
    again = SequenceClassifier(str(folder), num_classes=3, adapter=str(tmp_path / "exported"))
    assert all(weight.equal(again.model.state_dict()[name]) for name, weight in module.model.state_dict().items())
    assert {name for name, p in again.model.named_parameters() if p.requires_grad} > module.head_parameters.keys()
    with pytest.raises(ValueError, match=r"does not fit BertForSequenceClassification .*: 2 weights .*classifier.bias"):
        SequenceClassifier(str(folder), num_classes=2, adapter=str(tmp_path / "exported"))
    module.model.eval()
    for row in ROWS:
        inputs = module.tokenizer(*row, return_tensors="pt")
        with torch.no_grad():
            torch.testing.assert_close(elsewhere(**inputs).logits, module.model(**inputs).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT 0.21 with transformers 5.23
def test_the_head_trains_with_an_adapter_to_start_from(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "bert")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    get_peft_model(base, LoraConfig(r=2, target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^it is an adapter, not a model\."):
        load_model(tmp_path / "adapter", HEAD, num_classes=3)
    module = SequenceClassifier(str(folder), num_classes=3, adapter=str(tmp_path / "adapter"))
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert module.head_parameters.keys() < trained
    assert all(".lora_" in name for name in trained - module.head_parameters.keys())


def test_correlations_of_numbers_that_differ_little(make_trainer: Callable[..., L.Trainer]) -> None:
    """As those of a new head do; under bf16-true sums of them, or they themselves, would be of bfloat16."""

    class Says(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.pearson, self.spearman = Pearson(), Spearman()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            for name, metric in {"pearson": self.pearson, "spearman": self.spearman}.items():
                metric.update(0.3 + batch[:, 0].float() / 1024, batch[:, 1])
                self.log(name, metric)

    rows = torch.randint(16, (40, 2))  # whole numbers, which no dtype rounds
    (metrics,) = make_trainer(precision="bf16-true").validate(Says(), DataLoader(rows, 8), verbose=False)
    assert metrics["pearson"] == pytest.approx(torch.corrcoef(rows.T.double())[0, 1].item(), abs=1e-5)
    below, equal = ((rows[:, None] > rows).sum(1), (rows[:, None] == rows).sum(1))
    ranks = below + (equal + 1) / 2
    assert metrics["spearman"] == pytest.approx(torch.corrcoef(ranks.T.double())[0, 1].item(), abs=1e-5)


def test_a_number_is_not_probed() -> None:
    module = SimpleNamespace(head_features=None, set_head_rows=None, says_number=True)
    with pytest.raises(MisconfigurationException, match=r"`linear_probing` is given, which fits a row .* a number"):
        LinearProbing().check(L.Trainer(logger=False, enable_checkpointing=False), module)  # type: ignore[arg-type]


def test_a_head_of_one_output_says_a_number(
    tmp_path: Path, make_trainer: Callable[..., L.Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, targets = write_tiny(tmp_path / "model", "bert"), [0.5, "3.75", 2]
    for split, rows in {"train": ROWS, "validation": ROWS, "test": ROWS}.items():
        lines = [{"one": one, "two": two, "how": how} for (one, two), how in zip(rows, targets, strict=True)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {"name": "likeness", "prompt": "{{ one }}{{ sep }}{{ two }}", "target": "how"}
    data = partial(PromptDataModule, task, str(tmp_path), batch_size=3)
    module = SequenceClassifier(str(folder), num_classes=1)
    module.export(tmp_path / "exported")
    said = torch.cat([logits_of(tmp_path / "exported", *row) for row in ROWS]).double()
    right = torch.tensor([0.5, 3.75, 2]).double()
    (metrics,) = make_trainer().validate(module, data(), verbose=False)
    assert metrics["val/loss"] == pytest.approx((said - right).square().mean().item(), rel=1e-4)
    assert metrics["val/pearson"] == pytest.approx(torch.corrcoef(torch.stack([said, right]))[0, 1].item(), abs=1e-4)
    ranks = torch.stack([said.argsort().argsort(), right.argsort().argsort()])
    assert metrics["val/spearman"] == pytest.approx(torch.corrcoef(ranks.double())[0, 1].item(), abs=1e-4)
    (outputs,) = make_trainer().predict(module, data())
    assert sorted(outputs["prediction"].tolist()) == pytest.approx(sorted(said.tolist()), rel=1e-3)

    callbacks = [ZerothOrder(partial(MeZO, lr=0.01, num_queries=2), evaluations_per_forward=2)]
    trainer, fitted = make_trainer(max_steps=3, callbacks=callbacks, limit_val_batches=0), data()
    trainer.fit(module, fitted)
    assert fitted.sample_text().endswith("Who? [[2]]")
    assert trainer.callback_metrics["train/loss"] < metrics["val/loss"]
    assert module.model.config.problem_type == "regression"

    with pytest.raises(MisconfigurationException, match=r"has 3 classes, but the task 1: set `model.num_classes`"):
        make_trainer().validate(SequenceClassifier(str(folder), num_classes=3), data(), verbose=False)
    with pytest.raises(ValueError, match=r"likeness, .*`target` is a number, which needs SequenceClassifier"):
        make_trainer().validate(MaskedLM(str(folder)), data(), verbose=False)
    for number in ('"much"', "1e300", "1" + "0" * 400):  # the loss would be infinite
        (tmp_path / "test.jsonl").write_text(f'{{"one": "a", "two": "b", "how": {number}}}\n')
        with pytest.raises(
            ValueError, match=r"test.jsonl, line 1: field `how` must be a number, at most 3.4e\+38, got"
        ):
            make_trainer().test(module, data(), verbose=False)


def test_numbers_are_not_rounded_with_a_batch(tmp_path: Path) -> None:
    module = SequenceClassifier(str(write_tiny(tmp_path, "bert")), num_classes=1)
    examples = [encode_for_classifier(module.tokenizer, "a", 1, label=0, id=0, max_length=64)] * 3
    numbers = [1987.25, -0.1, None]
    examples = [replace(example, target=number) for example, number in zip(examples, numbers, strict=True)]
    batch = HalfPrecision("bf16-true").convert_input(collate(examples, 1, "regression"))
    label = module.label(batch)
    assert label[:2].tolist() == pytest.approx(numbers[:2], rel=1e-7) and label[2].isnan()


@pytest.mark.parametrize(
    ("own", "answers", "labels", "expected"),
    [
        (None, [" no", " yes", " maybe"], [0, 1, 2], ["no", "yes", "maybe"]),
        (None, ["no", "yes", "maybe"], ["0", "1", "2"], ["no", "yes", "maybe"]),
        (None, ["{{ one }}", "yes", "maybe"], [0, 1, 2], ["0", "1", "2"]),
        (["against", "for", "neither"], ["no", "yes", "maybe"], [0, 1, 2], ["against", "for", "neither"]),
        (["against", "for", "neither"], ["no", "yes", "maybe"], ["N", "Y", "M"], ["N", "Y", "M"]),
        (["N", "Y", "M"], ["no", "yes", "maybe"], ["N", "Y", "M"], ["N", "Y", "M"]),
    ],
)
def test_classes_keep_the_names_of_the_data_or_the_checkpoint(
    own: list[str] | None, answers: list[str], labels: list[Any], expected: list[str], tmp_path: Path
) -> None:
    names = {} if own is None else {"id2label": dict(enumerate(own))}
    module = SequenceClassifier(str(write_tiny(tmp_path, "roberta", HEAD, num_labels=3, **names)))
    module._name_classes(PromptDataModule(TASK | {"answers": answers, "labels": labels}, str(tmp_path)).task)
    module.load_structure_dict(module.structure_dict())
    assert module.model.config.id2label == dict(enumerate(expected))
    assert module.model.config.label2id == {name: number for number, name in enumerate(expected)}


def test_labels_in_another_order_than_the_classes_of_the_head_are_warned_of(tmp_path: Path) -> None:
    names = dict(enumerate(["against", "for", "neither"]))
    module = SequenceClassifier(str(write_tiny(tmp_path, "roberta", HEAD, num_labels=3, id2label=names)))
    task = PromptDataModule(TASK | {"labels": ["For", "Neither", "Against"]}, str(tmp_path)).task
    with pytest.warns(UserWarning, match=r"have another order, .*, which is used"):
        module._name_classes(task)


def test_the_head_is_the_same_for_every_scope(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = SequenceClassifier(str(write_tiny(tmp_path / "model", "bert")), num_classes=3)
    before = {name: weight.clone() for name, weight in module.model.state_dict().items()}
    callbacks = [TrainHead(), ZerothOrder(partial(MeZO, lr=0.01))]
    make_trainer(max_steps=1, callbacks=callbacks, limit_val_batches=0).fit(module, data())
    moved = {name for name, weight in module.model.state_dict().items() if not weight.equal(before[name])}
    assert moved == module.head_parameters.keys() > {"bert.pooler.dense.weight"}
