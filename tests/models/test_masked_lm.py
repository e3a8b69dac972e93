"""Masked language models: scores and losses are those that transformers computes for each prompt alone."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer

from masked_models import ARCHITECTURES, WORDS, tiny_tokenizer, write_tiny
from zolightning.callbacks import LinearProbing, SubspaceResampling, ZerothOrder
from zolightning.data import PromptDataModule
from zolightning.data.batch import collate
from zolightning.data.bidirectional import encode_masked
from zolightning.data.encoding import encode
from zolightning.data.examples import example_of
from zolightning.data.row import Row
from zolightning.data.seq2seq import encode_pair
from zolightning.data.task_files import load_task, task_of
from zolightning.data.templates import MASK, SEPARATOR
from zolightning.evaluation.graph_validity import NetworkState
from zolightning.models import MaskedLM
from zolightning.optim import LOZO, MeZO
from zolightning.packaged import configs
from zolightning.scopes import TrainHead, TrainLayers

PROMPT = "{{ text }} It was {{ mask }}."
TASK = {"name": "mood", "prompt": PROMPT, "answers": ["bad", "good"], "labels": ["sad", "glad"], "label": "mood"}
ROWS = [("a plain story told with care", "glad"), ("no", "sad"), ("It goes on and on, and then some", "sad")]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PromptDataModule]:
    def make(**settings: Any) -> PromptDataModule:
        lines = "".join(f'{{"text": "{text}", "mood": "{mood}"}}\n' for text, mood in ROWS * 2)
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text(lines)
        return PromptDataModule(TASK | settings.pop("task", {}), str(tmp_path), batch_size=3, **settings)

    return make


def word_ids() -> list[int]:
    return [id for word in WORDS for id in tiny_tokenizer()(word, add_special_tokens=False)["input_ids"]]


def logits_of(folder: Path, text: str) -> torch.Tensor:
    """Those of a text's mask by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    inputs = tokenizer(text, return_tensors="pt")
    if "token_type_ids" in inputs:  # 0 up to the first separator
        inputs["token_type_ids"][0, inputs["input_ids"][0].tolist().index(tokenizer.sep_token_id) + 1 :] = 1
    with torch.no_grad():
        return model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id][0]


def test_its_hook_is_one_that_graphs_hold(tmp_path: Path) -> None:
    module, found = MaskedLM(str(write_tiny(tmp_path / "model", "bert"))), []
    own, state = module.model.forward, NetworkState(module.model)

    def forward(*args: Any, **kwargs: Any) -> Any:
        found.append((state.hooked(), len(state.hooks())))
        return own(*args, **kwargs)

    module.model.forward = forward
    example = encode_masked(module.tokenizer, f"It was{MASK}.", WORDS, label=1, id=0, max_length=64)
    module.answer_log_probs(collate([example], 1, "classification", padding_side=module.padding_side))
    assert found == [(None, 1)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_a_batch_are_those_of_each_prompt_alone(architecture: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", architecture)
    module, texts = MaskedLM(str(folder)), [f"{text} It was{MASK}." for text, _ in ROWS]
    examples = [encode_masked(module.tokenizer, text, WORDS, label=1, id=0, max_length=64) for text in texts]
    batch = collate(examples, 1, "classification", padding_side=module.padding_side)
    assert batch["attention_mask"][1, 0].tolist() != batch["attention_mask"][0, 0].tolist()
    module.refuse_unsuitable()
    module.model.eval()
    with torch.no_grad():
        log_probs, mask = module.answer_log_probs(batch)
    assert mask.all() and not module.model.base_model._forward_hooks
    for row, (text, _) in enumerate(ROWS):
        expected = logits_of(folder, f"{text} It was<mask>.").log_softmax(-1)[word_ids()]
        torch.testing.assert_close(log_probs[row, :, 0], expected, atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_the_label_words(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder = write_tiny(tmp_path / "model")
    expected = torch.stack([logits_of(folder, f"{text} It was<mask>.")[word_ids()] for text, _ in ROWS])
    labels = torch.tensor([mood == "glad" for _, mood in ROWS]).long()
    (metrics,) = make_trainer().validate(MaskedLM(str(folder)), data(), verbose=False)
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-4)
    assert metrics["val/accuracy"] == pytest.approx((expected.argmax(-1) == labels).float().mean().item())


def test_likelihood_is_that_of_the_whole_vocabulary(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    folder = write_tiny(tmp_path / "model")
    (metrics,) = make_trainer().validate(
        MaskedLM(str(folder)), data(task={"objective": "language_modeling"}), verbose=False
    )
    word = dict(zip(("sad", "glad"), word_ids(), strict=True))
    losses = [-logits_of(folder, f"{text} It was<mask>.").log_softmax(-1)[word[mood]] for text, mood in ROWS]
    assert metrics["val/loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_demonstrations_follow_the_prompt(
    architecture: str, tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """Each behind a separator with its right word in the place of the mask, and for BERT of another type than it."""
    folder = write_tiny(tmp_path / "model", architecture)
    datamodule = data(num_demonstrations=2, num_train=6, num_validation=6, num_test=2)
    (found,) = make_trainer().predict(MaskedLM(str(folder)), datamodule)
    shown = np.random.RandomState(0).permutation(6)[:2]
    after = "".join(
        f"</s>{text} It was {'good' if mood == 'glad' else 'bad'}." for text, mood in (ROWS[i % 3] for i in shown)
    )
    for id, scores in zip(found["id"].tolist(), found["scores"], strict=True):
        expected = logits_of(folder, f"{ROWS[id % 3][0]} It was<mask>.{after}")[word_ids()]
        torch.testing.assert_close(scores.diff(), expected.diff(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "method", "settings"),
    [
        ("bert", partial(MeZO, lr=1e-3), {"evaluations_per_forward": 2}),
        ("roberta", partial(LOZO, lr=1e-3, rank=2), {"evaluations_per_forward": 2}),
        ("roberta", partial(LOZO, lr=1e-3, rank=2), {"micro_batch_size": 2}),
    ],
)
def test_evaluations_are_stacked_and_batches_cut(
    architecture: str,
    method: Any,
    settings: dict[str, int],
    tmp_path: Path,
    data: Callable[..., PromptDataModule],
    make_trainer: Any,
) -> None:
    def moves(**options: int) -> dict[str, torch.Tensor]:
        module = MaskedLM(str(write_tiny(tmp_path / "model", architecture)))
        before = {name: weight.clone() for name, weight in module.state_dict().items()}
        callbacks = [ZerothOrder(method, **options), *([SubspaceResampling()] if method.func is LOZO else [])]
        make_trainer(max_steps=2, callbacks=callbacks, limit_val_batches=0).fit(module, data())
        return {name: weight - before[name] for name, weight in module.state_dict().items()}

    expected, found = moves(), moves(**settings)  # a warning of a fallback would be an error
    assert any(move.any() for move in expected.values())
    for name, move in found.items():
        torch.testing.assert_close(
            move, expected[name], rtol=1e-2, atol=1e-3 * expected[name].abs().max().item() + 1e-9
        )


def test_what_lies_below_the_trained_layer_is_computed_once_a_step(
    tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    module = MaskedLM(str(write_tiny(tmp_path / "model")))
    first = module.model.get_submodule("roberta.encoder.layer.0.attention.self")
    runs: list[int] = []
    forward = first.forward  # a hook on the layer would keep it from being passed over
    first.forward = lambda *args, **kwargs: (runs.append(trainer.global_step), forward(*args, **kwargs))[1]
    callbacks = [TrainLayers([1]), ZerothOrder(partial(MeZO, lr=1e-3, num_queries=2))]
    trainer = make_trainer(max_steps=3, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(module, data())
    assert [runs.count(step) for step in (1, 2)] == [1, 1]  # the first one finds out


def test_plain_text_is_not_for_masked_models(tmp_path: Path, make_trainer: Callable[..., L.Trainer]) -> None:
    (tmp_path / "validation.jsonl").write_text('{"text": "It was good."}\n')
    (tmp_path / "train.jsonl").write_text('{"text": "It was good."}\n')
    module = MaskedLM(str(write_tiny(tmp_path / "model")))
    data = PromptDataModule({"name": "texts", "text": "{{ text }}"}, str(tmp_path))
    with pytest.raises(ValueError, match="MaskedLM needs a prompt with a mask, but plain text has none: use CausalLM"):
        make_trainer().validate(module, data, verbose=False)


class TestEncoding:
    encode = staticmethod(partial(encode_masked, tiny_tokenizer(), label=1, id=0, max_length=64))

    def ids(self, text: str) -> list[int]:
        return tiny_tokenizer()(text)["input_ids"]

    def test_the_prompt_is_what_the_tokenizer_makes_of_it(self) -> None:
        example = self.encode(f"It was{MASK}.{SEPARATOR}No.", WORDS)
        assert example.prompt_ids == self.ids("It was<mask>.</s>No.")
        assert example.answer_ids == [self.ids(" bad")[1:-1], self.ids(" good")[1:-1]]
        assert example.text == "It was[[ good]].</s>No." and not example.truncated

    @pytest.mark.parametrize(
        ("max_length", "kept"),
        [(7, "de<mask>fg"), (5, "<mask>fg"), (4, "<mask>f"), (3, "<mask>")],
    )
    def test_the_mask_and_what_is_around_a_text_stay(self, max_length: int, kept: str) -> None:
        example = self.encode(f"cde{MASK}fg", WORDS, max_length=max_length)
        assert example.truncated
        assert example.prompt_ids == self.ids(kept)

    def test_demonstrations_that_do_not_fit_are_left_out(self) -> None:
        """From the first one on, as before prompts."""
        row, *shown = (
            Row(i, "", f"{text}{MASK}.", WORDS, (1,), (), [], {}) for i, text in enumerate(["ab", "cdef", "gh"])
        )
        task = task_of(TASK | {"hub": {"path": "nowhere"}})
        text = "ab<mask>.</s>gh good."
        example = example_of(task, row.after(shown), tiny_tokenizer(), len(self.ids(text)), False, encode_masked)
        assert example.prompt_ids == self.ids(text)
        assert example.num_left_out == 1 and not example.truncated

    @pytest.mark.parametrize(
        ("prompt", "answers", "line"),
        [
            ("It was", WORDS, r"needs exactly one `\{\{ mask \}\}` in the prompt, got 0"),
            (f"{MASK}{MASK}", WORDS, "got 2"),
            (f"<mask> {MASK}", WORDS, "the text itself contains the mask token of the tokenizer .*, <mask>"),
            (f"It was{MASK}", [" bad", " ugly"], "the answer ' ugly' is not one token .*: it gives Ġ, u, g, l, y"),
            (f"It was{MASK}", [" bad", ""], "the answer '' is not one token .*: it gives none"),
            (f"It was{MASK}", [" bad", " bad"], "gives two of the answers .* the same token"),
            (f"It was{MASK}", [" bad", "<unk>"], "the answer '<unk>' is not one token"),
        ],
    )
    def test_what_cannot_be_is_refused(self, prompt: str, answers: list[str], line: str) -> None:
        with pytest.raises(ValueError, match=line):
            self.encode(prompt, answers)
        for other, mark in product((encode, encode_pair), (MASK, SEPARATOR)):
            with pytest.raises(ValueError, match=r"`\{\{ mask \}\}` and .* are for MaskedLM"):
                other(tiny_tokenizer(), f"It was{mark}", WORDS, label=1, id=0, max_length=64)
        with pytest.raises(ValueError, match="do not hold a mask: at least 3 are needed"):
            self.encode(f"It was{MASK}", WORDS, max_length=2)


NLI = ({"premise": "Ann left.", "hypothesis": "Someone left."}, ["Ann left", "?", None, ",", " someone left."])
FILM = ({"text": " a warm film "}, ["a warm film", " It was", None, "."])
KINDS = ["Expression", "Entity", "Description", "Human", "Location", "Number"]
TEMPLATES = {
    "sst2": ({"sentence": "a warm film "}, FILM[1], ["terrible", "great"]),
    "sst5": (*FILM, ["terrible", "bad", "okay", "good", "great"]),
    "mr": (*FILM, ["terrible", "great"]),
    "trec": (
        {"text": "Who ?"},
        [None, ":", " Who ?"],
        ["Expression", "Entity", "Description", "Human", "Location", "Number"],
    ),
    "mnli": (*NLI, ["Yes", "Maybe", "No"]),
    "snli": (*NLI, ["Yes", "Maybe", "No"]),
    "rte": (*NLI, ["Yes", "No"]),
}


def test_templates_below_are_all_files() -> None:
    assert {path.stem for path in (configs() / "tasks/masked").glob("*.yaml")} == set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_the_package_are_those_of_mezo(name: str) -> None:
    """Token by token: its code joins the tokens of the parts of a template, and of each word behind a space."""
    row, parts, answers = TEMPLATES[name]
    tokenizer = tiny_tokenizer(words=[f" {answer}" for answer in answers])
    ids = {part: tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts if part is not None}
    expected = [id for part in parts for id in ([tokenizer.mask_token_id] if part is None else ids[part])]
    example = encode_masked(tokenizer, *load_task(f"masked/{name}").render(row), label=0, id=0, max_length=99)
    assert example.prompt_ids == [tokenizer.cls_token_id, *expected, tokenizer.sep_token_id]
    assert example.answer_ids == [tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for answer in answers]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
def test_a_fit_begins_at_a_linear_probe(
    architecture: str, tmp_path: Path, data: Callable[..., PromptDataModule], make_trainer: Callable[..., L.Trainer]
) -> None:
    """The words' rows tell the training rows apart, and are what an exported model says without us."""
    module = MaskedLM(str(write_tiny(tmp_path / "model", architecture)))
    embeddings = module.model.get_input_embeddings().weight.detach().clone()
    callbacks = [LinearProbing(cs=[100.0]), TrainHead(), ZerothOrder(partial(MeZO, lr=1e-12))]
    trainer = make_trainer(max_steps=1, limit_val_batches=0, callbacks=callbacks)
    rows = data()
    trainer.fit(module, datamodule=rows)
    (found,) = make_trainer().test(module, rows, verbose=False)
    assert found["test/accuracy"] == 1
    assert torch.equal(module.model.get_input_embeddings().weight, embeddings)
    module.export(tmp_path / "export")
    exported = MaskedLM(str(tmp_path / "export"))
    assert make_trainer().test(exported, rows, verbose=False) == [found]
