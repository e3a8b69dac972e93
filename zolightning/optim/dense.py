"""Base classes of methods with dense directions: a random number for every element of every parameter."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from zolightning.checks import require_choice
from zolightning.directions.dense import Direction, directions
from zolightning.directions.perturbation import Perturbation
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.moments import descend
from zolightning.optim.precision import State
from zolightning.optim.record import StepRecord


class DenseOptimizer(ZerothOrderOptimizer):
    """Abstract: searches along dense directions of unit variance; a method defines :meth:`update`.

    Args:
        params, defaults: see :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
        noise: "gaussian" (17-valued, see :mod:`zolightning.kernels.noise`) or "rademacher".
        **common: num_queries, align_queries, estimator, seed, update_precision: see
            :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, noise: NoiseKind = "gaussian", **common: Any
    ) -> None:
        require_choice("noise", noise, NOISE_KINDS)
        super().__init__(params, defaults, **common)
        self.noise: NoiseKind = noise

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "directions" in vars(cls):
            raise TypeError(
                f"{cls.__name__} overrides `directions`, but then steps would not go along the directions of "
                "evaluations: override `directions_of`, which makes both."
            )

    def directions(
        self, group: dict[str, Any], seed: int, step: int, coefficients: Mapping[int, float]
    ) -> dict[nn.Parameter, Direction]:
        """The sum over queries of ``coefficient * z_query`` for each trainable parameter of a group.

        ``{query: 1.0}`` is the direction of one query, for methods that do more than sum them.

        Args:
            group: one of ``param_groups``.
            seed: the run's seed, which is in the step's record.
            step: number of the step.
            coefficients: the coefficient of each query; queries that are left out do not take part.
        """
        named = self.named(group)
        return dict(zip(named, self.directions_of(named, seed, step, coefficients), strict=True))

    def directions_of(
        self, named: Mapping[nn.Parameter, str], seed: int, step: int, coefficients: Mapping[int, float]
    ) -> Iterable[Direction]:
        """The directions of some parameters in turn: whatever perturbs or moves a parameter is made here.

        Override it to search along others: scaled ones (:meth:`~zolightning.directions.dense.Direction.times`) or those
        with different `coefficients`. The same arguments must give the same directions until the step is over.

        Args:
            named: names of parameters that move.
            seed, step, coefficients: see :meth:`directions`.
        """
        return directions(dict(zip(named.values(), named, strict=True)), seed, step, coefficients, self.noise).values()

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        return self.multiples(query, sign * self.param_groups[0]["eps"])  # which all groups have

    def multiples(self, query: int, coefficient: float) -> dict[nn.Parameter, Perturbation]:
        """A multiple of the direction of `query` in the next step, for every trainable parameter."""
        found: dict[nn.Parameter, Perturbation] = {}
        for group in self.param_groups:
            found |= self.directions(group, group["seed"], group["step"], {query: coefficient})
        return found


class DenseDescent(DenseOptimizer):
    """Abstract: estimates gradients; a method defines :meth:`update_parameters`, which moves weights by them."""

    takes_shards = True
    has_unit_directions = True

    def unit_directions(self, query: int) -> dict[nn.Parameter, Perturbation]:
        return self.multiples(query, 1.0)

    @abstractmethod
    def update_parameters(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        gradients: Sequence[Direction],
        group: dict[str, Any],
        lr: float,
    ) -> None:
        """Moves the contiguous weights of a group, given their gradient estimates times :meth:`gradient_scale`."""

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        """A factor by which gradients are multiplied before :meth:`update_parameters` gets them, at no extra cost."""
        return 1.0

    def transform_grads(self, group: dict[str, Any], projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        """Replaces the projected gradients of a step before they are used: clips or normalizes them, for example."""
        return projected_grads

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            projected_grads = self.transform_grads(group, record.projected_grads)
            scale = self.gradient_scale(group, lr) / len(projected_grads)
            coefficients = {query: scale * g for query, g in enumerate(projected_grads)}
            named = self.named(group)
            found = self.directions_of(named, record.seed, record.step, coefficients)
            with self.to_move(named, found) as (weights, states, gradients):
                self.update_parameters(weights, states, gradients, group, lr)


class StandardDescent(DenseDescent):
    """Abstract: weights move as in SGD, with ``momentum`` or with Adam's ``betas``, by the settings of their group."""

    def gradient_scale(self, group: dict[str, Any], lr: float) -> float:
        if group.get("betas"):
            return 1.0
        return 1 - group["momentum"] if group.get("momentum") else -lr

    def update_parameters(
        self,
        weights: Sequence[Tensor],
        states: Sequence[State],
        gradients: Sequence[Direction],
        group: dict[str, Any],
        lr: float,
    ) -> None:
        descend(weights, states, gradients, group, lr, self.update_precision)
