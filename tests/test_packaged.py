"""``configs/`` and the packaged rows: found from every folder, listed, copied, and in the wheel."""

import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from cli_runs import printed, refused
from zolightning.data.task_files import load_task, task_of
from zolightning.packaged import configs, packaged

ROOT = Path(__file__).parent.parent
FILES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_packaged_files_are_found_from_every_folder(tmp_path: Path) -> None:
    assert packaged("configs/methods/mezo.yaml").read_text().startswith("# MeZO")
    assert (packaged("zolightning/data/sentiment") / "train.jsonl").is_file()
    assert configs() == ROOT / "configs"


def test_own_files_of_that_name_go_first_and_other_names_stay(tmp_path: Path) -> None:
    own = Path("configs/methods/mezo.yaml")
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    assert packaged(own) == own
    for name in ("mezo.yaml", "configs/no-such.yaml", "tests/conftest.py", "/no/such"):
        assert packaged(name) == Path(name)


def test_list_and_copy(tmp_path: Path) -> None:
    listed = {line.split()[0] for line in printed(["configs"]).splitlines()}
    assert listed == FILES
    printed(["configs", "--copy", "mine"])
    assert {f"configs/{path.relative_to('mine').as_posix()}" for path in Path("mine").rglob("*.yaml")} == FILES
    assert refused(["configs", "--copy", "mine"]) == (
        "error: `--copy` is mine, which exists. Name a folder that does not."
    )
    assert refused(["configs", "--copy", "/proc/x"]).startswith("error: `--copy` is /proc/x, where no file can be")


def test_tasks_by_name_are_the_files_of_the_folder() -> None:
    names = {Path(file).stem for file in FILES if Path(file).parent == Path("configs/tasks")}
    assert {load_task(name).name for name in names} == names


def test_all_packages_are_named() -> None:
    """The list stands in pyproject.toml because `configs` lies outside the package there."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("zolightning/**/*.py")}
    assert set(named) == found | {"zolightning.configs"}


@pytest.mark.slow
def test_the_wheel_works_outside_a_checkout(tmp_path: Path) -> None:
    """Built with the setuptools of this environment, and run with its libraries."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "logs", "build", "*.egg-info"))
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    subprocess.run([sys.executable, "-m", *build], check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix("zolightning/") for name in names if name.endswith(".yaml")} == FILES

    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    (packages,) = (tmp_path / "venv/lib").glob("*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    command = ("-m", "zolightning", "fit", "--config", "configs/quickstart.yaml", "--print_config")
    result = subprocess.run(
        [python, *command], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr
    assert "task: sentiment" in result.stdout
    where = "import zolightning.packaged as p; print(p.configs()); print(p.packaged('zolightning/data/sentiment'))"
    result = subprocess.run([python, "-c", where], cwd=tmp_path, env={}, capture_output=True, text=True, timeout=250)
    assert [Path(line).is_relative_to(packages) for line in result.stdout.splitlines()] == [True, True], result.stderr


def test_a_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packaged("~/rows") == tmp_path / "rows"
    task = {"name": "own", "prompt": "{{ text }}", "answers": ["a", "b"], "labels": [0, 1]}
    assert task_of({**task, "folder": "~/rows"}).folder == tmp_path / "rows"
