"""The command ``zolightning`` on wrong input, under bugs of others, and its help."""

import io
from contextlib import redirect_stdout

import pytest

from cli_runs import Runs, refused
from zolightning.cli import main

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
        (("--trainer.precision", "16-mixed"), "`trainer.precision` is '16-mixed'"),
        (("--trainer.accumulate_grad_batches", "2"), "`trainer.accumulate_grad_batches` is 2"),
        (("--trainer.gradient_clip_val", "1.0"), "`trainer.gradient_clip_val` is 1.0"),
        (("--data.init_args.task", "sst3"), "`data.task` must be one of agnews, "),
        (("--data.init_args.path", "no/such/folder"), "`data.path` must be a folder of JSON lines"),
        (("--data.init_args.batch_size", "0"), "`data.batch_size` must be at least 1, got 0"),
        (("--model.init_args.model_name", "./no-model"), "`model_name` './no-model' is a path, but nothing is there"),
        (("--method.lr", "-1"), "`lr` must be a positive number, got -1.0"),
        (("--ckpt_path", "no.ckpt"), "`ckpt_path` is no.ckpt, which is not a file"),
    ],
)
def test_wrong_settings_take_one_line(runs: Runs, options: tuple[str, str], message: str) -> None:
    with redirect_stdout(io.StringIO()) as output:
        error = refused(runs.arguments("fit", *options))
    assert error.startswith("error: " + message)
    assert "\n" not in error
    assert "before training" not in output.getvalue()  # not after minutes of validation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--config", "no-config.yaml"), "File does not exist"),
        (("--data.init_args.bogus", "1"), "Option 'bogus' is not accepted"),
        (("--trainer.max_steps", "many"), "trainer.max_steps"),
        (("--nothing", "1"), "nothing"),
    ],
)
def test_wrong_options_exit_with_the_parsers_message(
    runs: Runs, options: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(runs.arguments("fit", *options))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) < 15


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["Fine-tunes language models by forward passes only.", "fit", "export"]),
        (["fit", "--help"], ["usage: zolightning fit --config", "--validate_first", "--test_last", "val/accuracy"]),
        (["fit", "--model.help", "CausalLM"], ["--model.model_name", "GGUF"]),
        (["fit", "--data.help", "PromptDataModule"], ["--data.task", "train.jsonl"]),
        (["export", "--help"], ["--folder", "--ckpt_path"]),
    ],
)
def test_help(arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for part in expected:
        assert part in text
