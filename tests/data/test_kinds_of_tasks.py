"""Completions, conversations and plain text; chat templates and in-context examples: token by token."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from zolightning.data import PromptDataModule

TEMPLATE = (
    "{% for turn in messages %}<s>{{ turn.role }}\n{{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was the soup great?"},
    {"role": "assistant", "content": "Yes"},
]
SENTIMENT = {"name": "own", "prompt": "{{ text }} It was ", "answers": ["terrible", "great"], "labels": [0, 1]}

Texts = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def texts(tmp_path: Path, make_trainer: Callable[..., L.Trainer], make_spectator: Callable[..., Any]) -> Texts:
    """Prompts and right answers of the rows of a split, decoded from their tokens, by their id."""

    def read(
        task: dict[str, Any], rows: list[dict], tokenizer: Any, split: str = "train", **settings: Any
    ) -> list[tuple[str, str]]:
        for name in ("train", "validation", "test"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = PromptDataModule(task, str(tmp_path), batch_size=1, num_train=len(rows), **settings)
        trainer = make_trainer(max_steps=1, limit_val_batches=0)
        module = make_spectator(tokenizer=tokenizer, context_length=None)
        (trainer.test(module, data, verbose=False) if split == "test" else trainer.fit(module, data))
        examples = sorted(data._examples[split], key=lambda example: example.id)
        decode = tokenizer.decode
        return [(decode(example.prompt_ids), decode(example.answer_ids[example.label])) for example in examples]

    return read


def test_a_completion_is_a_prompt_and_its_continuation(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    task = {"name": "own", "prompt": "{{ instruction }}\n", "answer": "{{ output }}\n"}
    rows = [{"instruction": "the soup?", "output": "great"}, {"instruction": "the roof?", "output": "terrible"}]
    assert texts(task, rows, tokenizer) == [("the soup?\n", "great\n"), ("the roof?\n", "terrible\n")]


def test_of_a_plain_text_all_but_the_first_token_is_trained(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = texts({"name": "own", "text": "{{ body }}"}, [{"body": "the soup was great"}], tokenizer)
    assert "".join(pair) == "the soup was great"
    assert tokenizer(pair[0])["input_ids"] == tokenizer("the soup was great")["input_ids"][:1]


@pytest.mark.filterwarnings("ignore:1 of 1 prompts of the .* split were cut to 3 tokens")
def test_a_long_text_loses_its_end(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = texts({"name": "own", "text": "{{ body }}"}, [{"body": "the soup was great"}], tokenizer, max_length=3)
    assert "".join(pair) == tokenizer.decode(tokenizer("the soup was great")["input_ids"][:3])


def test_of_a_conversation_the_last_turn_is_trained_with_its_end(
    texts: Texts, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    (pair,) = texts({"name": "own", "messages": "talk"}, [{"talk": TALK}], chat_tokenizer)
    before = "<s>system\nBe brief.</s><s>user\nWas the soup great?</s><s>assistant\n"
    assert pair == (before, "Yes</s>")


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        ("hello", "field `talk` must be a list of two messages or more"),
        (TALK[:2], "field `talk` must end with the assistant's turn, got 'user'"),
        ([*TALK[:2], {"role": "assistant"}], "field `talk` has a message without a text `role` and `content`"),
        (None, "field `talk` is missing or null"),
    ],
)
def test_what_is_no_conversation(
    texts: Texts, chat_tokenizer: PreTrainedTokenizerFast, talk: object, message: str
) -> None:
    with pytest.raises(ValueError, match=f"train.jsonl, line 1: {message}"):
        texts({"name": "own", "messages": "talk"}, [{"talk": talk}], chat_tokenizer)


def test_a_prompt_as_a_users_turn(texts: Texts, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    (pair,) = texts(SENTIMENT, [{"text": "the soup", "label": 1}], chat_tokenizer, chat=True)
    assert pair == ("<s>user\nthe soup It was</s><s>assistant\n", "great")


def test_chat_needs_a_template(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="line 1: the tokenizer tiny has no chat template"):
        texts(SENTIMENT, [{"text": "the soup", "label": 1}], tokenizer, chat=True)


@pytest.mark.parametrize("chat", [False, True])
def test_in_context_examples(texts: Texts, chat_tokenizer: PreTrainedTokenizerFast, chat: bool) -> None:
    """Two of four rows stand, in the order of sampling, before each test row, and the other two are trained."""
    rows = [{"text": f"soup {index}", "label": index % 2} for index in range(4)]
    settings = {"num_demonstrations": 2, "seed": 5, "chat": chat}
    trained = texts(SENTIMENT, rows, chat_tokenizer, **settings)
    tested = texts(SENTIMENT, rows, chat_tokenizer, split="test", **settings)

    def alone(index: int, answered: bool) -> str:
        answer = ["terrible", "great"][index % 2]
        if chat:
            return f"<s>user\nsoup {index} It was</s><s>assistant\n" + (f"{answer}</s>" if answered else "")
        return f"soup {index} It was" + (f" {answer}\n\n" if answered else "")

    order = np.random.RandomState(5).permutation(4).tolist()
    shown = "".join(alone(index, answered=True) for index in order[:2])
    assert [prompt for prompt, _ in tested] == [shown + alone(index, answered=False) for index in range(4)]
    assert [prompt for prompt, _ in trained] == [shown + alone(index, answered=False) for index in sorted(order[2:])]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (SENTIMENT, {"num_demonstrations": 3, "num_train": 3}, "`data.num_demonstrations` 3 leaves nothing of"),
        (SENTIMENT, {"num_demonstrations": 1, "examples_per_class": 2}, "exclude each other"),
        (SENTIMENT, {"num_demonstrations": -1}, "`data.num_demonstrations` must be at least 0"),
        ({"name": "own", "text": "{{ a }}"}, {"num_demonstrations": 1}, "needs prompts and answers; task own has none"),
        ({"name": "own", "text": "{{ a }}"}, {"prompt": "x"}, "`data.prompt` does not go with task own"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, task: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptDataModule(task, str(tmp_path), **settings)
