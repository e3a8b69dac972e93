"""A run of the command line that is killed at every change of its files, and goes on.

A program: it imports everything once and forks. In a fork, what opens, writes, cuts, renames and deletes files is
replaced by what does the same and kills the process (SIGKILL) at the n-th change: before it, or in the middle of a
write. After a change is before the next one. What changes nothing that another process sees is no moment of its own:
to sync a file, to make a folder that is there, to open a file to append.
"""

import builtins
import io
import json
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cli_runs import Runs
from killed_runs import forked, logged
from zolightning.__main__ import main as zolightning
from zolightning.weights_digest import weights_digest

_OPEN, _PWRITE = io.open, os.pwrite
STEPS = 4
OPTIONS = {
    "--trainer.max_steps": STEPS,
    "--trainer.val_check_interval": 2,
    "--save_last.every_n_train_steps": 3,
    "--method": "LOZO",
    "--method.lr": 0.1,
    "--method.rank": 1,
    "--resampling.interval": 3,
    "--resampling.bases.num_prompts": 2,  # bases that are given, in files beside the ledger
    "--trainer.logger.init_args.name": "run",
}


@dataclass(frozen=True)
class Call:
    """Something that changes a file: by its name, without the number of a process."""

    what: str
    file: str


class Calls:
    """Notes the calls of this process that change files in a folder, and kills it at one of them.

    Args:
        folder: of the files.
        at: which call, from 0; None for none.
        half: whether to kill in the middle of that call, which is a write, instead of before it.
    """

    def __init__(self, folder: Path, at: int | None = None, half: bool = False) -> None:
        self.folder, self.at, self.half = folder, at, half
        self.made: list[Call] = []
        self._names: dict[int, str] = {}  # of files that are open
        self._lock = threading.Lock()  # TensorBoard writes in a thread of its own

    def is_here(self, path: Any) -> bool:
        return not isinstance(path, int) and Path(os.fsdecode(path)).absolute().is_relative_to(self.folder)

    def note(self, what: str, path: Any, write_half: Callable[[], object] = lambda: None) -> None:
        """To be called before a change; does half of it, if it is a write in the middle of which to die."""
        with self._lock:
            if len(self.made) == self.at:
                if self.half:
                    write_half()
                os.kill(os.getpid(), signal.SIGKILL)
            name = str(Path(os.fsdecode(path)).absolute().relative_to(self.folder))
            self.made.append(Call(what, name.replace(str(os.getpid()), "PID")))

    def open(self, path: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        # What has an opener is a temporary file without a name.
        if not set(mode) & set("wax+") or "opener" in kwargs or not self.is_here(path):
            return _OPEN(path, mode, buffering, *args, **kwargs)
        if "w" in mode or not Path(os.fsdecode(path)).exists():
            self.note("open", path)
        raw = _File(self, path, mode.replace("b", "").replace("t", ""))
        self._names[raw.fileno()] = os.fsdecode(path)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

    def pwrite(self, file: int, content: bytes, place: int) -> int:
        if file in self._names:
            self.note("pwrite", self._names[file], lambda: _PWRITE(file, content[: len(content) // 2], place))
        return _PWRITE(file, content, place)

    def by_path(self, name: str) -> Callable[..., Any]:
        own = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_here(path) and not (name == "mkdir" and Path(path).exists()):
                self.note(name, path)
            return own(path, *args, **kwargs)

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, calls are noted."""
        names = ("replace", "rename", "unlink", "remove", "mkdir")
        with ExitStack() as changed:
            for module in (io, builtins):
                changed.enter_context(patch.object(module, "open", self.open))
            for name in names:
                changed.enter_context(patch.object(os, name, self.by_path(name)))
            changed.enter_context(patch.object(os, "pwrite", self.pwrite))
            yield


class _File(io.FileIO):
    """A file that is open to write, below Python's buffers."""

    def __init__(self, calls: Calls, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._calls = calls

    def write(self, content: Any) -> int:
        part, own = memoryview(content).cast("B"), super().write
        self._calls.note("write", self.name, lambda: own(part[: len(part) // 2]))
        return own(content)

    def truncate(self, size: int | None = None) -> int:
        self._calls.note("truncate", self.name)
        return super().truncate(size)


def run(folder: Path, words: list[str], calls: Calls) -> None:
    """A command, of whose calls, if it lives, ``calls.json`` is a list."""
    os.chdir(folder)
    os.environ["PL_GLOBAL_SEED"] = "0"
    with calls.watching(), redirect_stdout(io.StringIO()):
        zolightning(words)
    (folder / "calls.json").write_text(json.dumps([[call.what, call.file] for call in calls.made]))


def first(folder: Path) -> list[str]:
    """The words of the command that begins the run."""
    options = OPTIONS | {"--model.init_args.model_name": folder.parent / "model"}
    return Runs(folder).arguments("fit", *(part for option in options.items() for part in option), method="lozo")


def go_on(folder: Path) -> list[str]:
    """What its user does next: goes on by the run's config.yaml, or begins again where the run has not come to that."""
    config = folder / "logs/run/version_0/config.yaml"
    return ["fit", "--config", str(config), "--ckpt_path", "last"] if config.exists() else first(folder)


def ended(folder: Path) -> dict[str, Any]:
    """What a run is at its end."""
    version = max((folder / "logs/run").glob("version_*"))
    saved = torch.load(version / "checkpoints/last.ckpt", weights_only=True)
    curves = (version / "curves.csv").read_text().splitlines()[1:]
    metrics = json.loads((version / "metrics.json").read_text())
    return {
        "weights": weights_digest(saved["state_dict"]),
        "step": saved["global_step"],
        "state": [flat(state) for state in saved["optimizer_states"]],
        "ledger": (version / "ledger.bin").read_bytes().hex(),
        # But for what is said at each end of a fit
        "logged": {tag: values for tag, values in logged(version).items() if not tag.startswith("best/")},
        "curves": [[row.split(",")[1:3], row.split(",")[-1]] for row in curves if ",run/" not in row],
        "metrics": [metrics[name] for name in ("state", "step", "best", "last")],
        "files": sorted(
            path.relative_to(version).as_posix()
            for path in version.rglob("*")
            if path.is_file() and not path.name.startswith("events")
        ),
        "config": (version / "config.yaml").read_text(),
    }


def flat(state: dict[str, Any]) -> dict[str, str]:
    """An optimizer's state, in which the order of parameters is of no importance."""
    entries = {f"{i}.{name}": value for i, of in state["state"].items() for name, value in of.items()}
    values = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in entries.items()}
    return {name: repr(value) for name, value in sorted(values.items())} | {"groups": repr(state["param_groups"])}


def moments(made: list[list[str]]) -> list[tuple[int, bool]]:
    """At which calls to kill, and whether in the middle of them.

    Of the writes to a file that will take the place of another one, the first is enough; what is appended to
    TensorBoard's files is whole or a part of it, so that in the middle of one is also after the one before.
    """
    found: list[tuple[int, bool]] = []
    for at, (what, file) in enumerate(made):
        is_write = what.endswith("write")
        if is_write and file.endswith(".unfinished") and made[at - 1] == [what, file]:
            continue
        if not (what == "write" and "events" in file):
            found.append((at, False))
        if is_write:
            found.append((at, True))
    return found


def main(folder: Path, share: int, offset: int) -> None:
    """Kills a run, and one that goes on, at a moment in `share`; ``found.json`` says how they ended that went on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    place, stopped = folder / "run", folder / "stopped"
    (stopped / "nothing").mkdir(parents=True)

    def fork(words: list[str], *kill: Any) -> int:
        return forked(partial(run, place, words, Calls(place, *kill)), None, folder / "error.txt")

    def restore(state: Path) -> None:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(state, place)

    def calls_made() -> list[list[str]]:
        made: list[list[str]] = json.loads((place / "calls.json").read_text())
        return made

    restore(stopped / "nothing")
    fork(first(place))
    made, expected = calls_made(), ended(place)
    calls = {"nothing": made}

    third = [at for at, (what, _) in enumerate(made) if what == "pwrite"][2]
    restore(stopped / "nothing")
    fork(first(place), third, True)
    shutil.copytree(place, stopped / "in a step")
    fork(go_on(place))
    calls["in a step"] = calls_made()

    found: list[dict[str, Any]] = []
    kills = [(begun, *moment) for begun, made in calls.items() for moment in moments(made)]
    for begun, at, half in kills[offset::share]:
        restore(stopped / begun)
        code = fork(go_on(place), at, half)
        outcome: dict[str, Any] = {"begun": begun, "at": at, "call": calls[begun][at], "half": half, "code": code}
        if code:
            outcome["left"] = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
            words = go_on(place)
            outcome["words"] = words[1:2] + words[-2:]
            try:
                fork(words)
            except AssertionError as error:
                outcome["error"] = str(error)[-700:]
        if "error" not in outcome:
            result = ended(place)
            outcome["differs"] = [name for name in expected if result[name] != expected[name]]
        found.append(outcome)
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
