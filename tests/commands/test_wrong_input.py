"""The command ``zolightning`` on wrong input, and under bugs of others."""

import io
import os
import socket
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runs import Runs, parsed, refused
from zolightning.__main__ import main

pytestmark = [
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_process"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.strategy", "fsdp"), "`trainer.strategy` is 'fsdp'"),
        (("--trainer.strategy", "deepspeed_stage_3"), "`trainer.strategy` is 'deepspeed_stage_3'"),
        (("--trainer.strategy", "zo_dpp"), "You selected an invalid strategy name: `strategy='zo_dpp'`"),
        (("--trainer.accelerator", "gpus"), "You selected an invalid accelerator name: `accelerator='gpus'`"),
        (("--trainer.devices", "two"), "`devices` selected with `CPUAccelerator` should be an int > 0."),
        (("--trainer.precision", "16-mixed"), "`trainer.precision` is '16-mixed'"),
        (("--trainer.precision", "transformer-engine"), "`trainer.precision` is 'transformer-engine', which is not s"),
        (("--trainer.strategy", "ddp_spawn"), "`trainer.strategy` starts its processes by 'spawn', by which the obje"),
        (("--trainer.logger.save_dir", "memory://x"), "`trainer.logger.save_dir` is memory://x, but a ledger is a fi"),
        (
            (
                "--trainer.check_val_every_n_epoch",
                "1",
                "--trainer.val_check_interval",
                "9",
                "--validate_first",
                "false",
            ),
            "`val_check_interval` (9) must be less than or equal to the number of the training batches (8)",
        ),
        (("--trainer.accumulate_grad_batches", "2"), "`trainer.accumulate_grad_batches` is 2"),
        (("--trainer.gradient_clip_val", "1.0"), "`trainer.gradient_clip_val` is 1.0"),
        (("--data.init_args.task", "sst3"), "`data.task` must be one of agnews, "),
        (
            ("--data.init_args.path", "no/such/folder"),
            "`data.path` must be a folder of files, got 'no/such/folder', which is not one in /",
        ),
        (("--data.init_args.batch_size", "0"), "`data.batch_size` must be an integer, at least 1, got 0"),
        (("--model.init_args.model_name", "./no-model"), "`model_name` './no-model' is a path, but nothing is there"),
        (
            ("--model.init_args.quantization", "int8"),
            "`model.quantization` is 'int8', which freezes weights, but no `scope`",
        ),
        (("--method.lr", "-1"), "`lr` must be a positive number, got -1.0"),
        (("--method.eps", "-1e-3"), "`eps` must be a positive number, got -0.001"),
        (("--ckpt_path", "no.ckpt"), "`ckpt_path` is no.ckpt, which is not a file"),
        (("--seed_everything", "-1"), "`seed_everything` must be at least 0 and below 2**32, got -1"),
        (("--trainer.max_steps", "-1"), "`trainer.max_steps` is -1 and `trainer.max_epochs` is None: the run would"),
        (("--trainer.max_steps", "0"), "`trainer.max_steps` is 0: nothing would be trained"),
        (("--trainer.max_steps", "-1", "--trainer.max_epochs", "0"), "`trainer.max_epochs` is 0: nothing would be tr"),
        (
            ("--method", "LOZO", "--method.momentum", "0.9", "--resampling.anchor", "9"),
            "`anchor` must be at most the method's `rank`, 2, got 9.",
        ),
        (("--trainer.val_check_interval", "-1"), "`trainer.val_check_interval` must be above 0, a number of batches"),
        (("--trainer.val_check_interval", "0.5"), "`trainer.val_check_interval` is 0.5, a share of an epoch, and `t"),
        (("--scope", "TrainParameters", "--scope.patterns", "['q_prj']"), "`patterns` has 'q_prj', which matches no"),
        (
            ("--validate_first=false", "--trainer.callbacks", "[{class_path: LearningRateFinder}]"),
            "When using the learning rate finder, either `model` or `model.hparams` should have one of these fields",
        ),
        (("--lr_probe", "LearningRateProbe"), "`num_steps` of LearningRateProbe is 16, in which nothing moves, but"),
        (("--method.num_queries", "1000000000"), "`method.num_queries` must be at most 10,000, got 1000000000"),
        (("--method.eps", "1e-30"), "`method.eps` must be between 1e-12 and 1000, got 1e-30"),
        (("--method.lr", "1e308"), "`method.lr` must be at most 1e+06, got 1e+308"),
        (("--checkpoint.dirpath", "/proc/x"), "`checkpoint.dirpath` is /proc/x, where no file can be written"),
        (("--trainer.default_root_dir", "/proc/x"), "`trainer.default_root_dir` is /proc/x, where no file can be"),
        (("--evaluation.keep_prefix_gib", "1"), "`evaluation.keep_prefix_gib` is 1.0, but `data.fixed_batches` is"),
        (
            ("--method", "LOZO", "--resampling.interval", "0"),
            "`resampling.interval` must be an integer, at least 1, got 0",
        ),
        (
            ("--trainer.strategy", "ZerothOrderDDP", "--trainer.strategy.check_interval", "0"),
            "`check_interval` must be an integer, at least 1, got 0",
        ),
        (("--blocks.blocks_per_step", "5"), "`blocks_per_step` is 5, but there are 4 blocks."),
        (
            ("--checkpoint.monitor", "val/loss"),
            "`checkpoint.mode` is 'max', and `checkpoint.monitor` 'val/loss': the w",
        ),
        (("--model.reward", "zolightning.rewards.token_f1"), "`model.reward` is for generated texts, but the task gen"),
        (
            ("--method", "null", "--data.task.objective", "accuracy"),
            "The task's `objective` is 'accuracy', which has no",
        ),
        (
            ("--method.estimator", "ForwardGradient", "--data.task.objective", "accuracy"),
            "The task's `objective` is 'accuracy', which has no gradient: name a zeroth-order `method` (without",
        ),
        (("--data.task.objective", "f1"), "`data.task`: `objective` must be one of ('classification', 'accuracy', 'la"),
        (("--checkpoint.filename", "last"), "`filename` of ModelCheckpoint is 'last', but SaveLast keeps the last st"),
        (("--checkpoint.monitor", "val/acc"), "`checkpoint.monitor` asks for the metric 'val/acc', which the valida"),
        (
            ("--trainer.callbacks", "[{class_path: BlockCoordinateDescent}, {class_path: BlockCoordinateDescent}]"),
            "`trainer.callbacks` holds 2 BlockCoordinateDescent callbacks: blocks have one order. Keep one.",
        ),
        (
            ("--trainer.callbacks", "[{class_path: EarlyStopping, init_args: {monitor: val/los}}]"),
            "`EarlyStopping` asks for the metric 'val/los', which the validation does not log. It logs val/accuracy, ",
        ),
    ],
)
def test_wrong_settings_take_one_line(runs: Runs, options: tuple[str, str], message: str) -> None:
    with redirect_stdout(io.StringIO()) as output:
        error = refused(runs.arguments("fit", *options))
    assert error.startswith("error: " + message)
    assert "\n" not in error
    assert "before training" not in output.getvalue()  # not after minutes of validation
    assert not (runs.folder / "logs").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(runs: Runs) -> None:
    error = runs.refused("fit", "--trainer.accelerator", "gpu")
    assert error == "error: `trainer.accelerator` is 'gpu', but torch finds none here: use 'cpu' or 'auto'."


def test_a_port_in_use(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        error = runs.refused("fit", "--trainer.strategy", "zo_ddp", "--trainer.devices", 1)
    assert error == f"error: `MASTER_PORT` is {port}, which another program listens on: set another port."


def test_a_scope_that_leaves_nothing_quantised(runs: Runs) -> None:
    options = ("--model.init_args.quantization", "int8", "--scope", "TrainLayers", "--scope.layers", "all")
    error = refused(runs.arguments("fit", *options))
    assert error.startswith("error: `model.quantization` is 'int8', but the scope trains all ") and "\n" not in error


def test_a_file_of_predictions_that_cannot_be_written(runs: Runs) -> None:
    error = runs.refused("predict", "--predictions.path", "/proc/x/all.jsonl")
    assert error.startswith("error: `predictions.path` is /proc/x, where no file can be written: ")
    error = runs.refused("predict", "--predictions.path", runs.folder)
    assert error == f"error: `predictions.path` is {runs.folder}, which is a folder. Name a file."


def test_a_group_of_settings_that_is_null(runs: Runs) -> None:
    (runs.folder / "null.yaml").write_text("checkpoint: null\n")
    assert runs.refused("fit", "--config", runs.folder / "null.yaml").startswith("error: `checkpoint` is null, but ")


def test_a_group_of_settings_that_is_unknown(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.folder / "more.yaml").write_text("x-common: {lr: 1.0e-3}\n")
    with pytest.raises(SystemExit):
        main(runs.arguments("fit", "--config", runs.folder / "more.yaml", "--print_config"))
    assert capsys.readouterr().err == "error: `x-common.lr` is not a setting.\n"


@pytest.mark.filterwarnings("ignore:Discarding init_args")
def test_a_module_that_trains_by_itself_is_refused_before_the_validation(runs: Runs) -> None:
    with redirect_stdout(io.StringIO()) as output:
        error = runs.refused("fit", "--model", "lightning.pytorch.demos.boring_classes.ManualOptimBoringModel")
    assert error.startswith("error: ManualOptimBoringModel has `automatic_optimization=False`")
    assert "before training" not in output.getvalue()


def test_a_head_that_cannot_be_probed_is_refused_before_the_validation(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("zolightning.models.causal_lm.CausalLM.head_features")
    with redirect_stdout(io.StringIO()) as output:
        error = runs.refused("fit", "--linear_probing", "LinearProbing")
    assert error.startswith("error: `linear_probing` needs a module with `head_features`")
    assert "before training" not in output.getvalue()


def test_test_rows_are_read_before_training(runs: Runs) -> None:
    for split in ("train", "validation"):
        (runs.folder / f"{split}.jsonl").write_text('{"sentence": "a", "label": 0}\n{"sentence": "b", "label": 1}\n')
    options = ("--data.path", runs.folder, "--test_last", "true", "--model.model_name", "no/such/model")
    assert "test.jsonl" in runs.refused("fit", *options)
    (runs.folder / "test.jsonl").write_text('{"sentence": "a", "label": 7}\n')
    assert "test.jsonl, line 1: label 7 in field `label`" in runs.refused("fit", *options)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo this ran",)


def test_a_checkpoint_that_runs_code_is_not_loaded_and_gets_no_advice_how(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    path = runs.folder / "evil.ckpt"
    torch.save({"state_dict": {}, "evil": Evil()}, path)
    for subcommand in ("validate", "fit"):
        error = runs.refused(subcommand, "--ckpt_path", path)
        assert error.startswith("error: `ckpt_path` holds something other than tensors and plain values, posix.system")
        assert "weights_only" not in error and "\n" not in error
    assert "this ran" not in capfd.readouterr().out


def test_nothing_to_validate_or_to_test(runs: Runs) -> None:
    printed = runs("fit", "--trainer.limit_val_batches", 0, "--trainer.limit_test_batches", 0, "--test_last", "true")
    assert "before training" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method Mezo", "`method` is 'Mezo', which is not a class of that kind (did you mean MeZO?); accepted: "),
        ("--method no.such.Method", "is 'no.such.Method', and there is no module no, neither installed nor"),
        ("--method.estimator no.such.Class", "`method.estimator` is 'no.such.Class', and there is no module no"),
        ("--method torch.optim.SGD", "`method` is 'torch.optim.SGD', which is not a class of that kind; accepted: "),
        ("--method [MeZO,LOZO]", "`method` is \"['MeZO', 'LOZO']\", which is not a class of that kind; accepted: "),
        ("--method 5", "`method` is '5', which is not a class of that kind; accepted: "),
        ("--method LOZO --method.betas [0.9]", "`method.betas` is '[0.9]'; accepted: a list of 2 or null."),
        ("--method.rnk 3", "`method.rnk` is not a setting of MeZO; accepted: align_queries, clip, eps, estimator, lr"),
        ("--method.momentm 3", "`method.momentm` is not a setting of MeZO (did you mean momentum?)"),
        (
            "--blocks.order Uniform --blocks.order.size 2",
            "`blocks.order.size` is not a setting of Uniform; accepted: none",
        ),
        ("--method.lr abc", "`method.lr` is 'abc'; accepted: a number."),
        ("--model.num_labels 3", "`model.num_labels` is not a setting of CausalLM"),
        ("--model.num_labels 3", "; accepted: adapter, attention, decoding, device_map, dtype, lr_scheduler, "),
        (
            "--model zolightning.models.SequenceClassifier --model.num_labels 3",
            "`model.num_labels` is not a setting of SequenceClassifier (did you mean num_classes?)",
        ),
        ("--method.noise gausian", "is 'gausian' (did you mean gaussian?); accepted: 'gaussian', 'rademacher'."),
        ("--method.estimator OneSide", "`method.estimator` is 'OneSide', which is not a class of that kind (did you"),
        ("--method null --method.lr 3", "`method` names no class for these settings; accepted: "),
        ("--scope.layers [0]", "`scope` names no class for these settings; accepted: "),
        ("--scope TrainLayers", "`scope.layers` must be given for TrainLayers."),
        ("--scope DominantLayer --scope.part LoRA --scope.part.rank x", "`scope.part.rank` is 'x'; accepted: an int"),
        ("--evaluation.micro_batch 2", "`--evaluation.micro_batch` is not a setting (did you mean --evaluation.micro"),
        ("--trainer.max_step 1", "`--trainer.max_step` is not a setting (did you mean --trainer.max_steps?)."),
        ("--trainer.max_steps many", "`trainer.max_steps` is 'many'; accepted: an integer."),
        ("--data.bogus 1", "`data.bogus` is not a setting of PromptDataModule; accepted: answers, batch_size"),
        (
            "--data NoModule",
            "`data` is 'NoModule', which is not a class of that kind",
        ),
        ("--model.dtype float8", "`model.dtype` is 'float8' (did you mean float32?); accepted: 'float32', "),
        ("--model.optimizer.bogus 1", "`model.optimizer.bogus` is not a setting of AdamW; accepted: "),
        ("--checkpoint null", "`checkpoint` is null, but it is a group of settings. Leave it out to get the defaults"),
        ("--checkpoint none.yaml", "`checkpoint` is 'none.yaml', which is not a file; accepted: a YAML file with se"),
        ("--method.help Nope", "`method.help` is 'Nope', which is not a class that `method` takes."),
        ("--scope.help torch.Tensor", "`scope.help` is 'torch.Tensor', which is not a class that `scope` takes."),
        ("--model.reward my_reward", "`model.reward` is 'my_reward', which names no function; accepted: a path to"),
        ("--nothing 1", "`--nothing` is not a setting."),
        ("--wrong 1", "`--wrong` is not a setting."),  # what it has in common with --config are the hyphens
        ("--ckpt_path", "`--ckpt_path`: expected one argument."),
    ],
)
def test_wrong_options_take_one_line(
    runs: Runs, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parsed(runs.arguments("fit", *options.split()))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"methd: MeZO", "`methd` is not a setting (did you mean method?)."),
        (b"trainer: {max_step: 4}", "`trainer.max_step` is not a setting (did you mean trainer.max_steps?)."),
        (
            b"method: {class_path: MeZO, lr: 1}",
            "`method` has `lr` next to `class_path`: settings of a class go under `in",
        ),
        (b"data: {class_path: PromptDataModule, batch_size: 3}", "`data` has `batch_size` next to `class_path`: "),
        (b"method: [", "is not YAML: while parsing a flow node"),
        (b"\xff\xfe\x00", "is not YAML: 'utf-8' codec can't decode"),
        (b"trainer: {}\nmethod: MeZO\ntrainer: {}\n", "is not YAML: `trainer` is given twice, in lines 1 and 3."),
        (b"- a", "holds list, not a mapping of fields."),
        (b"", "is empty."),
        (None, "wrong.yaml', which is not a file."),
    ],
)
def test_wrong_config_files_take_one_line(
    runs: Runs, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs.folder / "wrong.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((SystemExit, ValueError)) as error:
        parsed(runs.arguments("fit", "--config", path))
    line = capsys.readouterr().err or str(error.value)
    assert message in line and len(line.splitlines()) == 1


def test_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, missing in (([], "model.model_name"), (["--model.model_name", "x"], "data.task")):
        with pytest.raises(SystemExit):
            parsed(["fit", *arguments])
        assert capsys.readouterr().err.startswith(f"error: `{missing}` must be given for ")


@pytest.mark.parametrize(
    ("code", "reason"),
    [("class FZOO(:", "SyntaxError: "), ("import no_such_module", "No module named 'no_such_module'.")],
)
def test_a_file_that_cannot_be_imported(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_method.py").write_text(f"{code}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit):
        parsed(["fit", "--method", "broken_method.FZOO"])
    words = "error: `method` is 'broken_method.FZOO', and broken_method cannot be imported: "
    assert capsys.readouterr().err.startswith(words + reason)


def test_bugs_keep_their_traceback(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs.folder / "broken.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Broken(Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        raise ValueError('a bug of the user')\n"
    )
    (runs.folder / "broken.yaml").write_text("trainer:\n  callbacks+:\n    - class_path: broken.Broken\n")
    monkeypatch.syspath_prepend(runs.folder)
    with pytest.raises(ValueError, match="a bug of the user"):
        runs("fit", "--config", runs.folder / "broken.yaml", "--validate_first", "false")


def test_more_ranks_than_a_step_has_evaluations(runs: Runs) -> None:
    size = "--trainer.strategy.perturbation_parallel_size"
    error = runs.refused("fit", "--trainer.strategy", "ZerothOrderDDP", "--trainer.devices", 3, size, 3)
    assert error.startswith("error: `perturbation_parallel_size` is 3, but a step of MeZO has 2 evaluations to share")
    assert "\n" not in error and not (runs.folder / "logs").exists()


def test_no_gradients_under_a_strategy_without_them(runs: Runs) -> None:
    error = runs.refused("fit", "--trainer.strategy", "zo_ddp", "--trainer.devices", 1, method=None)
    assert error.startswith(
        "error: `trainer.strategy` is 'zo_ddp', under which no gradients are averaged, but `method`"
    )
    assert not (runs.folder / "logs").exists()
