"""The base class of methods that search in a subspace of each weight matrix."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zolightning.checks import require_choice, require_fraction, require_integer, require_positive
from zolightning.directions.autocast import autocast_dtype
from zolightning.directions.dense import Direction, directions
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.kernels.noise import NOISE_KINDS, NoiseKind
from zolightning.messages import counted, some
from zolightning.optim.bases import Matrix
from zolightning.optim.moments import descend, keeps_moments, smoothed
from zolightning.optim.momentum_transport import Transport
from zolightning.optim.normalization import RUNNING_MEAN, normalized, require_normalization
from zolightning.optim.precision import State
from zolightning.optim.readback import LargestElements
from zolightning.optim.record import StepRecord
from zolightning.optim.state_dicts import substitute_in_state_dicts
from zolightning.optim.subspace_weights import Matrices, SubspaceWeights
from zolightning.rank_zero import rank_zero_info


class SubspaceOptimizer(SubspaceWeights):
    """Abstract base of the subspace methods: each matrix is perturbed and updated by ``left @ core @ right.T``.

    Only the small ``core`` is drawn at each step; the factors stay until new subspaces are drawn. Parameters with less
    than two dimensions, and matrices of a single row or column, are searched along dense directions instead, with the
    learning rate `vector_lr`; at 0 they do not train. (In half precision they are always updated as with
    ``update_precision="exact"``: they are few.)

    New subspaces are drawn by :meth:`~zolightning.optim.subspace_weights.SubspaceWeights.resample`, which a plain
    training loop calls itself, every 100 steps for example; otherwise all of training stays in the first subspace.

    A method sets :attr:`sides`, on which a basis has a factor, and :attr:`unit`, whether columns are orthonormal, and
    defines :meth:`core_step`.

    Args:
        params, defaults, **common: see :class:`~zolightning.optim.base.ZerothOrderOptimizer` and, for
            `offload_low_words`, :class:`~zolightning.optim.subspace_weights.SubspaceWeights`.
        rank: columns of a factor, at most as many as it has rows; :meth:`attach` logs the matrices with fewer.
        vector_lr: learning rate along dense directions; None takes `lr`. Schedulers scale it with `lr`, and so does the
            `lr` of a group that has no `vector_lr` of its own.
        noise: distribution of the cores and of dense directions, "gaussian" or "rademacher".
        normalize: divide projected gradients by their running RMS (arXiv 2605.03869), so that the step does not depend
            on the scale of the loss. (The step of a method that orthogonalizes never does.)
        normalize_directions: scale directions so that `eps` and `lr` mean what they mean for MeZO, whatever the shape
            of a matrix, the `rank` and the factors: `eps` is the RMS of a weight's perturbation, and `lr` times the
            projected gradient that of its step. With Adam or an orthogonalized step it is `lr` itself. Given factors
            are scaled to the norm of drawn ones, and factors of a method's own formula, such as 1 / rank, are left out.
        clip: bound projected gradients at this multiple, above 1, of the running RMS of the clipped ones of earlier
            steps.
        rms_decay: decay of the running mean of squared projected gradients, for `normalize` and `clip`.

    `defaults` may hold ``momentum``, the decay of an exponential mean of gradients (``m = momentum * m + (1 - momentum)
    * g``), or ``betas``, Adam's decays; either applies to cores and dense directions alike. In each parameter group,
    :class:`~zolightning.callbacks.MomentumTransport` sets ``transport`` ("project", "reset" or "keep": what
    :meth:`resample` does to the momentum), and :class:`~zolightning.callbacks.SubspaceResampling` sets ``anchor`` (how
    many dominant directions of the momentum stay in the new basis). The counters of a group are ``refresh``, the index
    of the basis, ``given``, the last index for which factors were given, and ``folds``, how many times cores have been
    added to the weights.
    """

    takes_shards = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        rank: int,
        vector_lr: float | None,
        noise: NoiseKind = "gaussian",
        normalize: bool = False,
        normalize_directions: bool = False,
        clip: float | None = None,
        rms_decay: float = 0.99,
        **common: Any,
    ) -> None:
        require_choice("noise", noise, NOISE_KINDS)
        require_integer("rank", rank)
        require_positive("lr", defaults.get("lr"))
        settings = {"rank": rank, "normalize": normalize, "clip": clip, "rms_decay": rms_decay}
        settings |= {"vector_lr_ratio": _ratio(vector_lr, defaults["lr"]), "momentum": 0.0, "betas": None}
        counters = {"refresh": 0, "given": 0, "folds": 0}
        set_by_callbacks = {"transport": "project", "anchor": 0}
        self.noise: NoiseKind = noise
        self.normalize_directions = normalize_directions
        self._hooks: list[RemovableHandle] = []  # in the `state_dict()` of modules
        self._largest = LargestElements()  # one object, because wrappers copy an optimizer's attributes (Fabric does)
        defaults = settings | counters | set_by_callbacks | RUNNING_MEAN | defaults
        if defaults["betas"] is None:  # Lightning and torch's schedulers take any `betas` among defaults for Adam's
            self.betas = defaults.pop("betas")
        super().__init__(params, defaults, **common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer's; a group may have its own ``vector_lr``. In mid-run it gets what callbacks set for all."""
        set_for_all = {name: self.param_groups[0][name] for name in ("transport", "anchor") if self.attached}
        own = {**set_for_all, **param_group}
        vector_lr = own.pop("vector_lr", None)
        super().add_param_group(own)
        if "vector_lr" in param_group:
            group = self.param_groups[-1]
            group["vector_lr_ratio"] = _ratio(vector_lr, group["lr"])

    # What a method defines

    def direction_scale(self, matrix: Matrix) -> float:
        """The factor between a core of unit variance and the core of a direction."""
        return self.basis_kind.unit_rms_scale(matrix) if self.normalize_directions else 1.0

    def core_step(self, gradients: Tensor, states: list[State], group: dict[str, Any]) -> Tensor:
        """The step of several cores at a learning rate of 1, given their gradients.

        Args:
            gradients: (matrices, *core shape), after momentum or Adam, of matrices whose cores have one shape.
                Transposed where a factor was given on the side opposite to the method's own.
            states: the entry of each matrix in the optimizer's state, with ``core`` and what the method keeps itself.
            group: their hyperparameters.

        Returns:
            The steps, of the shape of `gradients`. With `normalize_directions` the gradients are those of unit-variance
            cores and the result is multiplied by :meth:`direction_scale`, so that a step whose size does not depend
            on the gradient's must have RMS 1.
        """
        return gradients

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        require_fraction("momentum", group["momentum"])
        require_normalization(group)
        for place, beta in enumerate(group.get("betas") or ()):
            require_fraction(f"betas[{place}]", beta)
        if group["momentum"] and group.get("betas"):
            raise ValueError(
                f"`momentum` is {group['momentum']!r}, but `betas` {group['betas']!r} include one already: leave one "
                "of the two out."
            )
        require_choice("transport", group["transport"], get_args(Transport))

    # A step

    def attach(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().attach(module, *args, **kwargs)
        if not any(group["vector_lr_ratio"] or self.split(group)[0] for group in self.param_groups):
            raise ValueError(
                "`vector_lr` is 0, and no matrix is among the parameters that train: none would move. Raise it, or "
                "train more."
            )
        for group in self.param_groups:
            thin = [f"{name} {m.rank}" for name, (_, m) in self.split(group)[0].items() if m.rank < group["rank"]]
            if thin:
                thinner = counted(len(thin), "matrix", "matrices")
                rank_zero_info(
                    f"`rank` is {group['rank']}, but lower in {thinner} with fewer rows or columns: {some(thin)}."
                )
        self._hooks += substitute_in_state_dicts(module, self.names, self.is_pending, self.folded)
        if self.fold_every_step:
            self.fold()  # cores of a checkpoint that was restored before

    def detach(self) -> None:
        super().detach()
        self.fold()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_hooks": [], "_largest": LargestElements()}

    def estimate(self, *args: Any, **kwargs: Any) -> StepRecord:
        """As of any method; folds first where a core has become too large for a perturbation in half precision."""
        cores, limits = self._half_cores()
        if any([size > limit for size, limit in zip(self._largest.of(cores), limits, strict=True)]):
            self.fold()
        return super().estimate(*args, **kwargs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As of any method; then folds, if :attr:`fold_every_step` is set."""
        result = super().step(closure)
        if self.fold_every_step:
            self.fold()
        else:
            self._largest.ask(self._half_cores()[0])
        return result

    def apply(self, record: StepRecord) -> None:
        """As of any method; first draws bases and folds as the run of the record did."""
        if record.seed != self.param_groups[0]["seed"]:  # from another run: its bases must be drawn here too
            self.fold()
            self._bases.clear()
            for group in self.param_groups:
                group["seed"] = record.seed
        while self.param_groups[0]["refresh"] < record.refresh:
            self.resample()
        if record.given and self.param_groups[0]["given"] != record.refresh:
            raise ValueError(
                f"Step {record.step} has bases that were given, which no record holds: put them in `recorded`."
            )
        if self.param_groups[0]["folds"] != record.folds:
            self.fold()
        for group in self.param_groups:
            group["folds"] = record.folds
        super().apply(record)

    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        return self.perturbations_of([query], sign)[query]

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        """As of any method; what all queries have in common is looked up once."""
        found: dict[int, dict[nn.Parameter, Perturbation]] = {query: {} for query in queries}
        for group in self.param_groups:
            matrices, vectors = self.split(group)
            for query, changes in found.items() if group["vector_lr_ratio"] else ():
                dense = directions(vectors, group["seed"], group["step"], {query: sign * group["eps"]}, self.noise)
                changes |= {parameter: dense[name] for name, parameter in vectors.items()}
            for query, changes in self.perturbations_of_matrices(group, matrices, tuple(found), sign).items():
                found[query] |= changes
        offsets = self.offsets(without=next(iter(found.values()), {}))
        for changes in found.values():
            changes |= offsets
        return found

    def perturbations_of_matrices(
        self, group: dict[str, Any], matrices: Matrices, queries: Sequence[int], sign: int
    ) -> dict[int, dict[nn.Parameter, Perturbation]]:
        """What :meth:`perturbations_of` gives for the matrices of a group."""
        shared = [
            (name, parameter, self.basis(parameter), matrix.shape, self.state.get(parameter, {}).get("core"))
            for name, (parameter, matrix) in matrices.items()
        ]
        found: dict[int, dict[nn.Parameter, Perturbation]] = {}
        for query in queries:
            cores = self._core_directions(matrices, group["seed"], group["step"], {query: sign * group["eps"]})
            found[query] = {p: LowRank(basis, shape, core, cores[name]) for name, p, basis, shape, core in shared}
        return found

    def update(self, record: StepRecord) -> None:
        for group, lr in zip(self.param_groups, record.lr, strict=True):
            matrices, vectors = self.split(group)
            keep = 1 - group["momentum"]
            projected_grads = normalized(group, record.projected_grads)
            coefficients = {q: keep * g / len(projected_grads) for q, g in enumerate(projected_grads)}
            self.update_vectors(group, vectors, record, coefficients, lr)
            as_drawn = self.normalize_directions  # otherwise gradients already have the scale of directions
            gradients = self._core_directions(matrices, record.seed, record.step, coefficients, as_drawn)
            batches: dict[tuple[Any, ...], list[tuple[State, Direction]]] = {}  # of cores that move together
            for name, (parameter, matrix) in matrices.items():
                core, is_turned = self.core(parameter, matrix), self.basis_kind.is_turned(self.basis(parameter))
                scale = self.direction_scale(matrix) if as_drawn else 1.0
                alike = scale, is_turned, core.shape, core.dtype, core.device
                batches.setdefault(alike, []).append((self.state[parameter], gradients[name]))
            for (scale, is_turned, *_), batch in batches.items():
                self._update_cores(batch, group, is_turned, lr * scale)

    def _update_cores(
        self, batch: Sequence[tuple[State, Direction]], group: dict[str, Any], is_turned: bool, lr: float
    ) -> None:
        """Moves the cores in some states, given the estimated gradient of each."""
        states = [state for state, _ in batch]
        cores = [state["core"] for state in states]
        gradients = smoothed(cores, states, [gradient for _, gradient in batch], group)
        gradients = gradients.mT.contiguous() if is_turned else gradients
        steps = self.core_step(gradients, states, group)
        if steps.shape != gradients.shape:
            raise ValueError(
                f"`core_step` of {type(self).__name__} must return steps of the shape of the gradients, "
                f"{tuple(gradients.shape)}, got {tuple(steps.shape)}."
            )
        torch._foreach_sub_(cores, (steps.mT if is_turned else steps).unbind(), alpha=lr)

    def core_gradient(self, parameter: nn.Parameter, record: StepRecord) -> Tensor:
        """The estimated gradient of a matrix with respect to its core in the present basis, of the core's shape."""
        name, matrix = self.names[parameter], self.matrix_of(parameter)
        assert matrix is not None, "it has a core"
        coefficients = {q: g / len(record.projected_grads) for q, g in enumerate(record.projected_grads)}
        found = self._core_directions({name: (parameter, matrix)}, record.seed, record.step, coefficients)
        shape = self.basis(parameter).core_shape(matrix.shape)
        like = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
        return found[name].of_elements(like).view(shape)

    def _half_cores(self) -> tuple[list[Tensor], list[float]]:
        """The cores that a network computes with in half precision, and the largest element that each may have.

        Beyond it the perturbation of an element is less than the spacing of numbers of its size, and their sum would
        lose most of the perturbation. Only the largest element is asked for: a maximum, unlike a sum, is the
        same in any order.
        """
        places = {(parameter.device, parameter.dtype) for group in self.param_groups for parameter in group["params"]}
        computed_in = {(device, dtype): autocast_dtype(device) or dtype for device, dtype in places}
        half = {place: torch.finfo(dtype).eps for place, dtype in computed_in.items() if dtype.itemsize == 2}
        cores: list[Tensor] = []
        limits: list[float] = []
        for group, parameter, matrix, core in self.pending() if half else ():
            if (spacing := half.get((parameter.device, parameter.dtype))) is not None:
                cores.append(core)
                limits.append(group["eps"] * self.direction_scale(matrix) / spacing)
        return cores, limits

    def update_vectors(
        self,
        group: dict[str, Any],
        vectors: dict[str, nn.Parameter],
        record: StepRecord,
        coefficients: dict[int, float],
        lr: float,
    ) -> None:
        """Moves the parameters without a subspace, if they train, with momentum or Adam where cores have it."""
        if not group["vector_lr_ratio"]:
            return
        lr *= group["vector_lr_ratio"]
        scale = 1.0 if keeps_moments(group) else -lr
        scaled = {query: scale * value for query, value in coefficients.items()}
        gradients = directions(vectors, record.seed, record.step, scaled, self.noise)
        with self.to_move(vectors.values(), gradients.values()) as (weights, states, moves):
            descend(weights, states, moves, group, lr, "exact")

    def _core_directions(
        self, matrices: Matrices, seed: int, step: int, coefficients: dict[int, float], as_drawn: bool = False
    ) -> dict[str, Direction]:
        """The sum over queries of coefficient times core for each matrix; `as_drawn` leaves the scale out."""
        by_scale: dict[float, dict[str, Tensor]] = {}
        for name, (parameter, matrix) in matrices.items():
            by_scale.setdefault(1.0 if as_drawn else self.direction_scale(matrix), {})[name] = parameter
        found: dict[str, Direction] = {}
        for scale, named in by_scale.items():
            scaled = {query: scale * value for query, value in coefficients.items()}
            found |= directions(named, seed, step, scaled, self.noise)
        return found


def _ratio(vector_lr: float | None, lr: float) -> float:
    """`vector_lr` as a multiple of `lr`, with which schedulers scale it."""
    if vector_lr is None:
        return 1.0
    if not vector_lr >= 0:
        raise ValueError(f"`vector_lr` must not be negative, got {vector_lr!r}.")
    return vector_lr / lr
