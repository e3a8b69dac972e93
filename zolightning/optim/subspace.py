"""Methods that search in a subspace of each weight matrix: probing, and what becomes of the projected gradients."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.autocast import autocast_dtype
from zolightning.directions.dense import Direction, accumulate_each, arithmetic, directions
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.shards import first_element
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind
from zolightning.optim.checks import require_choice, require_fraction, require_integer, require_positive
from zolightning.optim.moments import adam_, momentum_
from zolightning.optim.momentum_transport import TRANSPORTS
from zolightning.optim.normalization import STATE, normalized, require_normalization
from zolightning.optim.precision import State, add_directions, add_tensors, all_contiguous
from zolightning.optim.readback import LargestElements
from zolightning.optim.record import StepRecord
from zolightning.optim.subspace_bases import Matrix
from zolightning.optim.subspace_weights import SubspaceWeights

_DENOMINATOR_EPS = 1e-8


class SubspaceOptimizer(SubspaceWeights):
    """Abstract: directions are lifts of random cores, and so are updates.

    Parameters of less than two dimensions, and matrices too thin for a subspace, move along dense directions with
    ``vector_lr``; where that is 0 they stay as they are.

    A plain training loop calls :meth:`~zolightning.optim.subspace_weights.SubspaceWeights.resample` where it wants
    new subspaces; without such calls all of training stays in the first one::

        optimizer = SubZero(model.named_parameters(), rank=16)
        optimizer.attach(model)
        for step, batch in enumerate(batches):
            if step and step % 100 == 0:
                optimizer.resample()
            optimizer.estimate(lambda: loss_of(model, batch))
            optimizer.step()
        optimizer.detach()

    Args:
        rank: columns of a factor; where a matrix allows fewer, :meth:`attach` logs which.
        vector_lr: learning rate of what moves along dense directions; schedulers scale it with `lr`.
        noise: distribution of the cores and of dense directions.
        normalize: divide projected gradients by their running RMS (arXiv 2605.03869): steps in proportion to them then
            do not depend on the loss's scale; an orthogonalised step never does.
        normalize_directions: scale directions so that the RMS of a weight's perturbation is `eps`, and that of its step
            `lr` times the projected gradient (where a method orthogonalizes, or with Adam, `lr` itself; with several
            queries or momentum, less by their mean), in matrices and vectors of every shape, whatever `rank` and the
            bases are: as MeZO's are. Factors that are given are made as long as drawn ones, one number for all of
            their columns. What a method's own formula divides or multiplies by is left out.
        clip: bound projected gradients at this multiple of their running RMS over earlier steps.
        rms_decay: decay of the running mean of squared projected gradients, used by `normalize` and `clip`.

    The other arguments are those of :class:`~zolightning.optim.base.ZerothOrderOptimizer`, and `offload_low_words` of
    :class:`~zolightning.optim.subspace_weights.SubspaceWeights`. In `defaults` may be ``momentum``, the decay of an
    exponential mean of gradients (``m = momentum * m + (1 - momentum) * g``), or ``betas``, Adam's decays; cores and
    what moves along dense directions alike have one of these. A group also has

    * ``transport``: "project", "reset" or "keep", what :meth:`resample` does to the momentum;
    * ``anchor``: how many dominant directions of the momentum stay in the new basis;
    * ``refresh``, the index of the basis, ``given``, the last one for which factors were given, and ``folds``, how
      often cores were added to the weights.

    Under a Trainer :class:`~zolightning.callbacks.SubspaceResampling` and
    :class:`~zolightning.callbacks.MomentumTransport` set the first two.
    """

    takes_shards = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        rank: int,
        vector_lr: float,
        noise: NoiseKind = "gaussian",
        normalize: bool = False,
        normalize_directions: bool = False,
        clip: float | None = None,
        rms_decay: float = 0.99,
        **common: Any,
    ) -> None:
        require_choice("noise", noise, NOISE_KINDS)
        require_integer("rank", rank)
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
            "folds": 0,
            "given": 0,
            "normalize": normalize,
            "clip": clip,
            "rms_decay": rms_decay,
        }
        self.noise: NoiseKind = noise
        self.normalize_directions = normalize_directions
        self._largest = LargestElements()  # one object, since wrappers copy an optimizer's attributes (Fabric does)
        super().__init__(params, shared | STATE | defaults, **common)

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
        return self.unit_rms_scale(matrix) if self.normalize_directions else 1.0

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        """The step per `lr` of the cores of several matrices.

        Args:
            gradients: (matrices, *core shape): smoothed core gradients of all matrices whose cores have one shape;
                transposed where a basis was given on the other side than the method's own.
            states: of each matrix its entry in the optimizer's state: ``core``, and what the method keeps there itself.
            group: their hyperparameters.

        Returns:
            A tensor of the shape of `gradients`. With `normalize_directions` these are of unit-variance cores, and the
            step is multiplied by :meth:`direction_scale`: one that does not go by their size has RMS 1 then.
        """
        return gradients

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_fraction("momentum", group["momentum"])
        require_normalization(group)
        for place, beta in enumerate(group["betas"] or ()):
            require_fraction(f"betas[{place}]", beta)
        require_choice("transport", group["transport"], TRANSPORTS)

    # A step

    def estimate(self, *args: Any, **kwargs: Any) -> StepRecord:
        """As any method's; first folds where a core has become too large to be perturbed finely."""
        cores, limits = self._perturbed_cores()
        if any(size > limit for size, limit in zip(self._largest.of(cores), limits, strict=True)):
            self.fold()
        return super().estimate(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As any method's; then folds, if that is to be done at every step."""
        result = super().step(closure)
        if self.fold_every_step:
            self.fold()
        return result

    def apply(self, record: StepRecord) -> None:
        super().apply(record)
        if not self.fold_every_step:
            self._largest.ask(self._perturbed_cores()[0])

    def fold(self) -> None:
        super().fold()
        self._largest.forget()

    def offsets(self) -> dict[nn.Parameter, Perturbation]:
        """The lifts of pending cores, those of frozen parameters too."""
        return {
            parameter: LowRank(self.basis(parameter), matrix[:2], self.state[parameter]["core"], None)
            for group in self.param_groups
            for parameter, matrix in self.split(group, frozen=True)[0].values()
            if "core" in self.state.get(parameter, {})
        }

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        return self.perturbations_of([query], sign)[query]

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        """As :meth:`perturbations`, which is this of one query: what queries have in common is looked up once."""
        offsets = self.offsets()
        found = {query: dict(offsets) for query in queries}
        for group in self.param_groups:
            matrices, vectors = self.split(group)
            shared = {
                name: (parameter, self.basis(parameter), matrix[:2], self.state.get(parameter, {}).get("core"))
                for name, (parameter, matrix) in matrices.items()
            }
            for query, changes in found.items():
                coefficients = {query: sign * group["eps"]}
                if group["vector_lr_ratio"]:
                    dense = directions(vectors, group["seed"], group["step"], coefficients, self.noise)
                    changes |= {parameter: dense[name] for name, parameter in vectors.items()}
                cores = self._core_directions(matrices, group["seed"], group["step"], coefficients)
                for name, (parameter, basis, shape, pending) in shared.items():
                    changes[parameter] = LowRank(basis, shape, pending, cores[name])
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self.split(group)
            keep = 1 - group["momentum"] if group["momentum"] and not group["betas"] else 1.0
            projected_grads = normalized(group, record.projected_grads)
            coefficients = {q: keep * g / len(projected_grads) for q, g in enumerate(projected_grads)}
            if group["vector_lr_ratio"]:
                self._update_vectors(group, vectors, record, coefficients, lr * group["vector_lr_ratio"])
            cores = self._core_directions(matrices, record.seed, record.step, coefficients, self.normalize_directions)
            batches: dict[tuple[float, Hashable], list[str]] = {}
            for name, (parameter, matrix) in matrices.items():
                core = self.core(parameter, matrix)
                alike = self._is_turned(parameter), core.shape, core.dtype, core.device
                scale = self.direction_scale(matrix) if self.normalize_directions else 1.0  # else the gradient has it
                batches.setdefault((scale, alike), []).append(name)
            for (scale, _), names in batches.items():
                parameters = [matrices[name][0] for name in names]
                states = [self.state[parameter] for parameter in parameters]
                moved = [state["core"] for state in states]
                smoothed = self._smooth(states, moved, [cores[name] for name in names], group)
                gradients, is_turned = torch.stack(smoothed), self._is_turned(parameters[0])
                steps = self.core_step(gradients.mT.contiguous() if is_turned else gradients, states, group)
                torch._foreach_sub_(moved, (steps.mT if is_turned else steps).unbind(), alpha=lr * scale)

    def core_gradient(self, parameter: nn.Parameter, record: StepRecord) -> Tensor:
        """What a record says of the gradient of a matrix, in the coordinates of the basis now: of the core's shape."""
        matrices = self.split(self._group_of(parameter), frozen=True)[0]
        named = {name: pair for name, pair in matrices.items() if pair[0] is parameter}
        coefficients = {q: g / len(record.projected_grads) for q, g in enumerate(record.projected_grads)}
        (direction,) = self._core_directions(named, record.seed, record.step, coefficients).values()
        ((_, matrix),) = named.values()
        shape = self.basis(parameter).core_shape(matrix[:2])
        gradient = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
        direction.accumulate(gradient)
        return gradient

    def _perturbed_cores(self) -> tuple[list[Tensor], list[float]]:
        """The cores that a network computes with in half precision, and how large an element of each may be.

        That is where the spacing of numbers as large as the core reaches the size of ``eps * z``: ``core + eps * z``
        would then lose much of z. The largest element decides, because its size does not depend on the order in which a
        device or rank goes through them.
        """
        cores, limits = [], []
        for group in self.param_groups:
            for parameter, matrix in self.split(group, frozen=True)[0].values():
                core = self.state.get(parameter, {}).get("core")
                dtype = autocast_dtype(parameter.device) or parameter.dtype
                if core is not None and dtype.itemsize == 2:
                    cores.append(core)
                    limits.append(group["eps"] * self.direction_scale(matrix) / torch.finfo(dtype).eps)
        return cores, limits

    def _smooth(
        self, states: list[State], moved: Sequence[Tensor], gradients: list[Direction], group: dict[str, Any]
    ) -> list[Tensor]:
        """The gradients of cores of one dtype, `moved`, after momentum or Adam: of their shapes."""
        if group["momentum"] and not group["betas"]:
            found = momentum_(states, moved, gradients, group["momentum"])
        else:
            sizes = [one.numel() for one in moved]
            zeros = torch.zeros(sum(sizes), dtype=moved[0].dtype, device=moved[0].device)
            found = list(zeros.split(sizes))
            if group["betas"]:
                self._adam(states, found, gradients, group, 1.0)
            else:
                accumulate_each(gradients, found)
        return [gradient.view(one.shape) for gradient, one in zip(found, moved, strict=True)]

    def _adam(
        self,
        states: list[State],
        moved: Sequence[Tensor],
        gradients: list[Direction],
        group: dict[str, Any],
        scale: float,
    ) -> None:
        """Adds `scale` times a step of Adam."""
        adam_(states, moved, gradients, group["betas"], _DENOMINATOR_EPS, scale, "exact", [1.0] * len(moved))

    def _update_vectors(
        self,
        group: dict[str, Any],
        vectors: dict[str, nn.Parameter],
        record: StepRecord,
        coefficients: dict[int, float],
        lr: float,
    ) -> None:
        """Moves what has no subspace by the rule of the cores: momentum or Adam of its own, or a plain step."""
        is_smoothed = group["momentum"] or group["betas"]
        scaled = {query: (1.0 if is_smoothed else -lr) * value for query, value in coefficients.items()}
        gradients = directions(vectors, record.seed, record.step, scaled, self.noise)
        states = [self.state[parameter] for parameter in vectors.values()]
        moves = [gradients[name].of_rows(first_element(parameter)) for name, parameter in vectors.items()]
        with all_contiguous(vectors.values(), self.slices) as weights:
            if not is_smoothed:
                add_directions(weights, states, moves, "exact", [1.0] * len(weights))
                return
            if group["betas"]:
                self._adam(states, weights, moves, group, -lr)
                return
            steps = momentum_(states, weights, moves, group["momentum"])
            add_tensors(weights, states, steps, "exact", [1.0] * len(weights), -lr)

    def _core_directions(
        self,
        matrices: dict[str, tuple[nn.Parameter, Matrix]],
        seed: int,
        step: int,
        coefficients: dict[int, float],
        as_drawn: bool = False,
    ) -> dict[str, Direction]:
        """The sums over queries of coefficients times cores, by name; `as_drawn` without :meth:`direction_scale`."""
        by_scale: dict[float, dict[str, Tensor]] = {}
        for name, (parameter, matrix) in matrices.items():
            by_scale.setdefault(1.0 if as_drawn else self.direction_scale(matrix), {})[name] = parameter
        found: dict[str, Direction] = {}
        for scale, named in by_scale.items():
            scaled = {query: scale * value for query, value in coefficients.items()}
            found |= directions(named, seed, step, scaled, self.noise)
        return found
