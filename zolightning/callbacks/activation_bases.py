"""Bases of subspaces from the inputs of layers, instead of at random."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from zolightning.checks import require_choice, require_fraction, require_integer, require_positive
from zolightning.directions.basis import Basis
from zolightning.directions.second_moment import Leading, Scaling, SecondMoment, scaled
from zolightning.layers import LayerStack, find_layers
from zolightning.messages import counted, some
from zolightning.optim.subspace import SubspaceOptimizer
from zolightning.scopes.calibration import calibration_batches, calibration_forward
from zolightning.scopes.input_moments import INPUT_DIM, InputMoments, Side
from zolightning.scopes.token_mask import TokenMask

Examples = Literal["prompts", "batch"]

_DIRECTIONS, _VALUES = "input_directions", "input_values"  # keys of the state, for `decay`; values end with the energy

SameInputs = list[tuple[str, Side]]  # names of matrices that read the same, and the side on which each has its inputs


class Searched(NamedTuple):
    """A matrix that needs a basis of at most `rank` columns."""

    parameter: nn.Parameter
    rank: int


class InputBases(NamedTuple):
    """The bases that were found."""

    given: dict[nn.Parameter, Basis]  # for each matrix with known inputs, a factor on their side
    shares: dict[str, float]  # of the inputs' energy that lies in the span of the factor, by name of the matrix
    without: list[str]  # names of the matrices that keep the method's own factors
    forward_passes: int  # made to find them

    @property
    def share(self) -> float:
        """The mean of the shares."""
        return sum(self.shares.values()) / max(1, len(self.shares))

    def __str__(self) -> str:
        others = f"; none for {some(self.without)}" if self.without else ""
        matrices = counted(len(self.shares), "matrix", "matrices")
        return f"Bases from inputs of {matrices} hold {100 * self.share:.0f} % of their energy{others}."

    def table(self) -> str:
        """One line a matrix: the share of its inputs' energy that its basis holds."""
        return "\n".join(f"{100 * share:5.1f} %  {name}" for name, share in self.shares.items())


@dataclass(frozen=True)
class ActivationBases:
    """Bases from the leading directions of each layer's inputs (AGZO, arXiv 2601.17261; ZO-Act, arXiv 2607.01125).

    For a matrix W that is used in a product ``x W'``, the right factor holds the leading eigenvectors of the mean of
    ``x x'``, scaled, as many as the method's `rank`. (The ``Conv1D`` of transformers computes ``x W``; there it is the
    left factor.) SubZero keeps a random factor on the other side; ZO-Muon, ZO-MOPI and Subspace-MeZO search on the side
    of the inputs instead of their own. Padding is left out. Matrices that are used in other ways (embeddings,
    convolutions), or whose inputs are zero or not finite, keep the method's random factors.

    Statistics are summed over all ranks, and all ranks use the first one's result. The factors are part of the
    optimizer's state, in the weight's dtype, so a resumed run has the same bits; a replay needs them in addition to the
    records. The forward passes are counted with those of the next step.

    Args:
        scaling: how columns are scaled: "unit", "rms" or "whitened", see
            :func:`~zolightning.directions.second_moment.scaled`. Each needs a learning rate of its own.
        limit: the limit of the scaling "rms".
        skip: how many leading directions to leave out. The first one is often common to all inputs.
        first_token: whether to include the first token of each sequence, whose activations are massive in many models.
        examples: the examples to look at: "prompts", the first ones of the training data, or the "batch" that the next
            step trains on.
        num_prompts: number of "prompts".
        passes: passes over the examples; a second one makes the directions of wide inputs more accurate.
        refresh: whether to recompute the bases whenever new subspaces are drawn; otherwise they are computed once,
            before the first step. Random factors are redrawn in either case.
        decay: weight of the old statistics at a refresh, of which only the leading directions are kept (the streaming
            estimate of AIM-ZO); 0 uses only the new ones.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    scaling: Scaling = "rms"
    limit: float = 5.0
    skip: int = 0
    first_token: bool = True
    examples: Examples = "prompts"
    num_prompts: int = 64
    passes: int = 2
    refresh: bool = False
    decay: float = 0.0

    def __post_init__(self) -> None:
        require_choice("scaling", self.scaling, get_args(Scaling))
        require_choice("examples", self.examples, get_args(Examples))
        require_positive("limit", self.limit)
        require_integer("num_prompts", self.num_prompts)
        require_integer("passes", self.passes)
        require_integer("skip", self.skip, least=0)
        require_fraction("decay", self.decay)
        if self.decay and not self.refresh:
            raise ValueError(
                f"`decay` is {self.decay}, but without `refresh` the examples are run only once. Set `refresh`."
            )

    def find(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: SubspaceOptimizer, batch: Any
    ) -> InputBases:
        """Runs the module on examples at its stored weights and computes bases from the inputs of its matrices.

        Its ``training_step`` is run, in evaluation mode and without gradients; `batch` is that of the next step. Frozen
        matrices get no bases.
        """
        matrices = {
            name: Searched(parameter, matrix.rank)
            for group in optimizer.param_groups
            for name, (parameter, matrix) in optimizer.split(group, frozen=True)[0].items()
            if parameter.requires_grad and optimizer.trainable_shape(parameter) == matrix.shape
        }
        count = self.skip + max((matrix.rank for matrix in matrices.values()), default=0)
        batches = [batch]
        if self.examples == "prompts":
            examples = calibration_batches(trainer, pl_module, self.num_prompts)
            batches = [trainer.precision_plugin.convert_input(batch) for batch in examples]
        groups, moments = self._look(trainer, pl_module, optimizer, matrices, count, batches)
        found: list[Leading | None] = []
        for ((name, _), *_), moment in zip(groups, moments, strict=True):
            before = _kept_in(optimizer.state[matrices[name].parameter]) if self.decay else None
            if before is not None:
                moment.blend(before, self.decay)
            leading = moment.leading(count) if trainer.is_global_zero else None
            found.append(None if leading is None else leading.to("cpu"))

        given: dict[nn.Parameter, Basis] = {}
        shares: dict[str, float] = {}
        for group, leading in zip(groups, trainer.strategy.broadcast(found), strict=True):
            if leading is None or self.skip >= len(leading.values):
                continue
            for name, side in group:
                parameter, rank = matrices[name]
                chosen = leading.part(slice(self.skip, self.skip + rank))
                given[parameter] = Basis(**{side: scaled(chosen, self.scaling, self.limit)})
                shares[name] = chosen.share
                if self.decay:
                    _keep_in(optimizer.state[parameter], leading.to(parameter.device))
        return InputBases(given, shares, [name for name in matrices if name not in shares], self.passes * len(batches))

    def _look(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        optimizer: SubspaceOptimizer,
        matrices: dict[str, Searched],
        count: int,
        batches: list[Any],
    ) -> tuple[list[SameInputs], list[SecondMoment]]:
        """Runs the module on the batches.

        Returns:
            The matrices in groups that read the same inputs, and the second moment of each group's inputs, summed over
            all ranks.
        """
        names = {matrix.parameter: name for name, matrix in matrices.items()}
        seed = optimizer.param_groups[0]["seed"]

        def new(weight: nn.Parameter, side: Side) -> SecondMoment:
            size = optimizer.trainable_shape(weight)[INPUT_DIM[side]]
            return SecondMoment(size, count, seed, names[weight], weight.device)

        tokens = TokenMask(pl_module, _layers(pl_module))
        watch = InputMoments({p: optimizer.slices.get(p) for p in names}, tokens, new, self.first_token)
        groups: list[SameInputs] = []
        moments: list[SecondMoment] = []
        for number in range(self.passes):
            for moment in moments:
                moment.again()
            with isolate_rng(), tokens, watch:
                for examples in batches:
                    calibration_forward(pl_module, examples)
            if number == 0:
                # The groups of the first rank are used by all, because an expert may not have run on every rank.
                groups = trainer.strategy.broadcast(_groups(watch, names))
                moments = [watch.of([(matrices[name].parameter, side) for name, side in group]) for group in groups]
            for moment in moments:
                moment.product = trainer.strategy.reduce(moment.product, reduce_op="sum")
                moment.totals = trainer.strategy.reduce(moment.totals, reduce_op="sum")
        return groups, moments


def _keep_in(state: dict[str, Any], leading: Leading) -> None:
    """Keeps statistics in the state of a matrix for the next refresh."""
    state[_DIRECTIONS] = leading.directions
    state[_VALUES] = torch.cat([leading.values, leading.values.new_tensor([leading.energy])])


def _kept_in(state: dict[str, Any]) -> Leading | None:
    if _DIRECTIONS not in state:
        return None
    return Leading(state[_DIRECTIONS], state[_VALUES][:-1], state[_VALUES][-1].item())


def _groups(watch: InputMoments, names: dict[nn.Parameter, str]) -> list[SameInputs]:
    """Name and side of all matrices, in groups that share a moment."""
    groups: dict[int, SameInputs] = {}
    for weight, (side, moment) in watch.moments.items():
        groups.setdefault(id(moment), []).append((names[weight], side))
    return list(groups.values())


def _layers(module: nn.Module) -> LayerStack:
    try:
        return find_layers(module)
    except ValueError:  # a module without a list of layers: masks are looked for everywhere
        return LayerStack("", (), ())
