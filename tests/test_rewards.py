"""Rewards of texts, alone and in processes."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zolightning
from zolightning.models import CausalLM
from zolightning.rewards import Countdown, InProcesses, Pattern, UnitTests
from zolightning.rewards.reward import rewards_of


class TwoWordsError(Exception):
    """An error that can be sent to another process, but not be read there."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


def unruly(text: str, references: Sequence[str]) -> float:
    if text == "raise":
        raise KeyError(text)
    if text == "two":
        raise TwoWordsError("one", "two")
    if text == "interrupt":
        raise KeyboardInterrupt
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "nan":
        return float("nan")
    if text == "exit":  # as a program that a model writes may do
        sys.exit("all done")
    return len(text)


def fails(text: str, references: Sequence[str]) -> float:
    raise KeyError("a reason")


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        (r"is {reference}\b", "it is 42.", 1),
        (r"is {reference}\b", "it is 420", 0),
        (r"is {reference}\b", "it is a+b", 1),  # a reference is no pattern
        (r"^\d+$", "17", 1),
        (r"^\d+$", "17 or so", 0),
    ],
)
def test_a_pattern(pattern: str, text: str, expected: int) -> None:
    assert Pattern(pattern)(text, ["42", "a+b"]) == expected


def test_a_pattern_without_a_reference() -> None:
    reward = Pattern("s.x")
    reward.check([])
    assert reward("six", []) == 1


def test_a_pattern_for_a_reference_that_a_row_has_not() -> None:
    reward = Pattern("is {reference}")
    reward.check(["42"])
    with pytest.raises(ValueError, match=r"the pattern 'is \{reference\}' needs a reference, but the row has none"):
        reward.check([])


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"`pattern` is not a regular expression: .*unterminated"):
        Pattern("(a|b")


def test_a_reward_that_fails_is_zero_and_counted() -> None:
    reward = InProcesses(unruly, processes=2, timeout=2.0)
    texts = ["four", "raise", "hang", "die", "sixsix", "raise", "nan", "", "exit", "two", "interrupt", "six"]
    with pytest.warns(UserWarning, match="A reward failed and counts as 0: ") as warned:
        assert reward.all_of([(text, []) for text in texts]) == [4, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 3]
    failures = {"KeyError": 2, "timeout": 1, "ProcessExpired": 1, "ValueError": 1, "SystemExit": 1}
    assert reward.failures == failures | {"TwoWordsError": 1, "KeyboardInterrupt": 1}
    assert sum("A reward failed" in str(warning.message) for warning in warned) == 7  # one of each kind
    assert reward("seven77", []) == 7  # in a new process
    assert copy.deepcopy(reward)("seven77", []) == 7  # in processes of its own


def of_a_product(text: str, references: Sequence[str]) -> float:
    ones = torch.ones(512, 512)
    return float((ones @ ones).mean())


@pytest.mark.timeout(60)
def test_a_reward_that_computes_with_torch() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        of_a_product("", [])  # starts threads, which forked processes do not have
        assert InProcesses(of_a_product, processes=1, timeout=5.0)("", []) == 512
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "value", [None, float("nan"), float("inf"), pytest.param(10**400, id="huge"), "0.5", [1.0], torch.ones(2)]
)
def test_a_reward_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"`model\.reward` must return a finite number, got .* for the text 'six'"):
        rewards_of(lambda text, references: value, ["six"], [["6"]])


def test_a_reward_that_raises_is_named_with_its_line_and_the_text() -> None:
    where = rf"test_rewards\.py, line {fails.__code__.co_firstlineno + 1}\)"
    message = (
        rf"`model\.reward` fails raised KeyError: 'a reason' \(.*{where}, for the text 'six' and the references \['6'\]"
    )
    with pytest.raises(ValueError, match=message) as raised:
        rewards_of(fails, ["six"], [["6"]])
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda prompts, completions, **columns: [1.0], "which takes whole batches, like TRL's rewards. Write a func"),
        (lambda text: 1.0, r"`reward` is <lambda>\(text\), which does not take a text and its references"),
        (lambda text, references, key: 1.0, "which does not take a text and its references"),
        (len, "`reward` is len.*which does not take a text and its references"),
    ],
)
@pytest.mark.parametrize("make", [partial(CausalLM, "no-model"), InProcesses])
def test_functions_of_something_else_are_refused_at_once(
    make: Callable[..., Any], reward: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(reward=reward)


def test_a_function_in_c_may_have_no_signature() -> None:
    assert InProcesses(max).reward is max  # type: ignore[arg-type]


def test_a_reward_that_other_processes_cannot_have() -> None:
    with pytest.raises(ValueError, match=r"`reward` cannot be sent to other processes: .*lambda"):
        InProcesses(lambda text, references: 1.0)


def test_as_many_rewards_as_texts() -> None:
    def reward(text: str, references: Sequence[str]) -> float:
        return 1.0

    reward.all_of = lambda pairs: [1.0]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"`all_of` of `model.reward` must return 2 numbers for as many texts, got 1"):
        rewards_of(reward, ["one", "two"], [[], []])


@pytest.mark.parametrize("value", [True, 1, np.float32(1), torch.ones(())])
def test_a_reward_that_is_a_number(value: Any) -> None:
    assert rewards_of(lambda text, references: value, ["", "six"], [["6"]] * 2) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 * (7 - 5)", 1),
        ("\n 3 * (7 - 5)", 1),
        ("(7-5)*3 = 6", 1),  # what follows an equals sign is not read
        ("7 * 3 - 5 * 3", 0.1),  # 6, with a number twice
        ("3 + 7 - 5", 0.1),  # 5
        ("6", 0.1),
        ("3 / (7 - 5) / 0", 0.1),
        ("3 * 7 - (5 * 3", 0),
        ("3 * (7 - 5) # six", 0),
        ("3.0 * (7 - 5)", 0),
        ("9 ** 9 ** 9", 0),
        ("7 // 3", 0),
        ("3(7 - 5)", 0),
        ("__import__('os').getcwd()", 0),
        ("1+" * 99 + "11", 0.1),
        ("1+" * 99 + "111", 0),
        ("(" * 150 + "1" + ")" * 40, 0),
        ("", 0),
    ],
)
def test_countdown(text: str, expected: float) -> None:
    assert Countdown(format_reward=0.1)(text, ["3 * (7 - 5)"]) == expected
    assert bool(Countdown(format_reward=1.0)(text, ["3 * (7 - 5)"])) == bool(expected)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("8 - 2 + 1", "8 + 1 - 2", "8 - (2 + 1)"),
        ("6 / 3 * 2", "6 * 2 / 3", "6 / (3 * 2)"),
        ("1 / 49 * 49", "49 / 49 * 1", "49 - 1 * 49"),  # in floating point the first one is below 1
        ("2 + 3", "3 + 2", "3 - 2"),
    ],
)
def test_countdown_calculates_with_fractions(reference: str, right: str, wrong: str) -> None:
    reward = Countdown(format_reward=0.1)
    assert [reward(text, [reference]) for text in (reference, right, wrong)] == [1, 1, 0.1]


@pytest.mark.parametrize("text", ["3 / (7 - 7) + 1", "1 + 3 / (7 - 7)"])
def test_a_part_of_an_expression_may_have_no_value(text: str) -> None:
    assert Countdown()(text, ["3 * (7 - 7) + 1"]) == 0.1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 * (7 - 5)", 1),
        ("3 + 7 - 5", 0.2 + 0.6),
        ("3 * 7", 0.2 + 0.6 * 4 / 5),
        ("3 * 3 * 3 + 5", 0.2 + 0.6 * 4 / 7),  # one 3 counts, of three
        ("8", 0.2),
        ("8 +", 0),
    ],
)
def test_countdown_by_the_share_of_the_numbers(text: str, expected: float) -> None:
    reward = Countdown(format_reward=0.2, numbers_reward=0.6)
    assert reward(text, ["3 * (7 - 5)"]) == reward(text, ["1", "3 * (7 - 5)"]) == pytest.approx(expected)


@pytest.mark.parametrize(("rewards", "name"), [((-0.1,), "format"), ((0.4, 0.7), "numbers"), ((0.1, -1), "numbers")])
def test_rewards_of_countdown_out_of_range(rewards: tuple[float, ...], name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}_reward` must be from 0 to .*, got {rewards[-1]}"):
        Countdown(*rewards)


def test_the_rows_of_countdown_are_what_their_program_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(zolightning.__file__).parent / "data" / "countdown"
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1], {})
    for split in ("train", "validation", "test"):
        assert Path(f"{split}.jsonl").read_text() == (folder / f"{split}.jsonl").read_text()
        for row in map(json.loads, Path(f"{split}.jsonl").read_text().splitlines()):
            assert sorted(re.findall(r"\d+", row["solution"])) == sorted(row["numbers"].split())
            assert eval(row["solution"]) == row["target"]


def test_unit_tests() -> None:
    """What ends itself, hangs, or leaves a process behind passes nothing, and is gone afterwards."""
    reward = UnitTests(timeout=2.0, processes=3)
    tests = ["assert double(3) == 6", "assert double('ab') == 'abab'"]
    texts = {
        "def double(x): return 2 * x": 1,
        "So:\n```python\ndef double(x):\n    return x + 3\n```\nDone.": 0.5,
        "from __future__ import annotations\ndef double(x: int): return 2 * x": 1,
        "def double(x: return": 0,
        "import os; os._exit(0)": 0,
        "import os; os._exit(200)": 0,
        "import os; os._exit(1)": 0,
        "while True: print('x' * 1000)": 0,
        "x = 'x' * 10**11": 0,
        "```\ndef double(x): return 2 * x\n```": 1,
        "So: ``` Python3 title=a\ndef double(x): return 2 * x\n```\nIt works.": 1,
        "```py\nimport os\nassert 'PATH' not in os.environ\ndef double(x): return 2 * x": 1,
        "open('large', 'wb').write(bytes(2**21))": 0,
        "import os; os.write(2, b'no text: \\xff'); os._exit(3)": 0,
    }
    assert reward.all_of([(text, tests) for text in texts]) == list(texts.values())
    expected = {"TypeError": 1, "SyntaxError": 2, "exit status 0": 2, "timeout": 2, "MemoryError": 2}
    expected |= {"OSError": 2, "exit status 3": 2, "exit status 1": 2, "exit status 200": 2}
    assert reward.failures == expected
    with pytest.warns(UserWarning, match="UnitTests got a row without references, its tests"):
        assert reward("", []) == 0  # no tests, nothing passed
    assert reward.all_of([("", []), ("", [])]) == [0, 0]
    assert reward.failures == expected | {"no tests": 3}


def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    waits = f"import os, time; number = os.fork() or time.sleep(60); open({str(started)!r}, 'w').write(str(number))"
    assert UnitTests(processes=1)(waits, ["assert number"]) == 1
    assert ends(int(started.read_text()))


@pytest.mark.slow
def test_a_program_ends_after_its_run_was_killed(tmp_path: Path) -> None:
    started = tmp_path / "started"
    program = f"import os; print(os.getpid(), file=open({str(started)!r}, 'w', 1))\nwhile True: pass"
    reward = f"from zolightning.rewards import UnitTests; UnitTests(timeout=1)({program!r}, ['1'])"
    run = subprocess.Popen([sys.executable, "-c", f"import os; os.cpu_count = lambda: 1; {reward}"])
    while not (started.is_file() and started.read_text()):
        assert run.poll() is None
        time.sleep(0.02)
    run.kill()
    run.wait()
    assert ends(int(started.read_text()))


def ends(pid: int) -> bool:
    """Whether a process ends within half a minute; after that it is killed."""
    state = Path(f"/proc/{pid}/status")
    for _ in range(600):
        if not state.exists() or "zombie" in state.read_text():
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize(
    ("reward", "references", "message"),
    [
        (Countdown(), ["six", "3 / (5 - 5)"], r"must be an expression with a value, got \['six', '3 / \(5 - 5\)'\]"),
        (partial(InProcesses, Countdown()), ["six"], "must be an expression with a value"),
        (UnitTests(), [" "], "UnitTests needs a test in each row"),
        (Pattern("is {reference}"), [], "needs a reference, but the row has none"),
    ],
)
def test_references_that_a_reward_cannot_do_with_are_refused(reward: Any, references: list[str], message: str) -> None:
    reward = reward() if isinstance(reward, partial) else reward  # it needs a package
    with pytest.raises(ValueError, match=message):
        reward.check(references)
    if isinstance(reward, Countdown):
        with pytest.raises(ValueError, match=message):
            reward("3", references)


@pytest.mark.parametrize("make", [UnitTests, partial(InProcesses, unruly)])
@pytest.mark.parametrize(
    ("name", "value", "wanted"), [("timeout", 0.0, "a positive number"), ("processes", 0, "an integer, at least 1")]
)
def test_numbers_out_of_range(make: Callable[..., Any], name: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` must be {wanted}.*, got {value}"):
        make(**{name: value})


def test_memory_that_python_does_not_start_with() -> None:
    with pytest.raises(ValueError, match=r"`memory_mib` must be an integer, at least 64, got 63"):
        UnitTests(memory_mib=63)
