"""A Trainer that can make others with the same settings, which the subcommands run."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO

# The settings of a Trainer that writes and shows nothing.
SILENT: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)


class ConfiguredTrainer(L.Trainer):
    """Lightning's Trainer, which keeps its arguments, writes checkpoints atomically, and on a Mac chooses the CPU.

    Attributes:
        run_config: the configuration of the command line as plain values; empty without a command line.

    Raises:
        MisconfigurationException: for a run of one process that another rank's environment was left to, where Lightning
            would train, but neither log nor report.
    """

    def __init__(self, **settings: Any) -> None:
        # Untested, and without the float64 that the linear probe and several methods need.
        if settings.get("accelerator", "auto") == "auto" and MPSAccelerator.is_available():
            settings["accelerator"] = "cpu"
        super().__init__(**settings)
        rank = getattr(rank_zero_only, "rank", 0)
        if self.world_size == 1 and rank > 0:
            raise MisconfigurationException(
                "`trainer.devices` and `trainer.num_nodes` make one process, but RANK, LOCAL_RANK or SLURM_PROCID in "
                f"the environment says that this is rank {rank} of several. Set `trainer.devices` to the number of "
                "processes per node, or unset the variable."
            )
        self._settings = settings
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # and no plugin that the user chose
            self.strategy.checkpoint_io = AtomicCheckpointIO()
        self.run_config: Mapping[str, Any] = {}

    def with_settings(self, **changes: Any) -> L.Trainer:
        """A fresh Trainer with the same arguments, but for `changes`."""
        return L.Trainer(**self._settings | changes)

    def without_traces(self, **changes: Any) -> L.Trainer:
        """A fresh Trainer with the same arguments, but for `changes`, on one device, that writes and shows nothing."""
        return self.with_settings(**SILENT, fast_dev_run=False, devices=1, num_nodes=1, strategy="auto", **changes)
