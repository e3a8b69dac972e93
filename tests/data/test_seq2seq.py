"""Tokens for an encoder and a decoder: texts by themselves, each with its end."""

import pytest
from transformers import PreTrainedTokenizerFast

from zolightning.data.batch import collate
from zolightning.data.seq2seq import encode_pair

END = 1


def test_prompt_and_answers_end_and_a_long_prompt_loses_its_beginning(eos_tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return eos_tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, answers = "it was terrible because the rain", [" great", "no\n"]
    example = encode_pair(eos_tokenizer, prompt, answers, label=1, id=7, max_length=64)
    assert example.prompt_ids == [*ids(prompt), END]
    assert example.answer_ids == [[*ids("great"), END], [*ids("no"), END]]
    assert (example.text, example.truncated) == (f"{prompt}[[no\n]]", False)
    longest = max(map(len, example.answer_ids))
    cut = encode_pair(eos_tokenizer, prompt, answers, label=1, id=7, max_length=longest)
    assert cut.prompt_ids == [*ids(prompt)[1 - longest :], END] and cut.truncated
    with pytest.raises(ValueError, match=f"or one of the answers .*at least {longest} are needed"):
        encode_pair(eos_tokenizer, prompt, answers, label=1, id=7, max_length=longest - 1)
    with pytest.raises(ValueError, match="the same tokens"):
        encode_pair(eos_tokenizer, prompt, ["great", " great"], label=1, id=7, max_length=64)


def test_a_batch_has_prompts_and_answers_apart_padded_on_the_right(eos_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [("the soup was", ["great", "terrible night"]), ("yes", ["no", "Maybe", "the roof holds"])]
    examples = [
        encode_pair(eos_tokenizer, prompt, answers, label=index, id=index, max_length=64)
        for index, (prompt, answers) in enumerate(texts)
    ]
    batch = collate(examples, 0, "classification", with_prompts=True, padding_side="right")
    assert batch["input_ids"].shape[:2] == (2, 1) and batch["answer_ids"].shape[:2] == (2, 3)
    assert (batch["answer_ids"][0, 2] == -1).all()  # an absent candidate
    for row, example in enumerate(examples):
        length = len(example.prompt_ids)
        assert batch["input_ids"][row, 0, :length].tolist() == example.prompt_ids
        assert batch["attention_mask"][row, 0].sum() == batch["attention_mask"][row, 0, :length].sum() == length
        for place, answer in enumerate(example.answer_ids):
            found = batch["answer_ids"][row, place].tolist()
            assert found == answer + [-1] * (len(found) - len(answer))
    assert batch["prompt_ids"].equal(batch["input_ids"][:, 0])
    gold = collate(examples, 0, "language_modeling", gold_only=True, padding_side="right")
    assert gold["answer_ids"].shape[1] == 1
