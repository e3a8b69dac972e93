"""What a reward is."""

from collections.abc import Callable, Iterable, Sequence

Reward = Callable[[str, Sequence[str]], float]


def rewards_of(reward: Reward, texts: Iterable[str], references: Iterable[Sequence[str]]) -> list[float]:
    """The rewards of several texts, together if `reward` has a method `all_of`, as InProcesses has."""
    pairs = list(zip(texts, references, strict=True))
    together = getattr(reward, "all_of", None)
    values = [reward(*pair) for pair in pairs] if together is None else together(pairs)
    return [float(value) for value in values]
