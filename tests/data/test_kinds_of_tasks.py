"""Completions, conversations, plain text and chat templates: token by token."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from zolightning.data import PromptDataModule
from zolightning.data.encoding import Example

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Was the soup great?"},
    {"role": "assistant", "content": "Yes"},
]
SENTIMENT = {"name": "own", "prompt": "{{ text }} It was ", "answers": ["terrible", "great"], "labels": [0, 1]}

Texts = Callable[..., list[tuple[str, str]]]


def test_a_completion_is_a_prompt_and_its_continuation(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    task = {"name": "own", "prompt": "{{ instruction }}\n", "answer": "{{ output }}\n"}
    rows = [{"instruction": "the soup?", "output": "great"}, {"instruction": "the roof?", "output": "terrible"}]
    assert texts(task, rows, tokenizer) == [("the soup?\n", "great\n</s>"), ("the roof?\n", "terrible\n</s>")]


def test_a_completion_that_has_its_end_gets_no_second(texts: Texts, tokenizer: PreTrainedTokenizerFast) -> None:
    task = {"name": "own", "prompt": "{{ instruction }}\n", "answer": "{{ output }}</s>"}
    assert texts(task, [{"instruction": "the soup?", "output": "great"}], tokenizer) == [("the soup?\n", "great</s>")]


@pytest.mark.parametrize("answer", [{"answer": " {{ output }}"}, {"references": "output"}])
def test_in_a_chat_what_is_written_ends_as_a_turn_of_the_assistant(
    encoded: Callable[..., list[Example]], chat_tokenizer: PreTrainedTokenizerFast, answer: dict[str, str]
) -> None:
    task = {"name": "own", "prompt": "{{ instruction }}", **answer}
    (example,) = encoded(task, [{"instruction": "the soup?", "output": "great"}], chat_tokenizer, chat=True)
    talk = [{"role": "user", "content": "the soup?"}, {"role": "assistant", "content": "great"}]
    expected = chat_tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    assert [*example.prompt_ids, *example.answer_ids[0]] == expected


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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no roles') }}", "the chat template refuses this conversation: no roles"),
        ("{% for turn in messages %}{{ turn.content | upper }}{% endfor %}", "does not write the assistant's turn as"),
        (
            "{{ messages | length }}{{ messages[-1].content }}",
            "writes the earlier turns differently if the last one is",
        ),
    ],
)
def test_a_chat_template_that_does_not_fit(
    texts: Texts, chat_tokenizer: PreTrainedTokenizerFast, template: str, message: str
) -> None:
    chat_tokenizer.chat_template = template
    is_conversation = "earlier" in message
    task = {"messages": "talk"} if is_conversation else {"prompt": "{{ ask }}", "answer": "{{ ask }}"}
    with pytest.raises(ValueError, match=f"train.jsonl, line 1: .*{message}"):
        texts({"name": "own", **task}, [{"talk": TALK, "ask": "so"}], chat_tokenizer, chat=not is_conversation)


def test_a_prompt_needs_a_task_that_has_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`data\.prompt` does not work with task own"):
        PromptDataModule({"name": "own", "text": "{{ a }}"}, str(tmp_path), prompt="x")
