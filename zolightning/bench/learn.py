"""Which method learns most: ``python -m zolightning.bench learn``.

Entries are files of ``configs/`` and settings as for ``zolightning fit``: any model, method, scope, or combination.
Each is trained with every learning rate of a grid, of the same size for all, then with further seeds at the learning
rate with the lowest validation loss: found at equal forwards for the table at equal forwards, at equal seconds of
training for the table at equal time. An entry that measures its learning rate (``lr_probe``) has no grid, and its
measurements count. A run goes on until it has used up both limits, so one run usually serves both tables. The weights
with the lowest validation loss within the limit are tested. Lines are appended to a CSV file as they are known; the
same command again skips finished runs and resumes the others from their last checkpoint. At the end it prints the
tables and draws all curves beside the file.

The length of a run is estimated after each step: the steps that the rest of its limits suffices for, at the mean cost
of a step so far. ``WarmupDecay`` and ``lr_probe`` use this estimate, so that a rate that falls to 0 does so where the
run ends. Under two limits that is the later one, and the table of the other shows a rate that has not fallen yet.

  python -m zolightning.bench learn --forwards 600 --seconds 120 --grid 0.3 1 3 --seeds 0 1 \\
    --config "configs/tasks/sst2.yaml configs/models/smollm2_135m.yaml data.path=SST2" \\
    --entry "MeZO: configs/methods/mezo.yaml" --entry "one layer: configs/methods/mezo.yaml scope=DominantLayer"

Runs as long as the papers', which no CPU can do: ``--preset papers`` with a ``--config`` as above. On a GPU, with a
model as small as SmolLM2-135M, ``evaluation.cuda_graphs=true evaluation.evaluations_per_forward=8`` may go into it.
"""

import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.bench.learn_entries import callbacks, described, learning_rate, make, read, with_learning_rate
from zolightning.bench.learn_results import Entry, Key, Unit, draw, print_tables
from zolightning.bench.learn_results import read as read_curves
from zolightning.bench.learn_run import Limits, Stopped, train
from zolightning.bench.measure import require
from zolightning.bench.options import Clock, Device, option
from zolightning.commands.quiet import quiet
from zolightning.data import PromptDataModule

# One layer gains more where what lies below it is computed once a step, which leaves both out.
_ONE_LAYER = "evaluation.cuda_graphs=false evaluation.evaluations_per_forward=1"
PAPERS = {
    "MeZO": "configs/methods/mezo.yaml",
    "MeZO, dominant layer": f"configs/methods/mezo.yaml scope=DominantLayer {_ONE_LAYER}",
    "HiZOO": "configs/methods/hizoo.yaml",
    "Sparse-MeZO": "configs/methods/sparse_mezo.yaml",
    "MeZO-BCD": f"configs/blocks/mezo_bcd.yaml {_ONE_LAYER}",
    "FOCUS (reconstructed)": f"configs/blocks/focus.yaml {_ONE_LAYER}",
    "LOZO": "configs/methods/lozo.yaml",
    "SubZero": "configs/methods/subzero.yaml",
    "ZO-Muon": "configs/methods/zo_muon.yaml",
    "ZO-MOPI": "configs/methods/zo_mopi.yaml",
    "AdamW": "configs/methods/adamw.yaml data.batch_size=8",
}
PAPERS_FORWARDS = 40_000


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    entry: list[str] = option("files and settings; as many as wanted", [], action="extend", metavar='"NAME: WORDS"')
    preset: Literal["papers"] | None = option("the published methods, and AdamW, for 40,000 forwards each", None)
    config: list[str] = option("files and settings of all entries, before theirs", [], action="extend", metavar="WORDS")
    forwards: int | None = option("of each run; a backward counts as two", None)
    seconds: float | None = option("of training in each run", None)
    grid: list[float] = option("factors of each entry's learning rate", [1.0])
    seeds: list[int] = option("of the sampled rows, their order and the directions; the first one is the grid's", [0])
    validations: int = option("of a run within its first limit", 20)
    clock: Clock = option("cpu: time of this process, on shared machines", "wall")
    device: Device = option("where to run", "cuda")
    time_limit: float | None = option("seconds of this command after which no step is begun", None)
    output: Path = option("file to append to", Path("logs/evidence/learn.csv"))
    folder: Path = option("of the checkpoints", Path("logs/learn-runs"))

    def __post_init__(self) -> None:
        if not self.entries():
            raise SystemExit("`--entry` or `--preset` must be given: there is nothing to compare.")
        if not self.preset and self.forwards is None and self.seconds is None:
            raise SystemExit("`--forwards` or `--seconds` must be given, or both: they say when a run ends.")
        for name in ("forwards", "seconds", "validations"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SystemExit(f"`--{name}` must be positive, got {value}.")

    def limits(self) -> dict[Unit, float]:
        """The limits by unit."""
        given: dict[Unit, float | None] = {"forwards": self.forwards, "seconds": self.seconds}
        return {unit: limit for unit, limit in given.items() if limit is not None} or {"forwards": PAPERS_FORWARDS}

    def entries(self) -> dict[str, str]:
        """Files and settings of each entry, by its name."""
        found = dict(PAPERS) if self.preset else {}
        for text in self.entry:
            name, colon, words = text.partition(":")
            if not colon or not words.strip():
                raise SystemExit(f'`--entry` must be a name and files or settings, "MeZO: FILE", got {text!r}.')
            found[name.strip()] = words
        return found


def entry(settings: Settings, name: str, words: str) -> Entry:
    """Reads an entry.

    Raises:
        SystemExit: naming the entry and what is wrong with it.
    """
    try:
        config = read(" ".join([*settings.config, words]))
        lr = learning_rate(config)
        callbacks(config)  # their errors are raised before the first run
        data = make(config, "data").data
    except (MisconfigurationException, ValueError) as error:
        raise SystemExit(f"`--entry` {name!r}: {error}") from None
    depends_on = [described(config), settings.limits(), settings.validations, settings.clock, settings.device]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:8]
    task = data.task.name if isinstance(data, PromptDataModule) else type(data).__name__
    grid = settings.grid if config.lr_probe is None else [1.0]
    keys = [Key(digest, task, name, float(f"{lr * factor:.6g}"), settings.seeds[0]) for factor in grid]
    return Entry(name, config, tuple(keys))


def run(settings: Settings) -> None:
    """Makes the runs that are not finished, one after the other, and prints what all of them found."""
    require(torch.device(settings.device))
    entries = [entry(settings, name, words) for name, words in settings.entries().items()]
    end = None if settings.time_limit is None else time.monotonic() + settings.time_limit
    limits = Limits(settings.limits(), settings.clock, settings.validations, end)
    failed = []
    try:
        for one, key in _unfinished(settings, entries):
            if end is not None and time.monotonic() >= end:
                raise Stopped
            folder = settings.folder / f"{key.setting}-lr-{key.lr:g}-seed-{key.seed}"
            config = with_learning_rate(one.config, key.lr)
            try:
                with quiet():
                    train(key, config, limits, settings.device, settings.output, folder)
            except Stopped:
                raise
            except Exception:  # such as too little memory, which may suffice for others
                traceback.print_exc()
                failed.append(f"{key.entry}, lr {key.lr:g}, seed {key.seed}")
    except Stopped:
        print("The time is over; the same command continues.")
    curves = read_curves(settings.output)
    print_tables(entries, curves, settings.limits())
    draw(settings.output.with_suffix(".png"), entries, curves, settings.limits())
    if failed:
        raise SystemExit(f"Runs that failed, for the reasons above: {'; '.join(failed)}.")


def _unfinished(settings: Settings, entries: Sequence[Entry]) -> Iterator[tuple[Entry, Key]]:
    """The runs of the grid, and when all of an entry's are finished, those of further seeds."""
    for number in range(len(settings.grid)):
        for one in entries:
            for key in one.keys[number : number + 1]:
                if not read_curves(settings.output)[key].tested:
                    yield one, key
    for seed in settings.seeds[1:]:
        for one in entries:
            for unit, limit in settings.limits().items():
                curves = read_curves(settings.output)
                best = one.best(curves, unit, limit)
                if best is None or len(one.finished(curves)) < len(one.keys):
                    continue  # a run of the grid has failed
                key = replace(best, seed=seed)
                if not curves[key].tested:
                    yield one, key
