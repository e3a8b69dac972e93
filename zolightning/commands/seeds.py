"""``--seeds 0 1 2``: the same run once for each seed, one after the other, and a table of their means."""

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from zolightning.checkpoints.checkpoint_io import LAST, replace_text
from zolightning.checkpoints.ledger import LEDGER
from zolightning.checkpoints.resume import folder_settings
from zolightning.commands.checks import check_seed
from zolightning.commands.loggers import renamed
from zolightning.commands.metrics_files import METRICS, as_json
from zolightning.commands.tables import print_table
from zolightning.messages import counted

_SUBCOMMANDS = ("fit", "validate", "test")
_SETTINGS, _RESULTS = "seeds.yaml", "seeds.json"
_TO_GO_ON = (f"checkpoints/{LAST}", LEDGER)
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)


def run_seeds(subcommand: str, config: Namespace, text: str) -> None:
    """Runs a subcommand once for each of ``config.seeds``, each in a process and a folder of its own.

    A seed is both ``seed_everything`` and, where the data have one, ``data.seed``: other directions, and other rows.
    The folders are ``seeds_0/seed_1/version_0`` and so on, below that of the run's name; ``seeds_0`` has the results
    too. The same settings again continue there: seeds that are finished stay, one that was cut short resumes from its
    last step. A seed that fails does not keep the others from running.

    Raises:
        ValueError: naming the setting that does not go with several seeds.
        RuntimeError: when all have run, naming the seeds that failed.
        SystemExit: if a run is told to stop, with its status.
    """
    _check(subcommand, config)
    settings = {key: value for key, value in yaml.safe_load(text).items() if key not in ("seeds", "seed_everything")}
    loggers = settings["trainer"]["logger"]
    own = folder_settings(loggers)
    assert own is not None, "checked"
    group = _group(Path(own["save_dir"]) / own["name"], subcommand, settings)
    seeds = list(dict.fromkeys(config.seeds))
    failed = {}
    for place, seed in enumerate(seeds, start=1):
        folder = _folder(group, seed)
        if _is_done(folder, subcommand == "fit" and config.test_last):
            continue
        print(f"\nseed {seed}, {place} of {len(seeds)}: {folder}", flush=True)
        words = ["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", "last"]
        if subcommand != "fit" or not _can_go_on(folder):
            words = [subcommand, "--config", str(group / _SETTINGS), "--seed_everything", str(seed)]
            name = f"{own['name']}/{group.name}/{folder.parent.name}"
            words += ["--trainer.logger", json.dumps(renamed(loggers, own["name"], name))]
            words += ["--data.init_args.seed", str(seed)] if "seed" in settings["data"].get("init_args", {}) else []
        status = _run(words)
        if status in _STOPPED:
            print(f"\nStopped at seed {seed}. The same command continues.", flush=True)
            raise SystemExit(status if status > 0 else 128 - status)
        if status:
            failed[seed] = status
    _report(group, subcommand, [seed for seed in seeds if seed not in failed])
    if failed:
        names = ", ".join(f"{seed} (exit status {status})" for seed, status in failed.items())
        raise RuntimeError(f"Not all seeds have run to the end: {names}. The same command tries these again.")


def _check(subcommand: str, config: Namespace) -> None:
    if subcommand not in _SUBCOMMANDS:
        raise ValueError(f"`seeds` is for {', '.join(_SUBCOMMANDS)}, not for {subcommand}. Leave it out.")
    for seed in config.seeds:
        check_seed(seed)
    own = folder_settings(config.trainer.logger)
    if own is None:
        raise ValueError(f"`trainer.logger` is {config.trainer.logger}, but `seeds` needs one, for each run's folder.")
    for name, value in (
        ("ckpt_path", config.ckpt_path),
        ("checkpoint.dirpath", config.checkpoint.dirpath),
        ("save_last.dirpath", config.save_last.dirpath),
        ("trainer.logger.version", own.get("version")),
    ):
        if value is not None:
            raise ValueError(f"`{name}` is {value}, but `seeds` gives each run its own. Leave one of them out.")
    if config.trainer.fast_dev_run:
        raise ValueError("`trainer.fast_dev_run` keeps no results, but `seeds` reports them. Leave one of them out.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("`seeds` starts processes itself: use `trainer.devices` in place of torchrun.")


def _group(base: Path, subcommand: str, settings: Mapping[str, Any]) -> Path:
    """The folder of the runs with these settings: the one that there is, or a new one."""
    text = f"# zolightning {subcommand}, once for each seed\n"
    text += yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    number = 0
    while (path := base / f"seeds_{number}" / _SETTINGS).is_file():
        if path.read_text(encoding="utf-8") == text:
            return path.parent
        number += 1
    replace_text(path, text)
    return path.parent


def _folder(group: Path, seed: int) -> Path:
    return group / f"seed_{seed}" / "version_0"


def _metrics(folder: Path) -> dict[str, Any]:
    path = folder / METRICS
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return read


def _is_done(folder: Path, is_tested: bool) -> bool:
    metrics = _metrics(folder)
    is_over = metrics.get("state") in ("finished", "ended", "tested", "validated")
    return is_over and (bool(metrics.get("test")) or not is_tested)


def _can_go_on(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and any((folder / name).is_file() for name in _TO_GO_ON)


def _run(words: Sequence[str]) -> int:
    """Runs the command in a process of its own, to which SIGTERM is passed on; returns its exit status."""
    with subprocess.Popen([sys.executable, "-m", "zolightning", *words]) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            while True:
                try:
                    return process.wait()
                except KeyboardInterrupt:  # Ctrl-C reaches both: the run saves its last step, and ends
                    continue
        finally:
            signal.signal(signal.SIGTERM, before)


def _report(group: Path, subcommand: str, seeds: Sequence[int]) -> None:
    """Prints the seeds' metrics with their means, and writes them to ``seeds.json``."""
    measured = {seed: _numbers(_metrics(_folder(group, seed))) for seed in seeds}
    names = [name for name in next(iter(measured.values()), {}) if all(name in of for of in measured.values())]
    mean: dict[str, float | None] = {}
    deviation: dict[str, float | None] = {}
    for name in names:
        values = [of[name] for of in measured.values()]
        mean[name] = statistics.fmean(values)
        deviation[name] = statistics.stdev(values) if len(values) > 1 else None
    runs = {str(seed): {"folder": str(_folder(group, seed)), **measured[seed]} for seed in seeds}
    replace_text(group / _RESULTS, as_json({"seeds": runs, "mean": mean, "standard_deviation": deviation}))
    if names:
        rows: list[tuple[str, Mapping[str, float | None]]] = [(str(seed), of) for seed, of in measured.items()]
        rows += [("mean", mean), ("standard deviation", deviation)]
        table = [{"seed": head, **{name: _text(of[name]) for name in names}} for head, of in rows]
        print_table(f"{subcommand} with {counted(len(seeds), 'seed')}: {group / _RESULTS}", table)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What a run measured: at its best validation and in its test."""
    found = {**(metrics.get("best") or {}), **metrics.get("validation", {}), **metrics.get("test", {})}
    return {name: value for name, value in found.items() if name != "step" and value is not None}


def _text(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
