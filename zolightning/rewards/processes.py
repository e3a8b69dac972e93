"""Slow or unsafe rewards in processes of their own, with a time limit."""

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import torch

from zolightning.checks import require_integer, require_positive
from zolightning.rank_zero import rank_zero_warn
from zolightning.rewards.reward import Reward, as_number, check_references, check_signature


class InProcesses:
    """Runs a reward in other processes; a failure (error, crash, timeout, no finite number) gives 0 and is counted.

    A warning names the first failure of each kind.

    Needs pebble: ``pip install 'zolightning[rewards]'``. These processes are no sandbox: code that a model writes and
    the reward runs can read and delete your files. A reward that computes with torch has one thread in each of them.

    Args:
        reward: a function of (text, references) that can be pickled, such as one at the top level of a module.
        processes: how many run at once.
        timeout: seconds for one text. A process that takes longer is killed.

    Attributes:
        failures: how many texts got 0 because their reward failed, by the name of the error.

    Raises:
        ImportError: pebble is not installed.
        ValueError: if a number is out of range, or the reward is not such a function.
    """

    def __init__(
        self, reward: Callable[[str, Sequence[str]], float], processes: int = 2, timeout: float = 10.0
    ) -> None:
        require_integer("processes", processes)
        require_positive("timeout", timeout)
        check_signature(reward)
        try:
            pickle.dumps(reward)
        except Exception as error:  # whatever an object that cannot be pickled raises
            raise ValueError(f"`reward` cannot be sent to other processes: {error}.") from None
        try:
            import pebble  # noqa: F401
        except ImportError:
            raise ImportError("`InProcesses` needs pebble: pip install 'zolightning[rewards]'") from None
        self.reward = reward
        self.processes = processes
        self.timeout = timeout
        self.failures: dict[str, int] = {}
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_pool": None}  # a copy has processes of its own

    def __call__(self, text: str, references: Sequence[str]) -> float:
        return self.all_of([(text, references)])[0]

    def all_of(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """The rewards of several texts, evaluated together."""
        if self._pool is None:  # in the process that uses it, after ranks have been made
            from pebble import ProcessPool

            # A forked process does not have the threads that torch has started here, and would wait for them forever.
            self._pool = ProcessPool(self.processes, initializer=torch.set_num_threads, initargs=(1,))
        futures = [self._pool.schedule(_outcome, args=[self.reward, *pair], timeout=self.timeout) for pair in pairs]
        return [self._value(future) for future in futures]

    def check(self, references: Sequence[str]) -> None:
        """Raises what the reward's own ``check`` does, if it has one."""
        check_references(self.reward, references)

    def _value(self, future: Any) -> float:
        try:
            outcome: float | tuple[str, str] = future.result()
        except FutureTimeoutError:
            outcome = "timeout", f"no reward within {self.timeout:g} seconds"
        except Exception as error:  # what its process has died of
            outcome = type(error).__name__, str(error)
        if isinstance(outcome, float):
            return outcome
        name, reason = outcome
        if name not in self.failures:
            rank_zero_warn(f"A reward failed and counts as 0: {name}: {reason}.")
        self.failures[name] = self.failures.get(name, 0) + 1
        return 0.0


def _outcome(reward: Reward, text: str, references: Sequence[str]) -> float | tuple[str, str]:
    """The reward of a text, or the name of an error and its message: other processes cannot read every error."""
    try:
        return as_number(reward(text, references), text)
    except BaseException as error:  # whatever a user's function raises, also what would end the run
        return type(error).__name__, str(error)
