"""Language modelling: instructions, conversations and whole texts, whose rows have one answer each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

from zolightning.data.task import PromptTask, Task
from zolightning.data.templates import check_template, fill, guarded, template_fields


@dataclass(frozen=True, kw_only=True)
class SingleAnswer(Task):
    """A task in which nothing is compared: validation reports the loss of the answers, and no row lacks a label."""

    objective = "language_modeling"
    num_classes = 1
    validation_metrics = ()
    label_fields = frozenset[str]()

    def right(self, row: Mapping[str, Any]) -> tuple[int]:
        return (0,)


@dataclass(frozen=True, kw_only=True)
class Completion(SingleAnswer, PromptTask):
    """A prompt whose right continuation is trained by its likelihood; validation reports the loss.

    The continuation ends with the tokenizer's end of a text, or of an assistant's turn in a chat template, so that a
    model learns where to end.

    Args:
        answer: Jinja2 template of the continuation, over the fields of a row.
    """

    answer: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("answer")
        check_template("answer", self.answer)

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields((self.prompt, self.answer))

    def answers_to(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
        return [fill(self.answer, values)]


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates take."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Conversation(SingleAnswer):
    """Conversations that the tokenizer's chat template writes; the last turn, the assistant's, is trained.

    Args:
        messages: the field with the list of messages, each with a `role` and a `content`.
    """

    messages: str = "messages"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("messages")

    @property
    def template_fields(self) -> frozenset[str]:
        return frozenset([self.messages])

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        *turns, answer = self.turns(row)
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns), [answer["content"]]

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """The messages of a row.

        Raises:
            ValueError: if they are no list of messages that ends with one of the assistant.
        """
        self.check_fields(row, self.template_fields)
        turns = row[self.messages]
        if not isinstance(turns, list | tuple) or len(turns) < 2:
            raise ValueError(f"field `{self.messages}` must be a list of two messages or more, got {turns!r}")
        for turn in turns:
            if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
                raise ValueError(f"field `{self.messages}` has a message without a text `role` and `content`: {turn!r}")
        if turns[-1]["role"] != "assistant":
            raise ValueError(f"field `{self.messages}` must end with the assistant's turn, got {turns[-1]['role']!r}")
        return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


@dataclass(frozen=True, kw_only=True)
class PlainText(SingleAnswer):
    """Texts of which every token but the first is trained; validation reports the loss, the mean over tokens.

    A text that is too long loses its end. Nothing is appended.

    Args:
        text: Jinja2 template over the fields of a row, such as ``{{ text }}``.
    """

    text: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_strings("text")
        check_template("text", self.text)
        if not self.template_fields:
            raise ValueError(f"`text` must name a field, such as {{{{ text }}}}, got {self.text!r}.")

    @cached_property
    def template_fields(self) -> frozenset[str]:
        return template_fields([self.text])

    def render(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        self.check_fields(row, self.template_fields)
        text = fill(self.text, guarded(row, self.template_fields))
        if not text.strip():
            raise ValueError("the text is empty")
        return "", [text]
