"""``--help`` of a subcommand on two screens; ``--help_all`` prints what jsonargparse knows of every option."""

import argparse
import re
import textwrap
from typing import Any

_WIDTH, _COLUMN = 118, 39
_ROLE = re.compile(r":\w+:`~?([^`]+)`")

# The options that people use, by topic; entries that are no options are printed as lines of text.
_GROUPS: dict[str, tuple[str, ...]] = {
    "config": ("config", "print_config", "seed_everything", "seeds"),
    "method": (
        "method",
        "lr_scheduler",
        "lr_probe",
        "lr_control",
        "`--method.help MeZO` lists the settings of one, such as --method.lr",
    ),
    "scope": ("scope", "linear_probing", "`--scope.help DominantLayer` lists the settings of one"),
    "blocks": ("blocks", "`--blocks BlockCoordinateDescent --blocks.order RandomPermutation --blocks.interval 100`"),
    "subspaces": ("resampling", "transport", "`--resampling.interval 50`, `--transport.how reset`"),
    "evaluation": (
        "evaluation.micro_batch_size",
        "evaluation.evaluations_per_forward",
        "evaluation.keep_prefix_gib",
        "evaluation.cuda_graphs",
        "evaluation.skip_nonfinite",
    ),
    "data": ("data", "`--data.task sst2 --data.path FOLDER --data.batch_size 16`; all: `--data.help PromptDataModule`"),
    "model": ("model", "`--model.model_name NAME_OR_FOLDER --model.dtype bfloat16`; all: `--model.help CausalLM`"),
    "length of the run": (
        "trainer.max_steps",
        "trainer.max_epochs",
        "trainer.max_time",
        "trainer.val_check_interval",
        "trainer.limit_val_batches",
        "validate_first",
        "test_last",
    ),
    "precision and devices": ("trainer.precision", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    "logging": ("trainer.default_root_dir", "trainer.logger", "trainer.log_every_n_steps", "trainer.callbacks"),
    "checkpoints": (
        "checkpoint.monitor",
        "checkpoint.mode",
        "checkpoint.dirpath",
        "save_last.every_n_train_steps",
        "save_last.every_n_minutes",
        "ckpt_path",
        "weights_only",
        "keep_ledger",
    ),
}
_OF_A_COMMAND = {"predict": ("predictions.path",)}  # besides its own arguments
_TEXTS = {
    "method": "MeZO, LOZO, SubZero, ...: zeroth-order method; without one, backpropagation with `model.optimizer`",
    "scope": "DominantLayer, TrainLayers, ...: which parameters train; without one, all",
    "evaluation.micro_batch_size": "evaluate a batch in parts of this many examples",
    "evaluation.evaluations_per_forward": "evaluations of a step that share one forward pass",
    "evaluation.keep_prefix_gib": "GiB for kept outputs of the layers below those that train",
    "evaluation.cuda_graphs": "launch the network's forward with one call, on a CUDA device",
    "trainer.max_steps": "stop after this many steps; -1 for no limit",
    "trainer.max_epochs": "stop after this many epochs",
    "trainer.max_time": "stop after this time, DD:HH:MM:SS",
    "trainer.limit_val_batches": "validation batches to use: a number, or a fraction such as 0.5",
    "trainer.precision": "32-true, bf16-true, 16-true, bf16-mixed or 64-true",
    "trainer.accelerator": "cpu, gpu or auto",
    "trainer.devices": "how many devices, a list of which, or auto",
    "trainer.strategy": "auto, ddp, zo_ddp (sends losses only) or zo_fsdp (shards too)",
    "trainer.default_root_dir": "folder of runs: curves, config, checkpoints",
    "trainer.logger": "a logger beside TensorBoard's, such as WandbLogger; false: none",
    "trainer.log_every_n_steps": "steps between two points of a curve",
    "trainer.val_check_interval": "training batches between two validations",
    "checkpoint.monitor": "metric of the best checkpoint; null: the first that the task has, or val/loss",
    "checkpoint.mode": "min or max, of a metric that `checkpoint.monitor` names",
    "checkpoint.dirpath": "folder of the checkpoints; null: `checkpoints` in the folder of the run",
    "ckpt_path": "checkpoint to resume from, or to evaluate: a file, last or best",
    "predictions.path": "file to write",
    "weights_only": "false to unpickle a checkpoint from a source that you trust",
    "keep_ledger": "append each step to ledger.bin, from which `zolightning replay` rebuilds the model",
    "save_last.every_n_minutes": "minutes between two saves of last.ckpt; null: none by time",
    "save_last.every_n_train_steps": "steps between two saves of last.ckpt; null: none by steps",
    "config": "file of settings; later files and flags win (list: `zolightning configs`)",
    "print_config": "print the resulting settings, and exit",
    "seed_everything": "seed of the run",
    "data": "class of the data module",
    "model": "class of the model",
    "trainer.callbacks": "further callbacks, a list in YAML",
}


class HelpAll(argparse.Action):
    """Prints every option and exits."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help="every option")

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all_help())
        parser.exit()


def short_help(parser: argparse.ArgumentParser) -> str:
    """The options that people use, in groups, a line each."""
    actions = {action.dest: action for action in parser._actions}
    hidden = {dest for dest, action in actions.items() if action.help == argparse.SUPPRESS}
    grouped = {name for names in _GROUPS.values() for name in names} | {"help"}
    whole_groups = {dest.partition(".")[0] for dest in actions if "." in dest}  # each takes a file of its settings
    command = parser.prog.split()[-1]
    own = _OF_A_COMMAND.get(command, ()) + tuple(
        dest
        for dest, action in actions.items()
        if dest not in grouped | whole_groups and "." not in dest and not isinstance(action, HelpAll)
    )
    lines = [f"usage: {parser.usage}", "", *textwrap.wrap(parser.description or "", _WIDTH)]
    groups = {f"{command} only": own, **_GROUPS} if own else _GROUPS
    for title, names in groups.items():
        shown = [name for name in names if name not in hidden]
        entries = [_entry(actions[name]) if name in actions else [f"  {name}"] for name in shown]
        lines += ["", f"{title}:", *(line for entry in entries for line in entry)]
    lines += ["", "--help_all lists every option, of Lightning's Trainer too."]
    return "\n".join(lines) + "\n"


def without_markup(text: str) -> str:
    """Text of docstrings as it is read on a screen, without Sphinx's roles and with single backticks."""
    return _ROLE.sub(r"`\1`", text).replace("``", "`")


def _entry(action: argparse.Action) -> list[str]:
    option = f"  {action.option_strings[-1].rstrip('+')}"
    plain = " ".join(without_markup(action.help or "").split())
    text = _TEXTS.get(action.dest) or re.split(r"(?<=[.;])\s|\s\(default|\s\(type", plain)[0].rstrip(".;")
    default = action.default
    if isinstance(default, str | int | float) and default not in (argparse.SUPPRESS, ""):
        text += f" (default: {default})"
    wrapped = textwrap.wrap(text, _WIDTH - _COLUMN)[:2] or [""]
    first = f"{option:{_COLUMN}}{wrapped[0]}" if len(option) < _COLUMN else f"{option}  {wrapped[0]}"
    return [first, *(" " * _COLUMN + line for line in wrapped[1:])]
