"""A row of a task as text: its prompt, its answers, and the demonstrations before them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zolightning.data.language_modeling import Message
from zolightning.data.templates import MASK, SEPARATOR


@dataclass(frozen=True)
class Row:
    """A row as text, before it is tokenized."""

    id: int  # where the row stands in its source, counted from 0
    where: str  # the row and its source, for messages
    prompt: str  # with its demonstrations
    answers: list[str]  # the candidates
    right: tuple[int, ...]  # indices of those that are right, the one to train on first; none if that is not known
    references: tuple[str, ...]  # what a generated text is compared with
    turns: list[Message]  # the prompt for a chat template: the user's turn, or all turns of a conversation
    fields: Mapping[str, Any]  # the row itself
    shown: tuple["Row", ...] = ()  # the demonstrations, other rows in the prompt, each with its first right answer
    content_free: tuple[str, list[str]] | None = None  # prompt and answers without the row's content, if there are such

    @property
    def demonstration(self) -> str:
        """The text of this row as a demonstration for others, with its right answer; its label must be known."""
        if MASK in self.prompt:
            return SEPARATOR + self.prompt.replace(MASK, self.answers[self.right[0]])
        return f"{(self.prompt + self.answers[self.right[0]]).strip()}\n\n"

    def after(self, shown: Sequence["Row"]) -> "Row":
        """This row with demonstrations before its prompt, or after it if a mask stands for the answer.

        After it as in LM-BFF (Gao et al., 2021, arXiv:2012.15723).
        """
        turns = list[Message]()
        for one in shown:
            answer = Message(role="assistant", content=one.answers[one.right[0]].strip())
            turns += [*one.turns, answer]
        demonstrations = "".join(one.demonstration for one in shown)
        prompt = self.prompt + demonstrations if MASK in self.prompt else demonstrations + self.prompt
        return replace(self, prompt=prompt, turns=[*turns, *self.turns], shown=tuple(shown))

    def without_first(self, count: int) -> "Row":
        """This row without its first `count` demonstrations."""
        whole, rest = ("".join(one.demonstration for one in shown) for shown in (self.shown, self.shown[count:]))
        return replace(
            self, prompt=self.prompt.replace(whole, rest, 1), turns=self.turns[2 * count :], shown=self.shown[count:]
        )
