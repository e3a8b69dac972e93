"""Rows that are shown with their answers before others, and prompts without their content, which scores are
calibrated by: token by token."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zolightning.data import PromptDataModule
from zolightning.data.batch import collate
from zolightning.data.encoding import Example

SENTIMENT = {"name": "own", "prompt": "{{ text }} It was ", "answers": ["terrible", "great"], "labels": [0, 1]}
CALIBRATED = SENTIMENT | {"content_free_prompt": " It was "}
ROWS = [{"text": f"soup {index}", "label": index % 2} for index in range(4)]
ORDER = np.random.RandomState(5).permutation(4).tolist()

Texts = Callable[..., list[tuple[str, str]]]
Encoded = Callable[..., list[Example]]


def shown(*indices: int) -> str:
    """Demonstrations as MeZO writes them."""
    return "".join(f"soup {index} It was {['terrible', 'great'][index % 2]}\n\n" for index in indices)


@pytest.mark.parametrize("chat", [False, True])
def test_in_context_examples(texts: Texts, chat_tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    """Two of four rows stand, in the order of sampling, before each test row, and the other two are trained."""
    settings = {"num_demonstrations": 2, "seed": 5, "chat": chat}
    trained = texts(SENTIMENT, ROWS, chat_tokenizer, **settings)
    tested = texts(SENTIMENT, ROWS, chat_tokenizer, split="test", **settings)

    def alone(index: int) -> str:
        return f"<s>user\nsoup {index} It was</s><s>assistant\n" if chat else f"soup {index} It was"

    before = shown(*ORDER[:2])
    if chat:
        before = "".join(f"{alone(index)}{['terrible', 'great'][index % 2]}</s>" for index in ORDER[:2])
    assert [prompt for prompt, _ in tested] == [before + alone(index) for index in range(4)]
    assert [prompt for prompt, _ in trained] == [before + alone(index) for index in sorted(ORDER[2:])]


def test_outer_white_space_of_a_demonstration_goes(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    """As MeZO's SQuAD has it, whose answers end with a line break."""
    task = {"name": "own", "prompt": "\n{{ text }}\n", "answer": "{{ out }}\n"}
    rows = [{"text": "the soup?", "out": "great"}, {"text": "the roof?", "out": "terrible"}]
    prompts = [prompt for prompt, _ in texts(task, rows, tokenizer, split="test", num_demonstrations=1)]
    first = rows[np.random.RandomState(0).permutation(2)[0]]
    assert prompts == [f"{first['text']}\n{first['out']}\n\n\n{row['text']}\n" for row in rows]


def test_demonstrations_that_do_not_fit_are_left_out_and_counted(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whole ones, from the first on, as few as it takes; a prompt that is too long without any is cut."""
    rows = [{"text": "the rain " * count, "label": 0} for count in (1, 2, 3, 12)]

    def tokens(*texts: str) -> int:
        return len(tokenizer("".join(texts))["input_ids"])

    prompts = [f"{row['text']} It was" for row in rows]
    first, second = (prompts[index] + " terrible\n\n" for index in ORDER[:2])
    limit = tokens(second, prompts[1], " terrible")
    assert tokens(first, second, prompts[0], " terrible") > limit > tokens(second, prompts[0], " terrible")
    assert tokens(prompts[3]) > limit > tokens(prompts[2], " terrible")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"num_demonstrations": 2, "seed": 5, "max_length": limit}
        examples = encoded(SENTIMENT, rows, tokenizer, split="test", **settings)
    assert [example.num_left_out for example in examples] == [1, 1, 2, 2]
    assert [example.truncated for example in examples] == [False, False, False, True]
    decoded = [tokenizer.decode(example.prompt_ids) for example in examples]
    assert decoded[:3] == [second + prompts[0], second + prompts[1], prompts[2]]
    assert prompts[3].endswith(decoded[3])
    messages = [str(one.message) for one in caught if "test split" in str(one.message)]
    assert messages == [
        f"1 of 4 prompts of the test split were cut to {limit} tokens (`data.max_length`).",
        "4 of 4 prompts of the test split show fewer than 2 demonstrations, 0 at least: the first ones are left out, "
        f"so that {limit} tokens (`data.max_length`) hold them.",
    ]


def test_demonstrations_of_a_row_s_own(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    """Drawn with MeZO's seeds; all rows are trained, none with itself before it."""
    rows = [{"text": f"soup {index}", "label": index % 2} for index in range(20)]
    settings = {"num_demonstrations": 3, "demonstrations_per_row": True}
    tested = [prompt for prompt, _ in texts(SENTIMENT, rows, tokenizer, split="test", **settings)]
    seeds = np.random.RandomState(0).randint(0, 10_000, 20)
    for row, seed in zip(np.random.RandomState(0).permutation(20), seeds, strict=True):
        drawn = np.random.RandomState(seed).permutation(20)[:3]
        assert tested[row] == shown(*drawn) + f"soup {row} It was"

    trained = [prompt for prompt, _ in texts(SENTIMENT, rows, tokenizer, **settings)]
    assert len(trained) == 20
    for index, prompt in enumerate(trained):
        assert prompt.count("It was") == 4
        assert prompt.count(f"soup {index} ") == 1


@pytest.mark.parametrize("settings", [{"num_demonstrations": 4}, {"num_demonstrations": 2, "examples_per_class": 1}])
def test_all_training_rows_may_be_shown_in_a_test(
    texts: Texts, tokenizer: PreTrainedTokenizerFast, settings: dict[str, int]
) -> None:
    """As MeZO's in-context runs have it, whose number of training examples is that of demonstrations."""
    tested = texts(SENTIMENT, ROWS, tokenizer, split="test", **settings)
    assert {prompt.count("It was") for prompt, _ in tested} == {settings["num_demonstrations"] + 1}
    with pytest.raises(
        ValueError, match=r"`data.num_demonstrations` \d leaves nothing of the \d training rows to train"
    ):
        texts(SENTIMENT, ROWS, tokenizer, **settings)


def test_a_file_of_fewer_rows_than_demonstrations(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], spectator: L.LightningModule
) -> None:
    data = partial(PromptDataModule, SENTIMENT, str(write_rows(train=ROWS, validation=ROWS, test=ROWS)))
    with pytest.raises(ValueError, match=r"demonstrations` 4 leaves nothing of the 4 training rows to .*are no more"):
        make_trainer(max_steps=1).fit(spectator, data(num_demonstrations=4))
    for per_row in (False, True):
        with pytest.raises(ValueError, match=r"`data\.num_demonstrations` is 5, but only 4 training rows are there"):
            make_trainer().test(spectator, data(num_demonstrations=5, demonstrations_per_row=per_row), verbose=False)


@pytest.mark.parametrize("per_row", [False, True])
def test_demonstrations_out_of_a_few_rows_of_each_class(
    texts: Texts, tokenizer: PreTrainedTokenizerFast, per_row: bool
) -> None:
    """As many of each class, and of no other rows than those that are sampled for training."""
    rows = [{"text": f"soup {index}", "label": index % 2} for index in range(20)]
    settings: dict[str, Any] = {"examples_per_class": 3, "seed": 5}
    sampled = [prompt for prompt, _ in texts(SENTIMENT, rows, tokenizer, **settings)]
    settings |= {"num_demonstrations": 4, "demonstrations_per_row": per_row}
    trained, tested = (
        [prompt for prompt, _ in texts(SENTIMENT, rows, tokenizer, split=split, **settings)]
        for split in ("train", "test")
    )
    assert len(trained) == (6 if per_row else 2) and len(tested) == 20
    few = {prompt.partition(" It")[0]: prompt for prompt in sampled}
    for prompt in trained + tested:
        *demonstrations, own = prompt.split("\n\n")
        answers = [text.rpartition(" ")[2] for text in demonstrations]
        names = [text.partition(" It")[0] for text in demonstrations]
        assert sorted(answers) == ["great", "great", "terrible", "terrible"]
        assert len({*names}) == 4 and {*names} <= few.keys()
        assert prompt in tested or (own in sampled and own not in {few[name] for name in names})
    assert (len({prompt.rpartition("\n\n")[0] for prompt in tested}) > 1) == per_row


@pytest.mark.parametrize("calibration", ["zero_shot", "in_context"])
def test_the_prompt_without_its_content(encoded: Encoded, tokenizer: PreTrainedTokenizerFast, calibration: str) -> None:
    settings: dict[str, Any] = {"num_demonstrations": 2, "seed": 5, "calibration": calibration}
    examples = encoded(CALIBRATED, ROWS, tokenizer, split="test", **settings)
    expected = (shown(*ORDER[:2]) if calibration == "in_context" else "") + "It was"
    for example in examples:
        assert example.content_free is not None
        assert tokenizer.decode(example.content_free.prompt_ids) == expected
        assert example.content_free.answer_ids == example.answer_ids
    batch = collate(examples, pad_id=0, objective="classification")
    assert batch["content_free"]["answer_ids"].shape[0] == 1  # the same for all rows
    assert batch["content_free_place"].tolist() == [0] * 4
    assert all(example.content_free is None for example in encoded(CALIBRATED, ROWS, tokenizer, **settings))


def test_an_empty_prompt_is_what_a_text_begins_with(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    task = CALIBRATED | {"prompt": "{{ text }}\n", "content_free_prompt": ""}
    for one in (tokenizer, bos_tokenizer):  # which begins no text with a token, and one that does
        (example, *_) = encoded(task, ROWS, one, split="test", calibration="zero_shot")
        assert example.content_free is not None
        assert example.content_free.prompt_ids == [one.bos_token_id]
        assert example.content_free.answer_ids == example.answer_ids


def test_an_empty_prompt_after_demonstrations(encoded: Encoded) -> None:
    """GPT-2's tokenizer, for one, has a token for two line breaks at the end of a text, and two within it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: id for id, piece in enumerate([*alphabet, "ĊĊ"])}
    words = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    settings: dict[str, Any] = {"num_demonstrations": 2, "seed": 5, "calibration": "in_context"}
    task = CALIBRATED | {"prompt": "{{ text }}\n", "content_free_prompt": ""}
    for example in encoded(task, ROWS, tokenizer, split="test", **settings):
        free = example.content_free
        assert free is not None
        before = shown(*ORDER[:2]).replace(" It was ", "\n")
        for answer, ids in zip(("terrible", "great"), free.answer_ids, strict=True):
            assert free.prompt_ids + ids == tokenizer(before + answer)["input_ids"]


def test_calibration_of_a_tokenizer_that_begins_with_nothing(
    encoded: Encoded, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="</s>")
    with pytest.raises(ValueError, match="the content-free prompt is empty, and the tokenizer has no token"):
        encoded(CALIBRATED | {"content_free_prompt": ""}, ROWS, plain, split="test", calibration="zero_shot")


def test_calibration_of_a_users_turn(encoded: Encoded, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    settings: dict[str, Any] = {"chat": True, "calibration": "zero_shot"}
    (example, *_) = encoded(CALIBRATED, ROWS, chat_tokenizer, split="test", **settings)
    assert example.content_free is not None
    assert chat_tokenizer.decode(example.content_free.prompt_ids) == "<s>user\nIt was</s><s>assistant\n"


def test_calibration_of_a_module_that_encodes_rows_itself(
    write_rows: Callable[..., Path], make_trainer: Callable[..., L.Trainer], make_spectator: Callable[..., Any]
) -> None:
    module = make_spectator()
    module.encode = lambda **_: None
    data = PromptDataModule("sst2", str(write_rows(test=2)), calibration="zero_shot")
    with pytest.raises(
        ValueError, match=r"`data\.calibration` does not work with Spectator, which encodes rows itself"
    ):
        make_trainer().test(module, data, verbose=False)


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (SENTIMENT, {"num_demonstrations": 4, "num_train": 3}, "is 4, but only 3 training rows are sampled"),
        (SENTIMENT, {"num_demonstrations": 3, "examples_per_class": 2}, "3 must be a multiple of the 2 classes"),
        (SENTIMENT, {"num_demonstrations": 6, "examples_per_class": 2}, "is 6, but only 4 training rows are sampled"),
        (SENTIMENT, {"num_demonstrations": -1}, "`data.num_demonstrations` must be an integer, at least 0"),
        (SENTIMENT, {"demonstrations_per_row": True}, "`data.demonstrations_per_row` is True, but"),
        (SENTIMENT, {"calibration": "zero_shot"}, "needs a `content_free_prompt`, of which task own has none"),
        # What a flag with null becomes
        (CALIBRATED | {"content_free_prompt": "None"}, {"calibration": "zero_shot"}, "of which task own has none"),
        (CALIBRATED, {"calibration": "sfc"}, r"must be one of \('zero_shot', 'in_context'\), got 'sfc'"),
        (CALIBRATED | {"content_free_prompt": "{{"}, {}, "`content_free_prompt` is not a Jinja2 template"),
        (CALIBRATED | {"content_free_prompt": 3}, {}, "`content_free_prompt` must be a string, got 3"),
        ({"name": "own", "text": "{{ a }}"}, {"num_demonstrations": 1}, "needs prompts and answers; task own has none"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, task: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(task, str(tmp_path), **settings)
