"""The Trainer of the command line: Lightning's, with the subcommands it lacks."""

from zolightning.commands.configured_trainer import ConfiguredTrainer
from zolightning.commands.doctor import examine
from zolightning.commands.export import export_model
from zolightning.commands.profile import profile_layers
from zolightning.commands.replay import replay_run
from zolightning.commands.sweep_layers import train_each_layer


class Trainer(ConfiguredTrainer):
    """Lightning's Trainer, which can also examine runs, profile and compare layers, and export and replay models.

    Each subcommand is a function in a file of its own. Its first argument is the Trainer, its others are the flags.
    """

    doctor = examine
    export = export_model
    profile = profile_layers
    replay = replay_run
    sweep_layers = train_each_layer


# LightningCLI calls the method that has the name of the subcommand, and command lines join words by hyphens.
setattr(Trainer, "sweep-layers", train_each_layer)
