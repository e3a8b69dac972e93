"""``zolightning report``: runs side by side, as a page, a file of metrics and a table of curves."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from zolightning.checkpoints.checkpoint_io import require_writable
from zolightning.commands.metrics_files import as_json, curves_csv, run_metrics
from zolightning.commands.report_page import page
from zolightning.commands.run_folder import PLACES, Run, read_run
from zolightning.commands.sweep_results import flat
from zolightning.commands.tables import print_table
from zolightning.messages import counted


def main(arguments: Sequence[str]) -> None:
    """Runs the command on its arguments.

    Raises:
        ValueError: if a folder is not that of a run or has no curve yet, or `--output` does not end with .html, or
            cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="zolightning report",
        description="Compares runs, finished or not: writes report.html (one page: results, curves against steps, "
        "forward passes and time, memory, the settings that differ, the commands), report.json (the numbers of its "
        "tables) and report.csv (all curves).",
        epilog="For example: zolightning report logs/sst2-mezo/version_0 logs/sst2-lozo/version_0",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="RUN", help="folder of a run, or one that holds version_0, version_1, ..."
    )
    parser.add_argument(
        "--output", default="report.html", metavar="FILE", help="the page (default: report.html); the others next to it"
    )
    parser.add_argument("--title", help="heading of the page")
    given = parser.parse_args(arguments)
    output = Path(given.output)
    if output.suffix != ".html":
        raise ValueError(f"`--output` must end with .html, got {output}.")
    require_writable("--output", output.parent)
    runs = [run for folder in dict.fromkeys(map(Path, given.folders)) for run in _runs_in(folder)]
    if len(runs) > len(ascii_uppercase):
        raise ValueError(f"{len(runs)} runs are given, but a page shows at most {len(ascii_uppercase)}.")
    differences = differing_settings(runs)
    files = {
        output: page(runs, differences, given.title or _title(runs)),
        output.with_suffix(".json"): as_json(metrics(runs, differences)),
        output.with_suffix(".csv"): curves_csv(runs),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    print_table("runs", [_row(run) for run in runs])
    print(f"\nwritten: {', '.join(map(str, files))}")


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that differ between runs: by dotted name, the value in each run, None where it has none."""
    settings = [dict(flat(run.config)) for run in runs]
    names = (name for of_run in settings for name in of_run if not name.startswith((*PLACES, "ckpt_path")))
    found = {name: [of_run.get(name) for of_run in settings] for name in names}
    return {
        name.replace(".init_args", "").removesuffix(".class_path"): _short(values) if "class_path" in name else values
        for name, values in sorted(found.items())
        if any(value != values[0] for value in values)
    }


def _short(class_paths: Sequence[Any]) -> list[Any]:
    return [path.rpartition(".")[2] if isinstance(path, str) else path for path in class_paths]


def metrics(runs: Sequence[Run], differences: dict[str, list[Any]]) -> dict[str, Any]:
    """What the page's tables say, as plain values."""
    found = [
        run_metrics(run) | {"settings": {name: values[i] for name, values in differences.items()}}
        for i, run in enumerate(runs)
    ]
    return {"runs": found}


def _runs_in(folder: Path) -> list[Run]:
    """The run of a folder; or those of its versions that have trained, where it holds versions only."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    versions = sorted(folder.glob("version_*"), key=lambda path: (len(path.name), path.name))
    if not versions or (folder / "config.yaml").exists():
        return [read_run(folder)]
    runs = []
    for version in versions:
        try:
            runs.append(read_run(version))
        except ValueError as error:  # of `zolightning test`, or of a run that ended before its first step
            print(f"left out: {error}")
    if not runs:
        raise ValueError(f"{folder} holds {counted(len(versions), 'version')}, but none has trained.")
    return runs


def _title(runs: Sequence[Run]) -> str:
    tasks = [((run.config.get("data") or {}).get("init_args") or {}).get("task") for run in runs]
    found = (task.get("name") if isinstance(task, dict) else task for task in tasks)
    names = dict.fromkeys(str(name) for name in found if name)
    return f"{', '.join(names) or 'Training'}: {counted(len(runs), 'run')}"


def _row(run: Run) -> dict[str, Any]:
    """A line of the table on the screen."""
    best = run.best
    return {
        "run": str(run.folder),
        "state": run.state,
        "step": str(run.step),
        "forwards": None if run.spent.forward_passes is None else str(run.spent.forward_passes),
        "seconds": run.spent.seconds,
        "monitor": run.monitor,
        "before": run.at(run.monitor or "", 0),
        "best": best and best.value,
        "at step": best and str(best.step),
        "test": run.test.get((run.monitor or "").replace("val", "test", 1)),
    }
