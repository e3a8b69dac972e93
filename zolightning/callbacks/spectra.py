"""Singular values of estimated gradients, momentum and true gradients, as training goes on."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from zolightning.checks import require_integer, require_patterns
from zolightning.optim.bases import Matrix
from zolightning.optim.moments import keeps_moments
from zolightning.optim.momentum_transport import momentum_of
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.partners import subspace_optimizer, tensorboards
from zolightning.scopes.calibration import own_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Source = Literal["estimate", "momentum", "gradient"]
_TINY = 1e-30


class Spectra(Callback):
    """Shows the singular values of estimated gradients, as in figure 1 of ZO-MOPI (arXiv 2605.09034).

    For each chosen matrix it plots the singular values of each source against their index, relative to the largest, to
    TensorBoard as ``spectra/<name>``, and logs the stable rank, ``||M||_F^2 / ||M||_2^2``, as
    ``stable_rank/<source>/<name>``, both at the same steps. It does not change a bit of the run.

    Args:
        patterns: regular expressions; a matrix is chosen if one of them matches somewhere in its dotted name. It must
            be trained in a subspace.
        every_n_steps: steps between two plots, from the first step on.
        sources: "estimate", the estimated gradient of the step; "momentum", that of the method; and "gradient", the
            gradient by backpropagation on the step's batch, which takes the memory of backpropagation and a copy of the
            weights that train.

    Raises:
        MisconfigurationException: when training starts, if nothing matches, or there is no momentum to look at.
    """

    def __init__(
        self, patterns: Sequence[str], every_n_steps: int = 100, sources: Sequence[Source] = ("estimate",)
    ) -> None:
        require_patterns(patterns)
        require_integer("every_n_steps", every_n_steps)
        if not sources or not set(sources) <= set(get_args(Source)):
            raise ValueError(f"`sources` must be a list of some of {get_args(Source)}, got {sources!r}.")
        self.patterns = tuple(patterns)
        self.every_n_steps = every_n_steps
        self.sources = tuple(sources)
        self._gradients: dict[str, Tensor] = {}  # singular values of the step's true gradients, kept until its end

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = subspace_optimizer(trainer, self)
        for pattern in self.patterns:
            if not any(re.search(pattern, name) for name in _matrices(optimizer)):
                raise MisconfigurationException(
                    f"`patterns` has '{pattern}', which matches no matrix that trains in a subspace. Some of these: "
                    f"{', '.join(list(_matrices(optimizer))[:8]) or 'none'}."
                )
        if "momentum" in self.sources and not any(map(keeps_moments, optimizer.param_groups)):
            raise MisconfigurationException(
                "`sources` has 'momentum', but the method keeps none. Set its `momentum` above 0, or leave it out."
            )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        optimizer = subspace_optimizer(trainer, self)
        if "gradient" in self.sources and optimizer.param_groups[0]["step"] % self.every_n_steps == 0:
            chosen = {name: parameter for name, (parameter, _) in self._chosen(optimizer).items()}
            self._gradients = first_order_spectra(trainer, pl_module, optimizer, chosen, batch)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        optimizer = subspace_optimizer(trainer, self)
        record = optimizer.record
        if record is None or record.step % self.every_n_steps or not record.projected_grads:
            return
        for name, (parameter, matrix) in self._chosen(optimizer).items():
            basis = optimizer.basis(parameter)
            spectra: dict[str, Tensor] = {}
            if "estimate" in self.sources:
                spectra["estimate"] = basis.singular_values(optimizer.core_gradient(parameter, record))
            momentum = momentum_of(optimizer.state[parameter])
            if "momentum" in self.sources and momentum is not None:
                spectra["momentum"] = basis.singular_values(momentum.view(basis.core_shape(matrix.shape)))
            if name in self._gradients:
                spectra["gradient"] = self._gradients[name]
            ranks = {f"stable_rank/{source}/{name}": stable_rank(values) for source, values in spectra.items()}
            for each in trainer.loggers:
                each.log_metrics(ranks, record.step)  # `pl_module.log` would repeat them at later steps
            for logger in tensorboards(trainer):
                figure = spectra_figure(spectra, f"{name}, step {record.step}")
                logger.experiment.add_figure(f"spectra/{name}", figure, record.step)
        self._gradients = {}

    def _chosen(self, optimizer: SubspaceOptimizer) -> dict[str, tuple[nn.Parameter, Matrix]]:
        matrices = _matrices(optimizer)
        return {name: m for name, m in matrices.items() if any(re.search(pattern, name) for pattern in self.patterns)}


def first_order_spectra(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    optimizer: SubspaceOptimizer,
    chosen: dict[str, nn.Parameter],
    batch: Any,
) -> dict[str, Tensor]:
    """Singular values of the gradients of a batch's loss, at the weights that the network computes with."""
    folded = pl_module.state_dict()
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        for name, parameter in pl_module.named_parameters():
            if folded[name].data_ptr() != parameter.data_ptr():
                stack.callback(parameter.detach().copy_, parameter.detach().clone())
                parameter.detach().copy_(folded[name])
        stack.enter_context(trainer.precision_plugin.train_step_context())
        stack.enter_context(torch.enable_grad())
        output: Any = own_loss(pl_module, batch)
        loss = output["loss"] if isinstance(output, dict) else output
        gradients = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    spectra = {}
    for (name, parameter), gradient in zip(chosen.items(), gradients, strict=True):
        if gradient is not None:
            part = optimizer.slices.get(parameter)
            compact = gradient if part is None else part.take(gradient)
            spectra[name] = torch.linalg.svdvals(compact.reshape(compact.shape[0], -1).float())
    return spectra


def stable_rank(singular_values: Tensor) -> float:
    """``||M||_F^2 / ||M||_2^2``: how many equal singular values would have that much energy; 0 for a zero matrix."""
    largest = singular_values.max().clamp_min(_TINY)
    return (singular_values / largest).square().sum().item()


def spectra_figure(spectra: dict[str, Tensor], title: str) -> "Figure":
    """Singular values against their index, relative to the largest of each source, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for source, values in spectra.items():
        shown = values[values > 0].cpu() / values.max().clamp_min(_TINY).cpu()
        axes.plot(range(1, len(shown) + 1), shown.tolist(), label=source, marker=".", markersize=3, linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / largest")
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure


def _matrices(optimizer: SubspaceOptimizer) -> dict[str, tuple[nn.Parameter, Matrix]]:
    return {name: matrix for group in optimizer.param_groups for name, matrix in optimizer.split(group)[0].items()}
