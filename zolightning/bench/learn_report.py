"""Tables and curves of ``learn``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from zolightning.bench.learn_results import Curve, Entry, Key, Unit
from zolightning.commands.tables import Record, print_table

Curves = Mapping[Key, Curve]


def print_tables(entries: Sequence[Entry], curves: Curves, limits: Mapping[Unit, float]) -> None:
    """Prints a table for each limit: all entries, each with its best learning rate, and a value for each seed."""
    for unit, limit in limits.items():
        records = [_record(one, curves, unit, limit) for one in entries]
        print_table(f"after {limit:g} {unit} of training", records)
    for one in entries:
        for unit, limit in limits.items():
            best, rates = one.best(curves, unit, limit), sorted(key.lr for key in one.keys)
            if best is not None and len(rates) > 1 and best.lr in (rates[0], rates[-1]):
                end = "smallest" if best.lr == rates[0] else "largest"
                print(f"{one.name}: lr {best.lr:g}, best by {unit}, is the {end} of its grid; another may be better.")


def draw(path: Path, entries: Sequence[Entry], curves: Curves, limits: Mapping[Unit, float]) -> None:
    """Draws validation loss and accuracy over forwards and over time, a line a run at an entry's best learning rate.

    Nothing is drawn where no run has been finished.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("No curves are drawn, for matplotlib is missing; the same command draws them where it is.")
        return
    unit, limit = next(iter(limits.items()))
    if not any(one.best(curves, unit, limit) for one in entries):
        return  # no run has been finished
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, one in enumerate(entries):
        best = one.best(curves, unit, limit)
        for place, key in enumerate([] if best is None else _seeds(best, curves)):
            lines = list(curves[key].validated.values())
            for row, quantity in enumerate(("loss", "accuracy")):
                for column, spent in enumerate(("forwards", "seconds")):
                    xs, ys = [getattr(line, spent) for line in lines], [getattr(line, quantity) for line in lines]
                    label = f"{one.name}, lr {key.lr:g}" if place == 0 else None
                    panels[row, column].plot(xs, ys, color=f"C{number}", marker=".", linewidth=1.2, label=label)
    for row, quantity in enumerate(("val/loss", "val/accuracy")):
        panels[row, 0].set_ylabel(quantity)
    for column, spent in enumerate(("forwards (a backward counts as two)", "seconds of training")):
        panels[1, column].set_xlabel(spent)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    print(f"\ncurves: {path}")


def _seeds(best: Key, curves: Curves) -> list[Key]:
    """`best`, and the finished runs that differ from it in their seed only."""
    others = [key for key in curves if key != best and curves[key].tested and _unseeded(key) == _unseeded(best)]
    return [best, *others]


def _unseeded(key: Key) -> tuple[str, str, str, float]:
    return key.setting, key.task, key.entry, key.lr


def _record(one: Entry, curves: Curves, unit: Unit, limit: float) -> Record:
    tried = f"{len(one.finished(curves))} of {len(one.keys)}"
    columns = ("val/loss", "val/accuracy", "test/accuracy", "forwards", "seconds")
    best = one.best(curves, unit, limit)
    if best is None:
        return {"entry": one.name, "tried": tried, "lr": None, **dict.fromkeys(columns)}
    runs = [curves[key] for key in _seeds(best, curves)]
    lines = [run.best(unit, limit) for run in runs]
    tests = [run.test(unit, limit) for run in runs]
    ends = [run.within(unit, limit)[-1] for run in runs]
    return {
        "entry": one.name + (", diverged" if any(run.has_diverged for run in runs) else ""),
        "tried": tried,
        "lr": f"{best.lr:g}",
        "val/loss": ", ".join(f"{line.loss:.3f}" for line in lines),
        "val/accuracy": ", ".join(f"{100 * line.accuracy:.1f}" for line in lines),
        "test/accuracy": ", ".join("-" if test is None else f"{100 * test.accuracy:.1f}" for test in tests),
        "forwards": round(mean(end.forwards for end in ends)),
        "seconds": round(mean(end.seconds for end in ends)),
    }
