"""Which method learns most: ``python -m zolightning.bench learn``.

Entries are files of ``configs/`` and settings as for ``zolightning fit``: any model, method, scope, or combination.
Each is trained with every learning rate of a grid, of the same size for all, then with further seeds at the learning
rate of the least validation loss: found at equal forwards for the table at equal forwards, at equal seconds of training
for the table at equal time. An entry that measures its learning rate (``lr_probe``) has no grid, and pays for what it
measures. A run goes on until it has used up both limits, so one run mostly serves both tables. What is tested is the
weights with the least validation loss within the limit. Lines are appended to a CSV file as they are known; the same
command again passes over finished runs and goes on with the others from their last checkpoint. At the end it prints the
tables and draws all curves beside the file.

The length of a run is estimated after each step: the steps that what is left of its limits will do for, at the mean
cost of a step so far. ``WarmupDecay`` and ``lr_probe`` go by it, so that a rate that falls to 0 does so where the run
ends. Under two limits that is the later one, and the table of the other shows a rate that has not fallen yet.

  python -m zolightning.bench learn --forwards 600 --seconds 120 --grid 0.3 1 3 --seeds 0 1 \\
    --config "configs/tasks/sst2.yaml configs/models/smollm2_135m.yaml data.path=SST2" \\
    --entry "MeZO: configs/methods/mezo.yaml" --entry "one layer: configs/methods/mezo.yaml scope=DominantLayer"

Runs as long as the papers', which no CPU can do: ``--preset papers`` with a ``--config`` as above. On a GPU, with a
model as small as SmolLM2-135M, ``evaluation.cuda_graphs=true evaluation.evaluations_per_forward=8`` may go into it.
"""

import argparse
import hashlib
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.bench.learn_entries import callbacks, described, learning_rate, make, read, with_learning_rate
from zolightning.bench.learn_report import draw, print_tables
from zolightning.bench.learn_results import Entry, Key, Unit
from zolightning.bench.learn_results import read as read_curves
from zolightning.bench.learn_run import CLOCKS, Limits, Stopped, train
from zolightning.bench.measure import require
from zolightning.commands.output import quiet
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
    """The arguments of the command.

    Attributes:
        entries: files and settings of each entry, by its name.
        config: files and settings shared by all entries; an entry's own replace them.
        forwards: number of forwards that a run may use; None: any.
        seconds: seconds of training that a run may use; None: any.
        grid: factors of each entry's learning rate.
        seeds: seeds of the sampled rows, their order and the directions; the grid uses the first.
        validations: number of validations of a run within its first limit.
        clock: what counts the seconds: "wall" or "cpu".
        device: ``cuda`` or ``cpu``.
        time_limit: seconds after which the command begins no step; None: no limit.
        output: file to append to.
        folder: folder of the checkpoints.
    """

    entries: dict[str, str]
    config: str = ""
    forwards: int | None = None
    seconds: float | None = None
    grid: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    validations: int = 20
    clock: str = "wall"
    device: str = "cuda"
    time_limit: float | None = None
    output: Path = Path("logs/evidence/learn.csv")
    folder: Path = Path("logs/learn-runs")

    def limits(self) -> dict[Unit, float]:
        """The limits that are given, by unit."""
        given: dict[Unit, float | None] = {"forwards": self.forwards, "seconds": self.seconds}
        return {unit: limit for unit, limit in given.items() if limit is not None}


def entry(settings: Settings, name: str, words: str) -> Entry:
    """Reads an entry.

    Raises:
        ValueError: naming the entry and what is wrong with it.
    """
    try:
        config = read(f"{settings.config} {words}")
        lr = learning_rate(config)
        callbacks(config)  # what is wrong with them is said before the first run
        data = make(config, "data").data
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"`--entry` {name!r}: {error}") from None
    depends_on = [described(config), settings.limits(), settings.validations, settings.clock, settings.device]
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:8]
    task = data.task.name if isinstance(data, PromptDataModule) else type(data).__name__
    grid = settings.grid if config.lr_probe is None else (1.0,)
    keys = [Key(digest, task, name, float(f"{lr * factor:.6g}"), settings.seeds[0]) for factor in grid]
    return Entry(name, config, tuple(keys))


def run(settings: Settings) -> None:
    """Makes the runs that are not finished, one after the other, and says what all of them found."""
    require(torch.device(settings.device))
    entries = [entry(settings, name, words) for name, words in settings.entries.items()]
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
            except Exception:  # such as too little memory, which others may do with
                traceback.print_exc()
                failed.append(f"{key.entry}, lr {key.lr:g}, seed {key.seed}")
    except Stopped:
        print("The time is over; the same command goes on.")
    curves = read_curves(settings.output)
    print_tables(entries, curves, settings.limits())
    draw(settings.output.with_suffix(".png"), entries, curves, settings.limits())
    if failed:
        raise SystemExit(f"Runs that failed, and why is said above: {'; '.join(failed)}.")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the benchmark to a parser."""
    add = parser.add_argument
    add("--entry", action="append", default=[], metavar='"NAME: WORDS"', help="files and settings; as many as wanted")
    add("--preset", choices=("papers",), help="the published methods, and AdamW, for 40,000 forwards each")
    add(
        "--config",
        action="append",
        default=[],
        metavar="WORDS",
        help="files and settings of all entries, before theirs",
    )
    add("--forwards", type=int, help="of each run; a backward counts as two")
    add("--seconds", type=float, help="of training in each run")
    add("--grid", nargs="+", type=float, default=Settings.grid, help="factors of each entry's learning rate")
    add("--seeds", nargs="+", type=int, default=Settings.seeds, help="the first one is the grid's")
    add("--validations", type=int, default=Settings.validations, help="of a run")
    add("--clock", choices=CLOCKS, default=Settings.clock, help="cpu: time of this process, on shared machines")
    add("--device", choices=("cuda", "cpu"), default=Settings.device, help="where to run")
    add("--time-limit", type=float, help="seconds of this command after which no step is begun")
    add("--output", type=Path, default=Settings.output, help="file to append to")
    add("--folder", type=Path, default=Settings.folder, help="of the checkpoints")


def run_command(arguments: argparse.Namespace) -> None:
    """Runs the benchmark."""
    settings = {
        field.name: getattr(arguments, field.name) for field in fields(Settings) if hasattr(arguments, field.name)
    }
    settings |= {name: tuple(settings[name]) for name in ("grid", "seeds")} | {"config": " ".join(arguments.config)}
    entries = dict(PAPERS) if arguments.preset else {}
    for text in arguments.entry:
        name, colon, words = text.partition(":")
        if not colon or not words.strip():
            raise SystemExit(f'`--entry` must be a name and files or settings, "MeZO: FILE", got {text!r}.')
        entries[name.strip()] = words
    if not entries:
        raise SystemExit("`--entry` or `--preset` must be given: there is nothing to compare.")
    if arguments.preset and arguments.forwards is None and arguments.seconds is None:
        settings["forwards"] = PAPERS_FORWARDS
    if settings["forwards"] is None and settings["seconds"] is None:
        raise SystemExit("`--forwards` or `--seconds` must be given, or both: they say when a run ends.")
    for name in ("forwards", "seconds", "validations"):
        if settings[name] is not None and not settings[name] > 0:
            raise SystemExit(f"`--{name}` must be positive, got {settings[name]}.")
    try:
        run(Settings(entries=entries, **settings))
    except ValueError as error:
        raise SystemExit(str(error)) from error
