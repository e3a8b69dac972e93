"""Texts that a model writes, against a loop of single forward passes; F1 and exact match, against those by hand."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from zolightning.callbacks import PredictionWriter
from zolightning.data import PromptDataModule
from zolightning.models import CausalLM
from zolightning.models.generation import Decoding, drawn_from, generate
from zolightning.rewards import exact_match, token_f1

# several tokens hold a line break beside other characters, as those of today's large vocabularies do
PIECES = [
    "<unk>",
    "</s>",
    ".\u010a",
    "\u010a\u010a",
    "x\u010ay",
    *"abcdefghijklmnopqrstuvwxyzABCDEF",
]  # "\u010a" is "\n"


def tokenizer_of(pieces: list[str], **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=pieces[0]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(PIECES, unk_token="<unk>")


def written_alone(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> str:
    """The greedy continuation by whole forward passes, up to the first line break or the end of the text."""
    ids, text = list(prompt), ""
    for _ in range(max_new_tokens):
        token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if token == 1:
            break
        ids.append(token)
        text += PIECES[token].replace("\u010a", "\n").replace("<unk>", "")
        if "\n" in text:
            break
    return text.split("\n")[0].strip()


@torch.no_grad()
def test_a_padded_batch_writes_what_each_prompt_alone_does(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    prompts = [[first, *range(7, 7 + length)] for first in range(5, 37) for length in (0, 3, 9)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts = generate(model, tokenizer, ids, mask, max_new_tokens=12, stop="\n")
    expected = [written_alone(model, prompt, 12) for prompt in prompts]
    assert texts == expected
    lengths = list(map(len, expected))
    assert min(lengths) < 3 and max(lengths) == 12  # some stopped early, some at the limit

    tokens: list[int] = []
    model.get_decoder().register_forward_pre_hook(lambda *_: tokens.append(1))
    short = [row for row, text in enumerate(expected) if len(text) < 3]
    generate(model, tokenizer, ids[short], mask[short], max_new_tokens=12, stop="\n")
    assert len(tokens) < 12  # no forward after the last of them has ended


@torch.no_grad()
def test_a_text_has_nothing_before_it_and_after_its_end(make_model: Callable[..., PreTrainedModel]) -> None:
    """Neither a stop in its prompt, nor the space before its first word, nor token 0, a letter, where it is shorter."""
    model = make_model()
    model.generation_config.eos_token_id = 17
    spaced = tokenizer_of(["!", "</s>", *PIECES[2:5], *(f"\u0120{letter}" for letter in PIECES[5:])])
    ids = torch.tensor([[first, 3, 9, 12] for first in range(5, 21)])
    write = partial(generate, model, spaced, max_new_tokens=12, stop="\n")
    texts = write(ids, torch.ones_like(ids))
    alone = [write(row[None], torch.ones_like(row[None])) for row in ids]
    assert texts == [text for (text,) in alone]
    assert all(text == text.strip() for text in texts) and any(" " in text for text in texts)
    assert any(text.endswith(" m") and len(text) < 12 for text in texts)  # the token that ends one is a letter


def test_what_is_drawn_is_a_function_of_the_seed_and_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(seed: int, number: int) -> float:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        with drawn_from(number, torch.device("cpu")):
            return torch.rand(1).item()

    before = torch.get_rng_state()
    each = [drawn(seed, number) for seed in (1, 2) for number in (1, 2)]
    assert len(set(each)) == 4 and drawn(2, 2) == each[-1]
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_beams_find_the_likeliest_text(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of all texts of two tokens, by whole forward passes; one that ends with its first token competes by its mean."""
    model, width = make_model(), len(PIECES)
    ids = torch.tensor([[7, 9, 12], [20, 8, 12]])
    write = partial(generate, model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=2, stop="\n")
    texts = write(decoding=Decoding(num_beams=width))
    assert texts != write()
    for row, text in zip(ids, texts, strict=True):
        first = model(row[None]).logits[0, -1].log_softmax(-1)
        two = torch.cat([row.expand(width, -1), torch.arange(width)[:, None]], dim=1)
        second = model(two).logits[:, -1].log_softmax(-1)
        scores = {"" if one == 1 else PIECES[one]: first[one].item() for one in (1, 2, 3, 4)}
        for one in [0, *range(5, width)]:
            best = second[one].argmax().item()
            scores[PIECES[one] + PIECES[best]] = (first[one] + second[one, best]).item() / 2
        likeliest = max(scores, key=scores.__getitem__)
        clean = likeliest.replace("\u010a", "\n").replace("<unk>", "").replace("</s>", "")
        assert text == clean.split("\n")[0].strip()


@torch.no_grad()
def test_what_a_model_recommends_is_not_used(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """As those of Qwen2.5-Instruct, which would change each text, also one of the likeliest tokens."""
    model = make_model()
    prompts = [[first, 7, 9, 12] for first in range(5, 37)]
    ids = torch.tensor(prompts)
    own = GenerationConfig(eos_token_id=1, repetition_penalty=1.5, do_sample=True, top_p=0.8, min_new_tokens=9)
    model.generation_config = own
    texts = generate(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=12, stop="\n")
    assert texts == [written_alone(model, prompt, 12) for prompt in prompts]
    assert model.generation_config is own


def test_sampled_texts_are_drawn_from_the_models_distribution(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    """One token for each of many equal prompts, from the three likeliest: their shares are the probabilities."""
    model, count = make_model(), 4000
    ids = torch.tensor([[7, 9, 12]]).expand(count, -1)
    drawn = Decoding(do_sample=True, top_k=3, temperature=1.5)
    texts = generate(model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=1, stop="@", decoding=drawn)
    with torch.no_grad():
        values, places = model(ids[:1]).logits[0, -1].topk(3)
    shares = (values / 1.5).softmax(0).tolist()
    names = [tokenizer.decode([place], skip_special_tokens=True).strip() for place in places]
    for name, share in zip(names, shares, strict=True):
        assert abs(texts.count(name) / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, r"`decoding\.temperature` must be a positive number, got 0\.0"),
        ({"do_sample": True, "top_p": 1.5}, r"`decoding\.top_p` must be above 0 and at most 1, got 1\.5"),
        ({"do_sample": True, "top_p": 0.0}, r"`decoding\.top_p` must be above 0 and at most 1, got 0\.0"),
        ({"do_sample": True, "top_k": -1}, r"`decoding\.top_k` must be an integer, at least 0, got -1"),
        ({"num_beams": 0}, r"`decoding\.num_beams` must be an integer, at least 1, got 0"),
        ({"temperature": 0.7}, r"`decoding\.do_sample` is False, so .* have no effect"),
    ],
)
def test_decoding_that_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**fields)


@pytest.mark.parametrize(
    ("text", "references", "f1", "exact"),
    [
        ("1903", ["1903"], 1, 1),
        ("The Mill.", ["mill"], 1, 1),  # case, punctuation and articles do not count
        ("in the year 1903", ["1903", "year 1903"], 2 * (2 / 3) * 1 / (2 / 3 + 1), 0),  # precision 2/3, recall 1
        ("red red mill", ["red mill mill"], 2 / 3, 0),  # two words in common, of three each
        ("a lake", ["1903"], 0, 0),
        ("", ["1903"], 0, 0),
    ],
)
def test_f1_and_exact_match(text: str, references: list[str], f1: float, exact: float) -> None:
    assert token_f1(text, references) == pytest.approx(f1)
    assert exact_match(text, references) == exact


def test_a_generation_task_is_validated_and_predicted(
    tiny_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16: the mean over uneven batches is that of all rows, in float32."""
    tokenizer.save_pretrained(tiny_folder)
    rows = [{"text": "abc", "answer": ["f", "g"][index % 2]} for index in range(7)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    task = {"name": "letters", "prompt": "{{ text }}", "references": "answer", "max_new_tokens": 4}
    data = PromptDataModule(task, str(tmp_path), batch_size=3)

    monkeypatch.setattr("zolightning.models.causal_lm.generate", lambda *args, **kwargs: ["f"] * len(args[2]))
    module = CausalLM(str(tiny_folder))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    (metrics,) = L.Trainer(**quiet, precision="bf16-true").validate(module, data, verbose=False)
    assert metrics["val/f1"] == metrics["val/exact_match"] == pytest.approx(4 / 7)
    assert set(metrics) == set(module.validation_metrics(data)) == {"val/loss", "val/f1", "val/exact_match"}

    monkeypatch.undo()
    path = tmp_path / "predictions.jsonl"
    L.Trainer(**quiet, callbacks=PredictionWriter(str(path))).predict(module, data)
    predictions = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["id"] for row in predictions) == list(range(7))
    alone = written_alone(module.model, tokenizer("abc")["input_ids"], 4)
    assert {row["text"] for row in predictions} == {alone}  # of rows without references
