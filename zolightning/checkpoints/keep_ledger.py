"""A run writes down every step as it is taken."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zolightning.checkpoints.checkpoint_io import require_writable
from zolightning.checkpoints.ledger import DamagedLedgerError, Ledger
from zolightning.checkpoints.replay import describe
from zolightning.checkpoints.weights_digest import weights_digest
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.settings import constructor_arguments
from zolightning.optim.subspace import SubspaceOptimizer

NAME = "ledger.bin"
_KEY = "zolightning.KeepLedger"
_SET_LATER = {"transport", "anchor", "left_state"}  # hyperparameters that callbacks set
_RECORDED = {"params", "lr", "seed"}
_GIVEN_BASES = "This run keeps no ledger: its bases are given to the method, and records do not have them."
_REQUIRES_GRAD = attrgetter("requires_grad")


class KeepLedger(Callback):
    """Appends the record of every step to ``ledger.bin``, from which :func:`~zolightning.checkpoints.replay.replay`
    makes the trained weights again.

    A step is 45 to 64 bytes for one query, written as soon as the weights have changed, so that a killed process loses
    none but the one it was in. Checkpoints wait until the ledger is on the disk. A run that goes on from a checkpoint
    goes on in its ledger, from which the steps after the checkpoint are cut off; in another folder it begins with a
    copy. The ledger thus always describes the steps that led to the present weights. A ledger that is in the way of a
    new run is kept, and the new one called ``ledger-v1.bin``.

    A run whose bases are taken from activations keeps none. What else a record does not say ends the ledger, with a
    warning: hyperparameters other than the learning rate that change in mid-run, or other parameters that train. With
    several ranks, the first one writes.

    Args:
        dirpath: folder of the file; None takes that of the run's logs, or else ``default_root_dir``.

    Attributes:
        path: of the last fit's ledger; None where there is none, as on all ranks but the first.

    Raises:
        ValueError: in ``setup``, if `dirpath` cannot be written to.
        MisconfigurationException: when training starts, if there is no zeroth-order method.
        OSError: in a step, if the disk is full; the run then goes on from its last checkpoint.

    Example::

        trainer = L.Trainer(callbacks=[ZerothOrder(partial(MeZO, lr=1e-6)), KeepLedger(), SaveLast()])
    """

    def __init__(self, dirpath: str | Path | None = None) -> None:
        self.dirpath = dirpath
        self.ledger: Ledger | None = None  # while it is written
        self.path: Path | None = None
        self._folder = Path()
        self._saved: dict[str, Any] | None = None  # what the checkpoint says; {} if it has no ledger
        self._near: Path | None = None  # where the checkpoint lies
        self._constants: set[str] = set()  # hyperparameters that records do not repeat
        self._groups: list[dict[str, Any]] = []  # their values
        self._refresh = 0
        self._optimizer: ZerothOrderOptimizer | None = None
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != TrainerFn.FITTING:
            return
        self._saved = self.path = None
        # `log_dir` is a broadcast: on every rank.
        self._folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero and self._writes(trainer):
            require_writable("dirpath", self._folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizers = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, ZerothOrderOptimizer)]
        if not optimizers:
            raise MisconfigurationException(
                "KeepLedger needs a zeroth-order method (the ZerothOrder callback), got "
                f"{', '.join(type(optimizer).__name__ for optimizer in trainer.optimizers) or 'no optimizer'}."
            )
        optimizer = optimizers[0]
        if not trainer.is_global_zero or not self._writes(trainer):
            return
        step = optimizer.param_groups[0]["step"]
        self._refresh = optimizer.param_groups[0].get("refresh", 0)
        if _has_given_bases(optimizer):  # of a checkpoint
            rank_zero_info(_GIVEN_BASES)
        elif self._saved is None:
            self.ledger = Ledger.create(_free(self._folder), describe(optimizer, pl_module))
            self.ledger.go_on(0)
        else:
            self.ledger = self._continued(step)
        if self.ledger is not None:
            self._optimizer, self.path = optimizer, self.ledger.path
            self._constants = (constructor_arguments(optimizer) | _SET_LATER) - _RECORDED
            self._groups = self._constant(optimizer)
            self._hook = optimizer.register_step_post_hook(self._append)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.ledger is not None:
            self.ledger.sync()
            # Not the callback's state: Lightning would ask whoever validates the checkpoint for the callback.
            checkpoint[_KEY] = {"path": str(self.ledger.path.absolute()), "checksum": self.ledger.checksum}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._saved = checkpoint.get(_KEY, {})
            self._near = None if trainer.ckpt_path is None else Path(str(trainer.ckpt_path)).parent

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.ledger is not None and self._optimizer is not None:
            self._optimizer.fold()  # whoever else does it now may come later
            self.ledger.close(weights_digest(dict(pl_module.named_parameters())))
            self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()  # Lightning calls no teardown after an exception or an interrupt

    def _append(self, optimizer: Optimizer, *_: Any) -> None:
        assert isinstance(optimizer, ZerothOrderOptimizer) and self.ledger is not None
        record = optimizer.record
        assert record is not None, "a step has just been taken"
        if (groups := self._constant(optimizer)) != self._groups:
            pairs = zip(groups, self._groups, strict=False)
            names = sorted({name for now, then in pairs for name in now if now[name] != then.get(name)})
            what = f"`{names[0]}` of a parameter group changed" if names else "a parameter group was added"
            self._give_up(f"{what} before step {record.step}, which no record says")
            return
        if record.refresh != self._refresh and _has_given_bases(optimizer):
            if len(self.ledger):
                self._give_up(f"bases were given to the method before step {record.step}, which no record says")
                return
            path, self.path = self.ledger.path, None
            self._end()
            path.unlink()
            rank_zero_info(_GIVEN_BASES)
            return
        self.ledger.append(record)
        self._refresh = record.refresh

    def _constant(self, optimizer: ZerothOrderOptimizer) -> list[dict[str, Any]]:
        """What must stay as it is, by group."""
        return [
            {name: group[name] for name in self._constants & group.keys()}
            | {"requires_grad": list(map(_REQUIRES_GRAD, group["params"]))}
            for group in optimizer.param_groups
        ]

    def _continued(self, step: int) -> Ledger | None:
        """The ledger that leads to a checkpoint, opened after `step`; None, with a warning, if there is none."""
        assert self._saved is not None
        if not self._saved:
            self._give_up("the checkpoint is of a run without one")
            return None
        saved = Path(self._saved["path"])
        near = [] if self._near is None else [self._near.parent / saved.name, self._near / saved.name]
        reason = f"there is no {saved}"
        for path in dict.fromkeys([self._folder / saved.name, saved, *near]):
            if not path.is_file():
                continue
            try:
                ledger = Ledger(path)
                steps = step - ledger.header.first_step
                if not 0 <= steps <= len(ledger):
                    reason = f"{path} has {len(ledger)} steps, and the checkpoint is of step {step}"
                elif ledger.checksum_after(steps) != self._saved["checksum"]:
                    reason = f"{path} is of another run than the checkpoint"
                else:
                    if path.parent.resolve() != self._folder.resolve():
                        ledger = ledger.copy(_free(self._folder), steps)
                    ledger.go_on(steps)
                    return ledger
            except (DamagedLedgerError, ValueError) as error:
                reason = str(error).rstrip(".")
        self._give_up(reason)
        return None

    def _give_up(self, why: str) -> None:
        rank_zero_warn(f"This run keeps no ledger from here on: {why}. It cannot be replayed; checkpoints can be used.")
        self._end()

    def _end(self) -> None:
        if self.ledger is not None:
            self.ledger.close()
            self._stop()

    def _stop(self) -> None:
        self.ledger = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @staticmethod
    def _writes(trainer: L.Trainer) -> bool:
        return not trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a function of the Trainer's module


def _has_given_bases(optimizer: ZerothOrderOptimizer) -> bool:
    return isinstance(optimizer, SubspaceOptimizer) and optimizer.has_given


def _free(folder: Path) -> Path:
    """The path of a new ledger in a folder: no other one's."""
    path, version = folder / NAME, 0
    while path.exists():
        version += 1
        path = path.with_name(f"ledger-v{version}.bin")
    return path
