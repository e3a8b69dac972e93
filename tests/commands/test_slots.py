"""The fields of a config that become callbacks: ``method``, ``scope``, ``blocks``, ``resampling`` and so on."""

import subprocess
from collections.abc import Callable
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cli_runs import CONFIGS, Runs, parsed, parser
from zolightning.blocks import Bandit, Cyclic
from zolightning.callbacks import (
    BlockCoordinateDescent,
    DominantLayer,
    LearningRateControl,
    LearningRateProbe,
    MomentumTransport,
    SubspaceResampling,
    ZerothOrder,
)
from zolightning.commands.arguments import command_line, up_to_help, with_resets
from zolightning.commands.slots import SLOTS, slot_callbacks, trial
from zolightning.optim import WarmupDecay, ZerothOrderOptimizer
from zolightning.optim.dense import DenseOptimizer
from zolightning.scopes import LoRA, RandomLayer

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]

Build = Callable[..., list[Callback]]


def files(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(CONFIGS / f"{name}.yaml"))]


@pytest.fixture
def build() -> Build:
    """The callbacks that options stand for, by the real parser."""

    def make(*options: Any) -> list[Callback]:
        config = parsed(["fit", *files("tasks/sentiment", "models/smollm2_135m"), *map(str, options)])["fit"]
        given = Namespace({slot: config[slot] for slot in SLOTS})
        given["trainer"] = Namespace(callbacks=config.trainer.callbacks)
        made = parser().instantiate_classes(Namespace(fit=given, subcommand="fit"))["fit"]
        return slot_callbacks(config, made)

    return make


def kinds(callbacks: list[Callback]) -> list[type[Callback]]:
    return [type(callback) for callback in callbacks]


def optimizer(callbacks: list[Callback]) -> ZerothOrderOptimizer:
    (callback,) = (callback for callback in callbacks if isinstance(callback, ZerothOrder))
    return callback.method([torch.nn.Parameter(torch.zeros(2, 2))])


def test_flags_become_callbacks(build: Build) -> None:
    scope, resampling, transport, method = callbacks = build(
        *("--method", "ZOMOPI", "--method.lr", 0.5, "--method.estimator", "OneSided", "--lr_scheduler", "WarmupDecay"),
        *("--method.offload_low_words", "true"),
        *("--scope", "DominantLayer", "--scope.part", "LoRA", "--scope.part.rank", 3),
        *("--resampling.interval", 7, "--transport.how", "reset", "--evaluation.micro_batch_size", 2),
    )
    assert isinstance(scope, DominantLayer) and isinstance(scope.part, LoRA) and scope.part.rank == 3
    assert isinstance(resampling, SubspaceResampling) and resampling.interval == 7
    assert isinstance(transport, MomentumTransport) and transport.how == "reset"
    assert isinstance(method, ZerothOrder) and method.micro_batch_size == 2
    made = optimizer(callbacks)
    assert type(made).__name__ == "ZOMOPI" and made.param_groups[0]["lr"] == 0.5
    assert type(made.estimator).__name__ == "OneSided" and made.offload_low_words
    assert isinstance(method.lr_scheduler(made), WarmupDecay)


def test_learning_rates_are_probed_and_controlled_under_any_method(build: Build) -> None:
    configs = files("learning_rates/probe", "learning_rates/control", "methods/lozo")
    probe, control, *_ = build(*configs, "--lr_probe.noise", 0.1)
    assert isinstance(probe, LearningRateProbe) and (probe.noise, probe.num_steps) == (0.1, 16)
    assert isinstance(control, LearningRateControl) and control.patience == 5


def test_blocks_go_with_any_method_and_scope(build: Build) -> None:
    flags = ("--blocks", "BlockCoordinateDescent", "--blocks.order", "Bandit", "--blocks.order.p_min", 0.01)
    _, blocks, *_ = found = build("--scope", "RandomLayer", "--method", "LOZO", *flags, "--blocks.interval", 7)
    assert kinds(found) == [RandomLayer, BlockCoordinateDescent, SubspaceResampling, ZerothOrder]
    assert isinstance(blocks, BlockCoordinateDescent) and isinstance(blocks.order, Bandit)
    assert blocks.order.p_min == 0.01 and blocks.describe() == "blocks by Bandit, switched every 7 steps"
    assert kinds(build(*files("blocks/mezo_bcd", "methods/mezo_adam"))) == [BlockCoordinateDescent, ZerothOrder]
    (later, _) = build(*files("blocks/lezo"), "--blocks", "BlockCoordinateDescent")
    assert isinstance(later.order, Cyclic) and later.left_state == "reset", "nothing of the file is left"


def test_subspace_methods_resample_without_being_told(build: Build) -> None:
    assert kinds(build("--method", "MeZO")) == [ZerothOrder]
    assert kinds(build("--method", "LOZO")) == [SubspaceResampling, ZerothOrder]
    assert kinds(build("--method", "ZOMOPI")) == [SubspaceResampling, MomentumTransport, ZerothOrder]


@pytest.mark.parametrize(
    "before", ["mezo_normalized", "mezo_population", "zo_mopi_one_sided", "lozo_momentum", "adamw"]
)
def test_a_later_file_replaces_all_of_the_method_before(build: Build, before: str) -> None:
    alone, after = build(*files("methods/lozo")), build(*files(f"methods/{before}", "methods/lozo"))
    expected, found = optimizer(alone), optimizer(after)
    assert found.defaults == expected.defaults and found.num_queries == expected.num_queries
    assert type(found.estimator) is type(expected.estimator)
    assert kinds(after) == kinds(alone)


def test_a_method_of_the_same_class_inherits_nothing(build: Build) -> None:
    assert optimizer(build(*files("methods/mezo_momentum", "methods/mezo"))).defaults["momentum"] == 0
    assert optimizer(build(*files("methods/mezo_momentum"), "--method", "MeZO")).defaults["momentum"] == 0
    assert optimizer(build(*files("methods/mezo_momentum"), "--method.lr", 0.5)).defaults["momentum"] == 0.9


def test_resampling_of_a_file_goes_with_its_method_and_that_of_a_flag_stays(build: Build) -> None:
    def interval(*options: Any) -> int:
        resampling = build(*files("methods/lozo"), *options)[0]
        assert isinstance(resampling, SubspaceResampling)
        return resampling.interval

    assert interval() == 50
    assert interval("--method.lr", 1e-3) == 50
    assert interval("--method", "SubZero") == 100
    assert interval("--method", "SubZero", "--resampling.interval", 9) == 9
    assert interval("--resampling.interval", 9, "--method", "SubZero") == 9
    assert kinds(build(*files("methods/lozo"), "--method", "MeZO")) == [ZerothOrder]


def test_backpropagation_replaces_a_method(build: Build) -> None:
    assert build(*files("methods/zo_mopi", "methods/adamw")) == []
    assert build(*files("quickstart", "methods/adamw")) == []
    assert build(*files("quickstart"), "--method", "null") == []
    assert build() == []


def test_order_of_files_does_not_matter(build: Build) -> None:
    for order in permutations(["scopes/dominant_layer", "methods/lozo_momentum", "strategies/ddp_cpu"]):
        callbacks = build(*files(*order), "--method.lr", 0.25)
        assert kinds(callbacks) == [DominantLayer, SubspaceResampling, MomentumTransport, ZerothOrder]
        assert optimizer(callbacks).defaults["lr"] == 0.25


def test_a_file_without_a_class_changes_settings(build: Build, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("method:\n  init_args:\n    rank: 3\nresampling:\n  interval: 4\n")
    resampling, method = build(*files("methods/lozo"), "--config", settings)
    assert optimizer([method]).defaults["rank"] == 3 and resampling.interval == 4


def test_classes_of_ones_own(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_slots.py").write_text(
        "from zolightning.callbacks import SubspaceResampling\n"
        "from zolightning.optim import LOZO\n"
        "class Mine(LOZO):\n    pass\n"
        "class Early(SubspaceResampling):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    callbacks = build("--method", "own_slots.Mine", "--resampling", "own_slots.Early")
    assert type(optimizer(callbacks)).__name__ == "Mine"
    assert type(callbacks[0]).__name__ == "Early"


def listed(*entries: str) -> str:
    return "trainer:\n  callbacks:\n" + "".join(f"    - class_path: {entry}\n" for entry in entries)


ONE_CYCLE = "--lr_scheduler OneCycleLR --lr_scheduler.max_lr 0.1 --lr_scheduler.total_steps 9"
IN_A_LIST = "ZerothOrder\n      init_args:\n        method: MeZO"


def test_callbacks_of_a_list_go_with_those_of_fields(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(listed(IN_A_LIST))
    assert kinds(build("--config", path, "--scope", "RandomLayer")) == [RandomLayer]
    path.write_text(listed("SubspaceResampling"))
    assert kinds(build("--config", path, "--method", "LOZO")) == [ZerothOrder]


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("", "--resampling.interval 5", "`resampling` is given without a `method`"),
        ("", "--lr_scheduler LinearLR", "`lr_scheduler` is given without a `method`"),
        ("", "--evaluation.skip_nonfinite true", "`evaluation.skip_nonfinite` is given without a `method`"),
        ("", "--blocks.interval 5", "`blocks` is given without a `method`"),
        ("", "--lr_probe LearningRateProbe", "`lr_probe` is given without a `method`"),
        (listed("BlockCoordinateDescent"), "--method MeZO --blocks.interval 5", "`blocks` is given, but `trainer.call"),
        ("", "--method MeZO --resampling.interval 5", "`resampling` is given, but MeZO searches no subspaces"),
        ("", "--method LOZO --transport.how keep", "`transport` is given, but LOZO keeps no momentum"),
        (listed(IN_A_LIST, IN_A_LIST), "", "`trainer.callbacks` holds ZerothOrder of MeZO and of MeZO: one method"),
        (listed(IN_A_LIST), "--method LOZO", "`method` is LOZO, but `trainer.callbacks` holds ZerothOrder of MeZO:"),
        (
            listed("SubspaceResampling"),
            "--method LOZO --resampling.interval 5",
            "`resampling` is given, but `trainer.callbacks` holds SubspaceResampling too",
        ),
    ],
)
def test_fields_that_nothing_reads_or_that_stand_twice(
    build: Build, tmp_path: Path, file: str, options: str, message: str
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(file or "{}")
    with pytest.raises(MisconfigurationException) as error:
        build("--config", path, *options.split())
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method MeZO --method.lr -1", "`lr` must be a positive number, got -1.0"),
        ("--method MeZO --transport.how keep", "`transport` is given, but MeZO keeps no momentum"),
        (f"--method LOZO {ONE_CYCLE}", "`lr_scheduler` is OneCycleLR, which has set `momentum` to 0.95, but LOZO"),
        (f"--method EGGROLL {ONE_CYCLE}", "`lr_scheduler` does not go with EGGROLL: optimizer must support momentum"),
    ],
)
def test_refused_in_one_line_before_the_model_is_loaded(runs: Runs, options: str, message: str) -> None:
    error = runs.refused("fit", "--model.model_name", "no/such/model", *options.split(), method=None)
    assert error.startswith("error: " + message)
    assert "\n" not in error


def test_two_scopes(runs: Runs) -> None:
    path = runs.folder / "list.yaml"
    path.write_text(listed("RandomLayer"))
    error = runs.refused("fit", "--config", path, "--scope", "DominantLayer")
    assert error.startswith("error: `trainer.callbacks` has 2 scopes, DominantLayer, RandomLayer")


def test_resets_leave_other_arguments_alone() -> None:
    plain = ["fit", "--config", "trainer: {max_epochs: 1}", "--trainer.max_steps=3", "--method.lr", "1"]
    plain += ["--blocks.others", "blocks"]  # a value that is called as a field is
    assert with_resets(plain) == plain
    assert with_resets(["fit", "--scope=RandomLayer"]) == ["fit", "--scope", "null", "--scope=RandomLayer"]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("fit --method.help MeZO --method LOZO --trainer.max_steps 3", "fit --method.help MeZO"),
        ("fit --method LOZO --method.help=MeZO --method.lr 1", "fit --method LOZO --method.help=MeZO"),
        (
            "fit --scope.help TrainLayers x --scope.part.help LoRA --method MeZO",
            "fit --scope.help TrainLayers --scope.part.help LoRA",
        ),
        ("fit --method MeZO --help", "fit --method MeZO --help"),
    ],
)
def test_help_of_a_class_ends_the_command(line: str, kept: str) -> None:
    assert up_to_help(line.split()) == kept.split()


def test_a_command_is_written_in_one_line_that_a_shell_reads() -> None:
    words = ["zolightning", "{{ text }}\nIt's\\n\n", "$HOME", "", "a\\b"]
    line = command_line(words)
    read = subprocess.run(["bash", "-c", rf"printf '%s\0' {line}"], stdout=subprocess.PIPE, check=True).stdout
    assert "\n" not in line and read.decode().split("\0") == [*words, ""]


def test_a_method_that_lacks_a_method_is_told_which() -> None:
    method: Any = partial(DenseOptimizer, defaults={"lr": 1e-3, "eps": 1e-3})
    with pytest.raises(
        MisconfigurationException, match=r"abstract class DenseOptimizer .* '?update'?\. 'How do I add a method\?' in"
    ):
        trial(method)
