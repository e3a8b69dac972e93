"""What the documents say works: Python blocks run, commands go through the real parsers, links lead somewhere."""

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

import zolightning.bench.__main__ as bench
from documents import DOCUMENTS, PACKAGE, ROOT, blocks, run_python, text
from zolightning.cli import ZerothOrderCLI
from zolightning.data.task_files import load_task
from zolightning.optim.estimators import OneSided

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python(
    document: str,
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(document, make_regression, regression_data(), monkeypatch)


def test_the_task_makes_prompts(tmp_path: Path) -> None:
    ((_, code),) = blocks(PACKAGE, "yaml")
    (tmp_path / "mood.yaml").write_text(code)
    (tmp_path / "my_rows").mkdir()
    task = load_task(str(tmp_path / "mood.yaml"))
    assert task.folder == tmp_path / "my_rows" and task.label == "mood"


# Commands

# Runs a block with `zolightning` and `python` as functions that print what they are given: bash expands its variables,
# loops and line ends. Of other commands the names are checked only.
LISTEN = """
set -eu
say() { printf '%s\\0' "$@"; printf '\\n\\0'; }
zolightning() { say zolightning "$@"; }
python() { say python "$@"; }
command_not_found_handle() { [[ " pip pytest tensorboard ruff mypy pre-commit " == *" $1 "* ]]; }
PATH=/nowhere
"""


def commands(document: str) -> Iterator[list[str]]:
    """Commands of ``bash`` blocks as lists of words."""
    for line, code in blocks(document, "bash"):
        script = LISTEN + re.sub(r"^\.ci/(run|newest|oldest|gpu)\b", ":", code, flags=re.MULTILINE)
        done = subprocess.run(["/bin/bash", "-c", script], cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, f"{document}, line {line}: {done.stderr}"
        for command in done.stdout.split("\n\0"):
            if words := command.split("\0")[:-1]:
                yield words


@pytest.fixture(scope="module")
def parse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[list[str]], Any]]:
    """The real parser, without what comes after it, in a folder where the recommended recipe has been run."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    run = folder / "logs/recommended/version_0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text((ROOT / "configs/recommended.yaml").read_text())
    for document, name in (("README.md", "my_task.yaml"), (PACKAGE, "mood.yaml")):
        ((_, task),) = blocks(document, "yaml")
        (folder / name).write_text(task)
    classes = [code for _, code in blocks(PACKAGE, "python") if "class " in code and ".fit(" not in code]
    reward = "def my_reward(text, references): return 0.0"
    (folder / "my_file.py").write_text("\n".join([*classes, reward]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(ZerothOrderCLI, "instantiate_classes", lambda self: None)
        patch.setattr(ZerothOrderCLI, "_run_subcommand", lambda self, subcommand: None)
        whole = LightningCLI._prepare_subcommand_parser  # the options of all commands, for one parser to serve
        patch.setattr(ZerothOrderCLI, "_prepare_subcommand_parser", whole)
        cli = ZerothOrderCLI(["fit", "--config", "configs/quickstart.yaml"])

        def parse(words: list[str]) -> Any:
            match words:
                case ["python", "-m", "zolightning.bench", *arguments]:
                    bench.parser().parse_args(arguments)
                case ["zolightning", *arguments] | ["python", "-m", "zolightning", *arguments]:
                    cli.parse_arguments(cli.parser, arguments)
                    return cli.config
                case _:
                    pytest.fail(f"What is {words}?")

        yield parse


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands(document: str, parse: Callable[[list[str]], Any]) -> None:
    for words in commands(document):
        try:
            parse(words)
        except SystemExit as error:
            assert error.code == 0, f"{' '.join(words)}: {error.code}"  # that of --print_config


def test_the_command_line_keeps_the_defaults_of_the_method(parse: Callable[[list[str]], Any]) -> None:
    config = parse(["zolightning", "fit", "--config", "configs/quickstart.yaml", "--method", "my_file.FZOO"]).fit
    method = import_module("my_file").FZOO([torch.zeros(1)], **config.method.init_args.as_dict())
    assert (type(method.estimator), method.noise, method.num_queries) == (OneSided, "rademacher", 8)


@pytest.mark.parametrize("document", ["README.md", "configs/README.md", "configs/from_mezo.md", PACKAGE])
def test_flags_in_the_text(document: str, parse: Callable[[list[str]], Any]) -> None:
    words = ["zolightning", "fit", "--config", "configs/quickstart.yaml", "--config", "configs/methods/zo_mopi.yaml"]
    for span in re.findall(r"`(--[a-z_]+(?:\.[a-z_.]+)? [^`]+)`", text(document).replace("\n", " ")):
        if "..." not in span:
            words += shlex.split(span)
    parse(words)


def test_every_config_is_described() -> None:
    described = set(re.findall(r"`(\w[\w.]*\.yaml)`", text("configs/README.md")))
    assert {path.name for path in (ROOT / "configs").rglob("*.yaml")} <= described


def test_every_field_is_described(parse: Callable[[list[str]], Any]) -> None:
    config = parse(["zolightning", "fit", "--config", "configs/quickstart.yaml"]).fit
    fields = {name.partition(".")[0] for name in config.keys()}  # noqa: SIM118 (a Namespace has no iterator)
    assert fields - {"config", "ckpt_path", "weights_only"} <= set(re.findall(r"`(\w+)`", text("configs/README.md")))


# Links


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document: str) -> None:
    folder = (ROOT / document).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text(document)):
        path = folder / target if target else ROOT / document
        assert target.startswith("https://") or path.exists(), f"{document}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{document}: {target}#{anchor}"
