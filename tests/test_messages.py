"""Words that messages have in common."""

import pytest

from zolightning.messages import counted, rough_duration


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("step",), "0 steps"),
        (1, ("step",), "1 step"),
        (1200, ("step",), "1,200 steps"),
        (1, ("class", "classes"), "1 class"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_counted(number: int, words: tuple[str, ...], expected: str) -> None:
    assert counted(number, *words) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (119, "119 s"), (150.1, "3 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_rough_duration(seconds: float, expected: str) -> None:
    assert rough_duration(seconds) == expected
