"""Conversation: rows of messages, of which the last is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from zolightning.data.single_answer import SingleAnswer


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
