"""What the documents say works: Python blocks run, commands go through the real parsers, links lead somewhere."""

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import zolightning.bench.__main__ as bench
from zolightning.callbacks import ZerothOrder
from zolightning.callbacks.refusals import refuse_strategy
from zolightning.cli import ZerothOrderCLI
from zolightning.data.task_files import load_task
from zolightning.evaluation.mode import evaluation_mode
from zolightning.optim import MeZO
from zolightning.optim.estimators import OneSided
from zolightning.rewards.reward import rewards_of

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parent.parent
PACKAGE = "zolightning/README.md"
DOCUMENTS = [
    "README.md",
    "configs/README.md",
    "configs/from_mezo.md",
    "logs/README.md",
    "logs/bench/gpu.md",
    "logs/bench/step.md",
    "logs/evidence/methods.md",
    "logs/evidence/recipe.md",
    "logs/evidence/scope.md",
    "logs/evidence/tasks.md",
    PACKAGE,
    ".github/CONTRIBUTING.md",
    ".github/CHANGELOG.md",
]


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[tuple[int, str]]:
    """Fenced blocks, each with the number of its first line."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text(document), re.MULTILINE | re.DOTALL)
    return [(text(document)[: match.start(1)].count("\n") + 1, match[1]) for match in found]


# Python


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_regression: Callable[..., L.LightningModule],
    regression_data: Callable[..., DataLoader],
) -> Callable[[str], dict[str, Any]]:
    """Runs all Python of a document, one block after the other, with Trainers that end after a few steps."""
    monkeypatch.chdir(tmp_path)
    trainer_class = L.Trainer

    def trainer(**options: Any) -> L.Trainer:
        short = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", [])),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_steps": 4,
        }
        return trainer_class(**options | short)

    monkeypatch.setattr(L, "Trainer", trainer)
    data = regression_data()

    def make(document: str) -> dict[str, Any]:
        # What the text leaves to the reader
        names: dict[str, Any] = {
            "any_lightning_module": make_regression(),
            "datamodule": data,
            "loader": data,
            "model": make_regression().net,
            "L": L,
            "torch": torch,
            "F": F,
            "partial": partial,
        }
        for line, code in blocks(document, "python"):
            exec(compile("\n" * (line - 1) + code, ROOT / document, "exec"), names)
        return names

    return make


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python(document: str, run: Callable[[str], dict[str, Any]]) -> None:
    run(document)


@pytest.fixture
def examples(run: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The classes of the package's document."""
    found = SimpleNamespace(**run(PACKAGE))
    monkeypatch.undo()  # tests of these classes take as many steps as they say
    return found


def test_the_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, inputs = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = examples.FZOO(net.named_parameters(), lr=1e-2, num_queries=4, seed=3)
    optimizer.attach(net)
    before = net.weight.detach().clone()
    record = optimizer.estimate(lambda: net(inputs).square().mean())
    unperturbed, losses = record.losses[0], torch.tensor(record.losses[1:], dtype=torch.float64)
    assert unperturbed == pytest.approx(net(inputs).square().mean().item(), rel=1e-6)
    signs = []
    for query in range(4):
        directions = optimizer.directions(optimizer.param_groups[0], record.seed, record.step, {query: 1.0})
        directions[net.weight].accumulate(sign := torch.zeros(2, 3))
        signs.append(sign)
    optimizer.step()
    mean = sum((loss - unperturbed) * sign for loss, sign in zip(losses, signs, strict=True)) / 4
    torch.testing.assert_close(net.weight, (before - 1e-2 * mean / losses.std()).float(), rtol=0, atol=1e-6)
    assert (net.weight - before).abs().max() > 1e-3


def test_the_command_line_keeps_the_defaults_of_the_method(parse: Callable[[list[str]], Any]) -> None:
    config = parse(["zolightning", "fit", "--config", "configs/quickstart.yaml", "--method", "my_file.FZOO"]).fit
    method = import_module("my_file").FZOO([torch.zeros(1)], **config.method.init_args.as_dict())
    assert (type(method.estimator), method.noise, method.num_queries) == (OneSided, "rademacher", 8)


def test_the_low_rank_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net, inputs = nn.Linear(5, 3), torch.randn(7, 5)
    optimizer = examples.SignLOZO(net.named_parameters(), lr=0.01, seed=3, noise="rademacher")
    optimizer.attach(net)
    before, factor = net.weight.detach().clone(), optimizer.basis(net.weight).right
    record = optimizer.estimate(lambda: net(inputs).square().mean())
    optimizer.step()
    core = (net.weight.detach() - before) @ torch.linalg.pinv(factor).T / -0.01
    torch.testing.assert_close(core, optimizer.core_gradient(net.weight, record).sign(), rtol=0, atol=1e-4)
    assert core.abs().min() > 0.99  # random signs are never 0


def test_the_sign_method_moves_by_its_formula(examples: SimpleNamespace) -> None:
    net, before = nn.Linear(3, 2), torch.full((2, 3), 0.25)
    net.weight.data.copy_(before)
    optimizer = examples.ZOSignSGD(net.named_parameters(), lr=0.125, noise="rademacher", seed=3)
    optimizer.attach(net)
    record = optimizer.estimate(lambda: net(torch.ones(1, 3)).square().mean())
    direction = optimizer.directions(optimizer.param_groups[0], record.seed, record.step, {0: 1.0})[net.weight]
    optimizer.step()
    sign = (record.projected_grads[0] * direction.of_elements(torch.zeros(6))).sign().view(2, 3)
    assert torch.equal(net.weight, before - 0.125 * sign)


def test_the_layerwise_method_is_mezo_with_other_directions(examples: SimpleNamespace) -> None:
    nets = [nn.Linear(3, 2).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    moves = []
    for net, method in zip(nets, (MeZO, examples.LayerwiseMeZO), strict=True):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        optimizer = method(net.named_parameters(), lr=1e-2, seed=3)
        optimizer.attach(net)
        record = optimizer.estimate(lambda net=net: net.weight.sum() + net.bias.sum())
        optimizer.step()
        moves.append([(p - b) / record.projected_grads[0] for p, b in zip(net.parameters(), before, strict=True)])
    (weight, bias), (same_weight, farther_bias) = moves
    torch.testing.assert_close(same_weight, weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(farther_bias, 3 * bias, rtol=1e-6, atol=1e-9)


def test_the_line_search_takes_the_best_step(examples: SimpleNamespace) -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
    found = {}
    for lr in (0.05, 0.25, 1.0):  # for the loss p ** 2 / 2 and signs as directions a rate of 1 goes to the minimum
        parameter.data.fill_(1.0)
        optimizer = MeZO([parameter], lr=lr, noise="rademacher", estimator=examples.LineSearch(), seed=0)
        record = optimizer.estimate(lambda: parameter.square().sum() / 2)
        optimizer.step()
        found[lr] = parameter.item()
        assert record.forward_passes == 5 and len(record.losses) == 2
    assert found == pytest.approx({0.05: 0.8, 0.25: 0.0, 1.0: 0.0}, abs=1e-5)


def test_the_method_learns_under_a_trainer(
    examples: SimpleNamespace, make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    module = make_regression()

    @torch.no_grad()
    def loss() -> float:
        with evaluation_mode(module):
            return sum(module.training_step(batch, 0).item() for batch in regression_data())

    before = loss()
    make_trainer(max_steps=200, callbacks=[ZerothOrder(partial(examples.FZOO, lr=2e-2))]).fit(module, regression_data())
    assert loss() < 0.5 * before


def test_the_scope_trains_what_it_names(
    examples: SimpleNamespace, make_trainer: Any, make_regression: Any, regression_data: Any
) -> None:
    module = make_regression()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    callbacks = [examples.Biases(), ZerothOrder(partial(MeZO, lr=1e-2))]
    make_trainer(max_steps=3, callbacks=callbacks).fit(module, regression_data())
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith("bias"), name


def test_the_reward_is_one(examples: SimpleNamespace) -> None:
    assert rewards_of(examples.brevity, ["", "a b c"], [["x"], ["y"]]) == [1.0, 0.25]


def test_the_strategy_counts(examples: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "reduce", lambda self, tensor, group, reduce_op: 2 * tensor)
    strategy = examples.CountingDDP()
    refuse_strategy(strategy)
    assert torch.equal(strategy.reduce(torch.ones(2, 2), reduce_op="sum"), torch.full((2, 2), 2.0))
    assert strategy.sent == 4


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
        script = LISTEN + re.sub(r"^\.ci/(run|newest|oldest)\b", ":", code, flags=re.MULTILINE)
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
