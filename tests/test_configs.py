"""Every file under ``configs/``: its command parses, it composes in any order, and it trains."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from safetensors.torch import load_file

from cli_runs import parsed, parser
from config_runs import (
    ARCHITECTURES,
    FILES,
    LR,
    ROOT,
    SECOND,
    VECTOR_LR,
    assert_only_moved,
    compose,
    names,
    plant_outlier,
    train,
    write_rows,
)

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = [pytest.mark.usefixtures("at_project_root"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FOLDERS = [names("tasks"), names("methods"), list(ARCHITECTURES)]
RUNS = [tuple(files[i % len(files)] for files in FOLDERS) for i in range(max(map(len, FOLDERS)))]


def parse(arguments: list[str]) -> Any:
    return parsed(arguments).fit


def header(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("configs/tasks/")])
def test_the_config_of_a_run_has_its_task(file: str) -> None:
    """Yes and No are words there too, with which a run goes on and is tested."""
    given = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["data"]
    data = parse(["fit", "--config", file, "--config", "configs/models/smollm2_135m.yaml"]).data
    written = yaml.safe_load(parser().dump(Namespace(fit=Namespace(data=data), subcommand="fit"), skip_check=True))
    assert written["fit"]["data"]["init_args"]["task"] == (given.get("init_args") or given)["task"]


@pytest.mark.parametrize("file", FILES)
def test_header_has_a_command_that_parses_and_ends(file: str) -> None:
    commands = [line.removeprefix("#   ") for line in header(file) if line.startswith("#   zolightning fit")]
    assert commands, f"{file} does not begin with a comment with its command"
    program, *arguments = shlex.split(commands[0])
    assert program == "zolightning"
    assert file in arguments

    config = parse(arguments)

    assert config.model.init_args.model_name
    trainer = config.trainer
    assert 0 < trainer.max_steps <= 20_000
    assert trainer.max_steps % trainer.val_check_interval == 0, "the last weights are not validated"
    assert trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize(("method", "model"), [("mezo", "llama3_8b"), ("adamw", "llama3_8b"), ("adamw", "t5_small")])
def test_order_of_files_does_not_matter(method: str, model: str) -> None:
    files = ("tasks/cb", f"methods/{method}", f"models/{model}", "strategies/ddp_cpu")
    turned = [files[first:] + files[:first] for first in range(len(files))]
    # In which any three of them come in every order
    configs = [parse(compose(*order)) for order in [*turned, *(order[::-1] for order in turned)]]
    for config in configs:
        del config["config"]
    assert all(config == configs[0] for config in configs)
    assert configs[0].data.init_args.task["name"] == "cb"
    assert configs[0].model.init_args.dtype == ("bfloat16" if model == "llama3_8b" else None)
    assert configs[0].model.class_path.rpartition(".")[2] == ("CausalLM" if model == "llama3_8b" else "Seq2SeqLM")
    assert configs[0].trainer.strategy == "ddp"
    assert configs[0].trainer.max_steps == (500 if method == "adamw" else 2000)


def test_later_files_and_flags_override() -> None:
    files = compose("tasks/sst2", "methods/mezo", "models/gpt2", "tasks/rte", "models/opt_125m")
    config = parse([*files, "--trainer.max_steps", "3", "--data.batch_size", "5"])
    assert (config.data.init_args.task["name"], config.data.init_args.batch_size) == ("rte", 5)
    assert config.model.init_args.model_name == "facebook/opt-125m"
    assert config.trainer.max_steps == 3


def test_runs_below_cover_all_files() -> None:
    tasks, methods, models = (set(used) for used in zip(*RUNS, strict=True))
    assert (tasks, methods, models) == (set(names("tasks")), set(names("methods")), set(ARCHITECTURES))


@pytest.mark.filterwarnings("ignore:The network runs once per example")  # Gemma's norms, which train here
@pytest.mark.parametrize(("task", "method", "model"), RUNS)
def test_two_steps(task: str, method: str, model: str, write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint, folder = train(
        compose(f"tasks/{task}", f"methods/{method}", f"models/{model}"),
        write_tiny_model(write_rows(tmp_path, task) / "model", ARCHITECTURES[model]),
        "--model.init_args.optimizer.init_args.lr" if method in ("adamw", "sgd") else LR,
    )
    assert changed(checkpoint, folder / "model")


def test_quickstart_two_steps(write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_rows(tmp_path, "sentiment")
    checkpoint, _ = train(compose("quickstart"), write_tiny_model(folder / "model"), LR)
    assert changed(checkpoint, folder / "model")


def test_recommended_two_steps(write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_rows(tmp_path, "sentiment")
    # a smaller network, and fewer rows
    smaller = (
        "--model.num_layers",
        "2",
        "--scope.patterns",
        r"['layers\.1\..*proj']",
        "--data.num_demonstrations",
        "1",
    )
    arguments = [*compose("recommended"), *smaller]
    checkpoint, _ = train(arguments, write_tiny_model(folder / "model", "llama"), LR)
    assert_only_moved(checkpoint, folder / "model", r"layers\.1\..*proj|lm_head")  # which is probed


def test_a_scope_and_a_method_in_one_file(write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tiny_model(write_rows(tmp_path, "sentiment") / "model", "llama")
    plant_outlier(folder, layer=1)
    arguments = [*compose("dominant_layer_zo_mopi"), "--trainer.precision", "32-true", VECTOR_LR, "0.1"]
    checkpoint, _ = train(arguments, folder, LR)
    assert_only_moved(checkpoint, folder, SECOND)


def changed(checkpoint: dict[str, Any], model: Path) -> bool:
    """Whether the checkpoint has other matrices than the model had, after two steps.

    Not so its norms: near 1 bfloat16 shows no move below 0.004.
    """
    assert checkpoint["global_step"] == 2
    before = load_file(model / "model.safetensors")
    trained = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    matrices = {name: weight for name, weight in before.items() if weight.ndim == 2}
    return all(not torch.equal(trained[name].float(), weight.float()) for name, weight in matrices.items())
