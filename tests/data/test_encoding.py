"""Tokens of one row, and tensors of several."""

import pytest
import torch
from lightning.pytorch.utilities.data import extract_batch_size
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from zolightning.data.batch import collate
from zolightning.data.encoding import Example, check_tokens, encode

PROMPT = "the soup was quiet It was"
ANSWERS = [" terrible", " great"]


def ids(tokenizer: PreTrainedTokenizerFast, text: str, **kwargs: bool) -> list[int]:
    return tokenizer(text, **kwargs)["input_ids"]


def test_answer_tokens_complete_the_prompt(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(bos_tokenizer, PROMPT, ANSWERS, label=1, id=7, max_length=100)
    assert example.prompt_ids == ids(bos_tokenizer, PROMPT)
    assert example.prompt_ids[0] == bos_tokenizer.bos_token_id
    for answer, answer_ids in zip(ANSWERS, example.answer_ids, strict=True):
        assert example.prompt_ids + answer_ids == ids(bos_tokenizer, PROMPT + answer)
    assert (example.id, example.label, example.truncated) == (7, 1, False)
    assert example.text == "the soup was quiet It was[[ great]]"
    assert bos_tokenizer.eos_token_id not in {*example.prompt_ids, *example.answer_ids[0], *example.answer_ids[1]}


def test_a_prompt_that_has_the_first_token_already_gets_no_second(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    options = {"label": 1, "id": 0, "max_length": 64}
    example = encode(bos_tokenizer, "<s>the soup was", [" terrible", " great"], **options)
    plain = encode(bos_tokenizer, "the soup was", [" terrible", " great"], **options)
    assert example.prompt_ids == plain.prompt_ids and example.answer_ids == plain.answer_ids


def test_a_token_that_the_model_does_not_know_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    example = encode(tokenizer, "the soup", [" good", " great"], label=0, id=0, max_length=64)
    largest = max(map(max, (example.prompt_ids, *example.answer_ids)))
    check_tokens(example, largest + 1, tokenizer)
    with pytest.raises(ValueError, match=rf"has the id {largest}, but the model has embeddings for {largest} only"):
        check_tokens(example, largest, tokenizer)


def test_an_answer_that_would_merge_with_the_prompt_is_tokenized_alone(
    merging_tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt, answer = "the so", "up was"
    prompt_ids = ids(merging_tokenizer, prompt)
    assert ids(merging_tokenizer, prompt + answer)[: len(prompt_ids)] != prompt_ids
    example = encode(merging_tokenizer, prompt, [answer, "great"], label=0, id=0, max_length=100)
    assert example.prompt_ids == prompt_ids
    assert example.answer_ids[0] == ids(merging_tokenizer, answer, add_special_tokens=False)


@pytest.mark.parametrize("name", ["tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_long_prompt_loses_its_beginning(name: str, spare: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    prompt = "the rain ran through the roof " * 5 + "It was"
    whole = encode(tokenizer, prompt, ANSWERS, label=0, id=0, max_length=1000)
    max_length = whole.length + spare
    example = encode(tokenizer, prompt, ANSWERS, label=0, id=0, max_length=max_length)
    bos = whole.prompt_ids[:1] if name == "bos_tokenizer" else []
    removed = max(0, -spare)
    assert example.prompt_ids == bos + whole.prompt_ids[len(bos) + removed :]
    assert example.answer_ids == whole.answer_ids
    assert example.truncated == (removed > 0)
    assert example.length == min(max_length, whole.length)


def test_answers_that_leave_no_room(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    longest = encode(bos_tokenizer, PROMPT, [" terrible night", " great"], label=0, id=0, max_length=99).answer_ids[0]
    needed = len(longest) + 2
    encode(bos_tokenizer, PROMPT, [" terrible night", " great"], label=0, id=0, max_length=needed)
    with pytest.raises(ValueError, match=rf"`data.max_length` .*answers \[' terrible night'.*: at least {needed} are"):
        encode(bos_tokenizer, PROMPT, [" terrible night", " great"], label=0, id=0, max_length=needed - 1)


def test_empty_parts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode(tokenizer, "", ANSWERS, label=0, id=0, max_length=99)
    with pytest.raises(ValueError, match=r"the tokenizer tiny makes no token of one of the answers \['', ' great'\]"):
        encode(tokenizer, PROMPT, ["", " great"], label=0, id=0, max_length=99)


def test_candidates_that_collide(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"gives two of the answers \[' great', ' great'\] the same tokens"):
        encode(tokenizer, PROMPT, [" great", " great"], label=0, id=0, max_length=99)


def test_a_tokenizer_that_ends_texts_is_refused(eos_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="ends a text with a special token"):
        encode(eos_tokenizer, PROMPT, ANSWERS, label=0, id=0, max_length=99)


ONE_TOKEN = [
    Example(id=4, prompt_ids=[11, 12, 13], answer_ids=[[21], [22]], label=1, text=""),
    Example(id=9, prompt_ids=[14], answer_ids=[[21], [22]], label=0, text=""),
]
SEVERAL_TOKENS = [
    Example(id=4, prompt_ids=[11, 12, 13], answer_ids=[[21], [22, 23, 24]], label=1, text=""),
    Example(id=9, prompt_ids=[14], answer_ids=[[25, 26], [27]], label=0, text=""),
]


def test_one_token_answers_share_one_row() -> None:
    batch = collate(ONE_TOKEN, pad_id=5, objective="classification")
    assert batch["input_ids"].tolist() == [[[11, 12, 13]], [[5, 5, 14]]]
    assert batch["attention_mask"].tolist() == [[[1, 1, 1]], [[0, 0, 1]]]
    assert batch["answer_ids"].tolist() == [[[21], [22]], [[21], [22]]]
    assert batch["label"].tolist() == [1, 0]
    assert batch["id"].tolist() == [4, 9]
    assert batch["objective"] == "classification"
    assert all(value.dtype == torch.long for value in batch.values() if isinstance(value, torch.Tensor))


def test_longer_answers_have_a_row_each() -> None:
    batch = collate(SEVERAL_TOKENS, pad_id=5, objective="classification")
    assert batch["input_ids"].tolist() == [
        [[5, 5, 11, 12, 13, 21], [11, 12, 13, 22, 23, 24]],
        [[5, 5, 5, 14, 25, 26], [5, 5, 5, 5, 14, 27]],
    ]
    assert batch["attention_mask"].tolist() == [
        [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
        [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
    ]
    assert batch["answer_ids"].tolist() == [[[-1, -1, 21], [22, 23, 24]], [[-1, 25, 26], [-1, -1, 27]]]


def test_rows_are_as_long_as_a_multiple_says() -> None:
    for examples, length in ((ONE_TOKEN, 4), (SEVERAL_TOKENS, 8)):
        batch = collate(examples, pad_id=5, objective="classification", multiple=4)
        plain = collate(examples, pad_id=5, objective="classification")
        more = length - plain["input_ids"].shape[-1]
        assert torch.equal(batch["input_ids"], F.pad(plain["input_ids"], (more, 0), value=5))
        assert torch.equal(batch["attention_mask"], F.pad(plain["attention_mask"], (more, 0)))
        assert torch.equal(batch["answer_ids"], plain["answer_ids"])


def test_rows_end_with_their_answer() -> None:
    batch = collate(SEVERAL_TOKENS, pad_id=5, objective="classification")
    present = batch["answer_ids"] >= 0
    assert torch.equal(batch["input_ids"][..., -3:][present], batch["answer_ids"][present])


def test_gold_only() -> None:
    batch = collate(SEVERAL_TOKENS, pad_id=5, objective="language_modeling", gold_only=True)
    assert batch["input_ids"].tolist() == [[[11, 12, 13, 22, 23, 24]], [[5, 5, 5, 14, 25, 26]]]
    assert batch["answer_ids"].tolist() == [[[22, 23, 24]], [[-1, 25, 26]]]
    assert batch["label"].tolist() == [0, 0]


@pytest.mark.parametrize("extra", [[23], [23, 24]])
def test_an_absent_candidate_has_no_tokens(extra: list[int]) -> None:
    more = Example(id=1, prompt_ids=[15, 16], answer_ids=[[21], [22], extra], label=2, text="")
    batch = collate([ONE_TOKEN[0], more], pad_id=5, objective="classification")
    assert (batch["answer_ids"][0, 2] == -1).all()
    assert (batch["answer_ids"][:, :2] >= 0).any(-1).all()
    # attention over nothing but padding would be NaN
    assert batch["attention_mask"].any(-1).all()


def test_a_slice_of_a_batch_is_a_batch() -> None:
    whole = collate(SEVERAL_TOKENS, pad_id=5, objective="classification")
    assert {len(value) for value in whole.values() if isinstance(value, torch.Tensor)} == {2}


@pytest.mark.filterwarnings("error")
def test_lightning_can_tell_the_batch_size() -> None:
    assert extract_batch_size(collate(ONE_TOKEN, pad_id=5, objective="classification")) == 2


def test_prompts_may_be_padded_on_the_right() -> None:
    examples = [Example(0, [5, 6, 7], [[1], [2]], 0, ""), Example(1, [8], [[1], [2]], 1, "")]
    batch = collate(examples, pad_id=9, objective="classification", multiple=4, padding_side="right")
    assert batch["input_ids"].tolist() == [[[5, 6, 7, 9]], [[8, 9, 9, 9]]]
    assert batch["attention_mask"].tolist() == [[[1, 1, 1, 0]], [[1, 0, 0, 0]]]
