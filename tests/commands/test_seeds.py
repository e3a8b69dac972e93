"""``--seeds``: what is run for each seed, what is run again, and the table of means."""

import json
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from jsonargparse import Namespace

from cli_runs import CONFIGS, Runs, parsed
from zolightning.commands import seeds

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]
LOSSES = {0: 0.5, 1: 0.25, 2: 0.6}


class Processes:
    """In the place of processes: leaves what a run leaves, and ends with the status that is due."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[Namespace] = []
        self.statuses: dict[int, int] = {}
        monkeypatch.setattr(seeds, "_run", self.run)

    def run(self, words: Sequence[str]) -> int:
        config = parsed([*words]).fit
        self.started.append(config)
        settings = config.trainer.logger.init_args
        folder = Path(settings.save_dir, settings.name, f"version_{settings.version}")
        if config.ckpt_path is None:
            folder.mkdir(parents=True)
            settings_of_all = Path(words[2]).read_text()
            (folder / "config.yaml").write_text(f"{settings_of_all}seed_everything: {config.seed_everything}\n")
            (folder / "ledger.bin").touch()
        else:
            folder = Path(words[2]).parent
        status = self.statuses.get(config.seed_everything, 0)
        state = "finished" if status == 0 else "running"
        loss = LOSSES[config.seed_everything]
        measured = {"best": {"step": 3, "val/loss": loss}, "test": {"test/loss": 2 * loss, "test/reward": None}}
        (folder / "metrics.json").write_text(json.dumps({"state": state, **measured}))
        return status

    @property
    def seeds(self) -> list[int]:
        found = [config.seed_everything for config in self.started]
        self.started = []
        return found


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def run(runs: Runs, *options: object) -> str:
    with pytest.raises(SystemExit) as ended:
        runs("fit", *options, "--seeds", 0, 1, 2)
    return str(ended.value.code)


def test_each_seed_has_other_rows_and_directions_and_its_own_folder(
    runs: Runs, processes: Processes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(runs) == "None"
    assert [config.data.init_args.seed for config in processes.started] == [0, 1, 2]
    assert [config.trainer.max_steps for config in processes.started] == [6, 6, 6]
    group = runs.version(0).parent / "seeds_0"
    assert all((group / f"seed_{seed}/version_0/metrics.json").is_file() for seed in (0, 1, 2))
    assert all(config.seeds is None for config in processes.started)
    assert processes.seeds == [0, 1, 2]

    results = json.loads((group / "seeds.json").read_text())
    assert {int(seed): of["val/loss"] for seed, of in results["seeds"].items()} == LOSSES
    assert results["mean"] == {"val/loss": pytest.approx(0.45), "test/loss": pytest.approx(0.9)}
    assert results["standard_deviation"]["val/loss"] == pytest.approx(statistics.stdev(LOSSES.values()))

    assert run(runs) == "None" and processes.seeds == []  # all are finished
    assert run(runs, "--method.lr", 0.2) == "None" and processes.seeds == [0, 1, 2]
    assert (group.parent / "seeds_1/seed_2").is_dir() and not (group.parent / "seeds_2").exists()


def test_a_seed_that_fails_is_named_and_the_others_run(runs: Runs, processes: Processes) -> None:
    processes.statuses = {1: 128 + signal.SIGTERM}
    assert run(runs) == "143" and processes.seeds == [0, 1]  # told to stop, it is the last

    processes.statuses = {1: -9}
    assert run(runs) == (
        "error: Not all seeds have run to the end: 1 (exit status -9). The same command tries these again."
    )
    first, second = processes.started
    assert first.ckpt_path == "last" and first.seed_everything == 1  # by its own config.yaml
    assert second.ckpt_path is None and second.seed_everything == 2
    results = json.loads((runs.version(0).parent / "seeds_0/seeds.json").read_text())
    assert results["seeds"].keys() == {"0", "2"} and results["mean"]["val/loss"] == pytest.approx(0.55)


def test_a_signal_reaches_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which ends with its own status, and what SIGTERM did before it does again."""
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = signal.getsignal(signal.SIGTERM)
    assert seeds._run([]) == 143
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ckpt_path", "last"], "`ckpt_path` is last, but `seeds` gives each run its own."),
        (["--checkpoint.dirpath", "x"], "`checkpoint.dirpath` is x, but `seeds` gives"),
        (["--trainer.logger", "false"], "`trainer.logger` is False, but `seeds` needs one"),
        (["--trainer.fast_dev_run", "true"], "`trainer.fast_dev_run` keeps no results, but `seeds` reports them."),
        (["--seeds", "-1"], "`seed_everything` must be at least 0"),
    ],
)
def test_what_does_not_go_with_several_seeds(options: list[str], message: str) -> None:
    config = parsed(["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--seeds", "0", *options]).fit
    with pytest.raises(ValueError, match=message):
        seeds._check("fit", config)


def test_only_what_measures_has_seeds() -> None:
    with pytest.raises(ValueError, match="`seeds` is for fit, validate, test, not for export"):
        seeds._check("export", Namespace(seeds=[0]))
