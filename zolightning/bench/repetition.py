"""Whether training is the same again, bit for bit: resumed from the middle, and without CUDA graphs."""

import hashlib
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zolightning.bench.shapes import model_of_shape
from zolightning.bench.step import random_token_loss
from zolightning.callbacks import SubspaceResampling, ZerothOrder
from zolightning.checkpoints.checkpoint_io import AtomicCheckpointIO
from zolightning.commands.configured_trainer import SILENT
from zolightning.optim import (
    EGGROLL,
    GRZO,
    LOZO,
    ZOMOPI,
    ConMeZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    SparseMeZO,
    StepRecord,
    SubspaceMeZO,
    SubZero,
    ZOMuon,
)
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.estimators import OneSided, TwoSided
from zolightning.optim.subspace import SubspaceOptimizer

METHODS: dict[str, partial[Any]] = {
    "LOZO": partial(LOZO, lr=1e-5, rank=2),
    "ZO-MOPI": partial(ZOMOPI, lr=1e-3, rank=16, power_rank=8, num_queries=2),
    "SubZero": partial(SubZero, lr=1e-5, rank=16),
    "ZO-Muon": partial(ZOMuon, lr=1e-3, rank=16, num_queries=2, estimator=OneSided()),
    "MeZO-Adam": partial(MeZOAdam, lr=1e-5),
    "Subspace-MeZO": partial(SubspaceMeZO, lr=1e-5, rank=16),
    "GRZO": partial(GRZO, lr=1e-4, rank=8, num_queries=2, estimator=TwoSided()),
    "EGGROLL": partial(EGGROLL, lr=1e-5, num_queries=4),
    "ConMeZO": partial(ConMeZO, lr=1e-5),
    "HiZOO": partial(HiZOO, lr=1e-5),
    "Sparse-MeZO": partial(SparseMeZO, lr=1e-5),
    "MeZO": partial(MeZO, lr=1e-5, weight_decay=1e-3),
    "MeZO, rademacher, momentum": partial(MeZO, lr=1e-5, noise="rademacher", momentum=0.9),
    "MeZO, native": partial(MeZO, lr=1e-5, update_precision="native"),
}

GRAPHED = ("LOZO", "MeZO")  # also with CUDA graphs, where there are any


class RandomTokens(L.LightningModule):
    """A model by shape that learns to predict random tokens, different ones at each step.

    Args:
        shape: a key of :data:`~zolightning.bench.shapes.SHAPES`; the weights are bfloat16.
        device: where the weights are made.
        tokens: the batches of a run, (steps, rows, length).
    """

    def __init__(self, shape: str, device: torch.device, tokens: Tensor) -> None:
        super().__init__()
        self.model = model_of_shape(shape, device=device).train()  # as Lightning expects it
        self.register_buffer("tokens", tokens % self.model.config.vocab_size, persistent=False)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        # Whatever a loader does in a resumed run
        return random_token_loss(self.model, self.get_buffer("tokens")[self.global_step])

    def configure_optimizers(self) -> None:
        """None: ZerothOrder brings one."""


class Records(Callback):
    """Keeps the step records of a run, and saves a checkpoint in its middle."""

    def __init__(self, save_after: int, path: Path) -> None:
        self.records: list[StepRecord | None] = []
        self.save_after = save_after
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        (optimizer,) = trainer.optimizers
        assert isinstance(optimizer, ZerothOrderOptimizer)
        if (graphs := optimizer.evaluator.graphs) is not None and graphs.is_off:
            raise RuntimeError("no graph is replayed")
        self.records.append(optimizer.record)
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


def runs(device: torch.device) -> list[tuple[str, "partial[Any]", bool]]:
    """The runs that are repeated on a device: name, method, and whether CUDA graphs replay the forwards.

    Those with graphs come first.
    """
    plain = [(name, method, False) for name, method in METHODS.items()]
    graphed = [(f"{name}, CUDA graphs", METHODS[name], True) for name in GRAPHED if name in METHODS]
    return (graphed if device.type == "cuda" else []) + plain


def compare(method: "partial[Any]", cuda_graphs: bool, device: torch.device, shape: str, steps: int) -> dict[str, int]:
    """Whether two runs have the same records and the same weights, as 1 or 0.

    The second run resumes from a checkpoint that the first wrote after half of its steps, with a model whose weights
    were zeros before. With CUDA graphs, a third run without them has to have the records and weights of the first. New
    subspaces are drawn at each quarter of the steps.
    """
    tokens = torch.randint(2**31, (steps, 4, 32), generator=torch.Generator().manual_seed(0))
    run, found = partial(_run, method, cuda_graphs, device), dict[str, int]()
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "half.ckpt"
        whole, weights = run(RandomTokens(shape, device, tokens), saved, None)
        other = RandomTokens(shape, device, tokens)
        for parameter in other.parameters():
            parameter.data.zero_()  # all of it has to come from the file
        resumed, resumed_weights = run(other, Path(folder) / "again.ckpt", saved)
        if cuda_graphs:
            plain = _run(method, False, device, RandomTokens(shape, device, tokens), Path(folder) / "plain.ckpt", None)
            found["same_without_graphs"] = int(plain == (whole, weights))
    return found | {
        "steps": len(whole),
        "same_records": int(resumed == whole[steps // 2 :]),
        "same_weights": int(resumed_weights == weights),
    }


def _run(
    method: partial[Any],
    cuda_graphs: bool,
    device: torch.device,
    module: RandomTokens,
    save_to: Path,
    resume_from: Path | None,
) -> tuple[list[StepRecord | None], str]:
    """The records of a run and a checksum of the weights that it ends with."""
    steps = len(module.get_buffer("tokens"))
    recorder = Records(steps // 2, save_to)
    is_subspace = isinstance(method.func, type) and issubclass(method.func, SubspaceOptimizer)
    resampling = [SubspaceResampling(max(1, steps // 4))] if is_subspace else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`update_precision` is 'native'")  # the row says so by its name
        warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer = L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",  # a module knows only where Lightning has put it
            devices=1,
            max_steps=steps,
            precision="bf16-true",
            callbacks=[ZerothOrder(method, cuda_graphs=cuda_graphs), recorder, *resampling],
            plugins=[AtomicCheckpointIO()],
            **SILENT,
        )
        loader = DataLoader(TensorDataset(torch.arange(steps)))
        trainer.fit(module, loader, ckpt_path=resume_from, weights_only=True if resume_from else None)
    checksum = hashlib.sha256()
    for parameter in module.parameters():
        checksum.update(parameter.detach().cpu().view(torch.int16).numpy().tobytes())
    return recorder.records, checksum.hexdigest()
