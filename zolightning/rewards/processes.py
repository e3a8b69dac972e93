"""Slow or unsafe rewards in processes of their own, with a time limit."""

from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any


class InProcesses:
    """Runs a reward in other processes; an error, a crash or too long a run is a reward of 0, and counted.

    Needs pebble: ``pip install 'zolightning[rewards]'``. Such a process is no sandbox: what a model writes and a reward
    runs can read and delete your files.

    Args:
        reward: A function of (text, references), which can be pickled: at the top level of a module.
        processes: How many run at once.
        timeout: Seconds for one text. A process that takes longer is killed.

    Attributes:
        failures: How many texts got 0 because their reward failed, by the name of the error.

    Raises:
        ImportError: pebble is not installed.
        ValueError: A number is out of range.
    """

    def __init__(
        self, reward: Callable[[str, Sequence[str]], float], processes: int = 2, timeout: float = 10.0
    ) -> None:
        if processes < 1:
            raise ValueError(f"`processes` must be at least 1, got {processes}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, got {timeout}.")
        try:
            import pebble
        except ImportError:
            raise ImportError("`InProcesses` needs pebble: pip install 'zolightning[rewards]'") from None
        self.reward = reward
        self.processes = processes
        self.timeout = timeout
        self.failures: dict[str, int] = {}
        self._make_pool: Callable[[], Any] = lambda: pebble.ProcessPool(max_workers=processes)
        self._pool: Any = None

    def __call__(self, text: str, references: Sequence[str]) -> float:
        return self.all_of([(text, references)])[0]

    def all_of(self, pairs: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """The rewards of several texts, evaluated together."""
        if self._pool is None:  # in the process that uses it, after ranks have been made
            self._pool = self._make_pool()
        futures = [self._pool.schedule(self.reward, args=list(pair), timeout=self.timeout) for pair in pairs]
        return [self._value(future) for future in futures]

    def _value(self, future: Any) -> float:
        try:
            return float(future.result())
        except FutureTimeoutError:
            name = "timeout"
        except Exception as error:  # whatever a user's function raises, or its process dies of
            name = type(error).__name__
        self.failures[name] = self.failures.get(name, 0) + 1
        return 0.0
