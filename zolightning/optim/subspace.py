"""Methods that search in a subspace of each weight matrix: probing, and what becomes of the projected gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.dense import Direction, directions
from zolightning.directions.kernels import chunks
from zolightning.directions.low_rank import LowRank
from zolightning.directions.noise import NOISE_KINDS, NoiseKind
from zolightning.directions.perturbation import Perturbation
from zolightning.optim.checks import require_choice, require_fraction, require_positive
from zolightning.optim.moments import CHUNK, adam_, momentum_
from zolightning.optim.precision import State, add_direction, add_tensor, packed
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace_weights import TRANSPORTS, Matrix, SubspaceWeights

_DENOMINATOR_EPS = 1e-8


class SubspaceOptimizer(SubspaceWeights):
    """Abstract: directions are lifts of random cores, and so are updates.

    Parameters of less than two dimensions, and matrices too thin for a subspace, move along dense directions with
    ``vector_lr``; where that is 0 they stay as they are.

    Args:
        rank: columns of a factor; no more than the matrix allows, which a line says.
        vector_lr: learning rate of what moves along dense directions; schedulers scale it with `lr`.
        noise: distribution of the cores and of dense directions.

    The other arguments are those of :class:`~zolightning.optim.base.ZerothOrderOptimizer`. In `defaults` may be
    ``momentum``, the decay of an exponential mean of core gradients (``m = momentum * m + (1 - momentum) * g``), or
    ``betas``, Adam's decays on the core. A group also has ``transport`` ("project", "reset" or "keep": what resampling
    does to the momentum), ``anchor`` (how many dominant directions of the momentum stay in the new basis) and
    ``refresh``, the index of the basis; the callbacks :class:`~zolightning.callbacks.SubspaceResampling` and
    :class:`~zolightning.callbacks.MomentumTransport` set them.
    """

    partners = ("SubspaceResampling",)

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        rank: int,
        vector_lr: float,
        noise: NoiseKind = "gaussian",
        **common: Any,
    ) -> None:
        require_choice("noise", noise, NOISE_KINDS)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` must be an integer, at least 1, got {rank!r}.")
        require_positive("lr", defaults["lr"])
        if not vector_lr >= 0:
            raise ValueError(f"`vector_lr` must not be negative, got {vector_lr!r}.")
        shared = {
            "rank": rank,
            "vector_lr_ratio": vector_lr / defaults["lr"],
            "momentum": 0.0,
            "betas": None,
            "transport": "project",
            "anchor": 0,
            "refresh": 0,
        }
        self.noise: NoiseKind = noise
        super().__init__(params, shared | defaults, **common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's; a group may have its own ``vector_lr``."""
        if "vector_lr" in param_group:
            lr = param_group.get("lr", self.defaults["lr"])
            param_group = param_group | {"vector_lr_ratio": param_group["vector_lr"] / lr}
            del param_group["vector_lr"]
        super().add_param_group(param_group)

    # What a method defines

    def direction_scale(self, matrix: Matrix) -> float:
        """What unit-variance cores are multiplied by to give directions."""
        return 1.0

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        """The step per `lr` from smoothed core gradients of matrices of one shape, both (batch, rows, columns)."""
        return gradients

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_fraction("momentum", group["momentum"])
        for place, beta in enumerate(group["betas"] or ()):
            require_fraction(f"betas[{place}]", beta)
        require_choice("transport", group["transport"], TRANSPORTS)

    # A step

    def offsets(self) -> dict[nn.Parameter, Perturbation]:
        """The lifts of pending cores, those of frozen parameters too."""
        return {
            parameter: LowRank(self.basis(parameter), matrix[:2], self.state[parameter]["core"], None)
            for group in self.param_groups
            for parameter, matrix in self.split(group, frozen=True)[0].values()
            if "core" in self.state.get(parameter, {})
        }

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        found = self.offsets()
        for group in self.param_groups:
            matrices, vectors = self.split(group)
            coefficients = {query: sign * group["eps"]}
            if group["vector_lr_ratio"]:
                dense = directions(vectors, group["seed"], group["step"], coefficients, self.noise)
                found |= {parameter: dense[name] for name, parameter in vectors.items()}
            cores = self._core_directions(matrices, group["seed"], group["step"], coefficients)
            for name, (parameter, matrix) in matrices.items():
                pending = self.state.get(parameter, {}).get("core")
                found[parameter] = LowRank(self.basis(parameter), matrix[:2], pending, cores[name])
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self.split(group)
            keep = 1 - group["momentum"] if group["momentum"] and not group["betas"] else 1.0
            coefficients = {q: keep * g / len(record.projected_grads) for q, g in enumerate(record.projected_grads)}
            if group["vector_lr_ratio"]:
                self._update_vectors(group, vectors, record, coefficients, lr * group["vector_lr_ratio"])
            cores = self._core_directions(matrices, record.seed, record.step, coefficients)
            batches: dict[tuple[int, int], list[tuple[State, Tensor]]] = {}
            for name, (parameter, matrix) in matrices.items():
                state, core = self.state[parameter], self.core(parameter, matrix)
                batches.setdefault(tuple(core.shape), []).append((state, self._smooth(state, core, cores[name], group)))
            for pairs in batches.values():
                states = [state for state, _ in pairs]
                steps = self.core_step(torch.stack([gradient for _, gradient in pairs]), states, group)
                for state, step in zip(states, steps, strict=True):
                    state["core"].sub_(step, alpha=lr)

    def core_gradient(self, parameter: nn.Parameter, record: StepRecord) -> Tensor:
        """What a record says of the gradient of a matrix, in the coordinates of the basis now."""
        matrix = self.matrix(parameter, self._group_of(parameter)["rank"])
        coefficients = {q: g / len(record.projected_grads) for q, g in enumerate(record.projected_grads)}
        named = {(name := self._names[parameter]): (parameter, matrix)}
        gradient = torch.zeros_like(self.core(parameter, matrix))
        self._core_directions(named, record.seed, record.step, coefficients)[name].accumulate(gradient)
        return gradient

    def _smooth(self, state: State, core: Tensor, gradient: Direction, group: dict[str, Any]) -> Tensor:
        """The core gradient after momentum or Adam, of the core's shape."""
        if group["betas"]:
            return adam_(state, core, gradient, group["betas"], _DENOMINATOR_EPS).view(core.shape)
        if group["momentum"]:
            return momentum_(state, core, gradient, group["momentum"]).view(core.shape)
        plain = torch.zeros_like(core)
        gradient.accumulate(plain)
        return plain

    def _update_vectors(
        self,
        group: dict[str, Any],
        vectors: dict[str, nn.Parameter],
        record: StepRecord,
        coefficients: dict[int, float],
        lr: float,
    ) -> None:
        factor = 1.0 if group["momentum"] and not group["betas"] else -lr
        scaled = {query: factor * value for query, value in coefficients.items()}
        gradients = directions(vectors, record.seed, record.step, scaled, self.noise)
        for name, parameter in vectors.items():
            state = self.state[parameter]
            with packed(parameter, self.slices.get(parameter)) as weight:
                if factor == 1.0:
                    momentum = momentum_(state, weight, gradients[name], group["momentum"])
                    for part in chunks(weight.numel(), CHUNK):
                        add_tensor(weight, state, -lr * momentum[part], "exact", start=part.start)
                else:
                    add_direction(weight, state, gradients[name], "exact")

    def _core_directions(
        self,
        matrices: dict[str, tuple[nn.Parameter, Matrix]],
        seed: int,
        step: int,
        coefficients: dict[int, float],
    ) -> dict[str, Direction]:
        by_scale: dict[float, dict[str, Tensor]] = {}
        for name, (parameter, matrix) in matrices.items():
            by_scale.setdefault(self.direction_scale(matrix), {})[name] = parameter
        found: dict[str, Direction] = {}
        for scale, named in by_scale.items():
            scaled = {query: scale * value for query, value in coefficients.items()}
            found |= directions(named, seed, step, scaled, self.noise)
        return found
