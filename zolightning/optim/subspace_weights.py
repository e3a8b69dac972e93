"""Weights of which a part is pending in the cores of subspaces: bases, resampling, folding, saving."""

import math
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.basis import Basis, Sides, gaussian, orthonormal
from zolightning.directions.dense import arithmetic
from zolightning.directions.kernels import chunks
from zolightning.messages import some
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.moments import CHUNK
from zolightning.optim.precision import State, add_tensor, packed
from zolightning.optim.record import StepRecord
from zolightning.rank_zero import rank_zero_info

Transport = Literal["project", "reset", "keep"]
TRANSPORTS: tuple[str, ...] = ("project", "reset", "keep")


class Matrix(NamedTuple):
    """How a parameter is searched: as a matrix of this shape, in a subspace of this rank."""

    rows: int
    columns: int
    rank: int


class SubspaceWeights(ZerothOrderOptimizer):
    """Abstract: with ``W`` the stored weight, the network computes with ``W + lift(core)``.

    Updates gather in the core, in fp32, until :meth:`resample` adds its lift to the weight (*folds* it), draws new
    bases and moves the momentum. Whoever reads the weights by ``state_dict()`` gets folded ones, at any time; the
    optimizer's own ``state_dict()`` has the stored ones beside, so that a resumed run goes on bit for bit.

    Bases are functions of (seed, refresh index, parameter name): a checkpoint holds none, unless `anchor` is used.
    """

    sides: ClassVar[Sides]  # which factors a basis has
    unit: ClassVar[bool] = True  # columns are orthonormal, or Gaussian of unit variance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._bases: dict[nn.Parameter, Basis] = {}
        self._hooks: list[Any] = []
        self.momentum_kept: float | None = None  # share of the momentum's energy that the last resampling kept
        super().__init__(*args, **kwargs)

    def apply(self, record: StepRecord) -> None:
        if record.seed != self.param_groups[0]["seed"]:  # of another run: its bases are to be drawn here too
            self.fold()
            self._bases.clear()
            for group in self.param_groups:
                group["seed"] = record.seed
        while self.param_groups[0]["refresh"] < record.refresh:
            self.resample()
        super().apply(record)

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        """How a parameter is searched; None for dense directions."""
        shape = self.trainable_shape(parameter)
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        longest = {"left": rows, "right": columns, "both": min(rows, columns)}[self.sides]
        return Matrix(rows, columns, min(rank, longest)) if min(rows, columns) > 1 else None

    # Bases

    def basis(self, parameter: nn.Parameter) -> Basis:
        """The basis of a matrix now, in the dtype of its weight."""
        if parameter not in self._bases:
            state = self.state.get(parameter, {})
            is_anchored = "left" in state or "right" in state
            self._bases[parameter] = (
                Basis(state.get("left"), state.get("right"))
                if is_anchored
                else self._draw(parameter, self._group_of(parameter))
            )
        return self._bases[parameter]

    @torch.no_grad()
    def resample(self) -> None:
        """Folds the cores into the weights, draws the next bases and takes the momentum along.

        ``momentum_kept`` is then the share of its squared norm that the momentum keeps as a matrix; None where there
        is none.
        """
        self.fold()
        moving = [  # frozen ones too: they may thaw
            (group, parameter, self.basis(parameter), momentum.view(self.basis(parameter).core_shape(matrix[:2])))
            for group in self.param_groups
            for parameter, matrix in self.split(group, frozen=True)[0].values()
            if (momentum := momentum_of(self.state.get(parameter, {}))) is not None
        ]
        self._bases.clear()
        for state in self.state.values():
            state.pop("left", None), state.pop("right", None)
        for group in self.param_groups:
            group["refresh"] += 1
        before = after = 0.0
        for group, parameter, old, core in moving:
            state, new = self.state[parameter], self._draw(parameter, group)
            if group["anchor"]:
                new = new.anchored(old, core, min(group["anchor"], *core.shape), self.unit)
                state |= {side: f for side in ("left", "right") if (f := getattr(new, side)) is not None}
            self._bases[parameter] = new
            before += old.squared_norm(core)
            if group["transport"] == "reset":
                for entry in ("momentum_buffer", "exp_avg", "exp_avg_sq", "step"):
                    state.pop(entry, None)
                continue
            if group["transport"] == "project":
                core.copy_(old.transport(core.clone(), new))
            after += new.squared_norm(core)
        self.momentum_kept = after / before if before else None

    def _draw(self, parameter: nn.Parameter, group: dict[str, Any]) -> Basis:
        name, refresh, matrix = self._names[parameter], group["refresh"], self.matrix(parameter, group["rank"])

        def factor(side: str, size: int) -> Tensor:
            drawn = gaussian(size, matrix.rank, group["seed"], refresh, f"{name}/{side}", parameter.device)
            drawn = drawn.to(arithmetic(parameter.dtype))
            return (orthonormal(drawn) if self.unit else drawn).to(parameter.dtype)

        left = None if self.sides == "right" else factor("left", matrix.rows)
        right = None if self.sides == "left" else factor("right", matrix.columns)
        return Basis(left, right)

    # Pending updates

    @torch.no_grad()
    def fold(self) -> None:
        """Adds the lifts of all cores to the stored weights: the network computes the same as before."""
        for group in self.param_groups:
            for parameter, _ in self.split(group, frozen=True)[0].values():
                state = self.state.get(parameter, {})
                if "core" in state:
                    with packed(parameter, self.slices.get(parameter)) as weight:
                        self._add_lift(weight, parameter, state)
                    del state["core"]

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        super().attach(module, evaluations_per_forward)
        clamped = []
        for group in self.param_groups:
            for name, (_, matrix) in self.split(group)[0].items():
                if matrix.rank < group["rank"]:
                    clamped.append(f"{name} {matrix.rank}")
        if clamped:
            rank_zero_info(f"`rank` is {group['rank']}, and less in {len(clamped)} thin matrices: {some(clamped)}.")
        for submodule in module.modules():
            if any(parameter in self._names for parameter in submodule._parameters.values()):
                # A partial object, for torch marks the hook with an attribute.
                self._hooks.append(submodule.register_state_dict_post_hook(partial(self._write_folded)))

    def detach(self) -> None:
        super().detach()
        self.fold()
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; where updates are pending also the stored weights, ``base``, that they add to."""
        saved = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if "core" in self.state.get(parameter, {}):
                saved["state"][index] = saved["state"][index] | {"base": _stored(parameter)}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores all of a run, the stored weights too where the checkpoint's module has them folded."""
        super().load_state_dict(state_dict)
        self._bases.clear()
        for parameter, state in self.state.items():
            if "base" in state:
                parameter.copy_(state.pop("base"))

    def state_bytes(self) -> int:
        drawn = (basis for p, basis in self._bases.items() if not self.state.get(p, {}).keys() & {"left", "right"})
        factors = (factor for basis in drawn for factor in (basis.left, basis.right) if factor is not None)
        return super().state_bytes() + sum(factor.numel() * factor.element_size() for factor in factors)

    def _write_folded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """A ``state_dict`` hook: whoever saves weights in the middle of an interval gets all of the training."""
        for name, parameter in module._parameters.items():
            if parameter in self.state and "core" in self.state[parameter] and prefix + name in state_dict:
                folded = _stored(parameter).clone()
                with packed(folded, self.slices.get(parameter)) as weight:
                    rest = {k: v.clone() for k, v in self.state[parameter].items() if k in ("low_word", "master")}
                    self._add_lift(weight, parameter, rest)
                state_dict[prefix + name] = folded

    def _add_lift(self, weight: Tensor, parameter: nn.Parameter, state: State) -> None:
        one, other = self.basis(parameter).factors(self.state[parameter]["core"])
        rows = max(1, CHUNK // other.shape[0])
        for part in chunks(one.shape[0], rows):
            delta = (one[part] @ other.T).flatten()
            add_tensor(weight, state, delta, self.update_precision, start=part.start * other.shape[0])

    def split(
        self, group: dict[str, Any], frozen: bool = False
    ) -> tuple[dict[str, tuple[nn.Parameter, Matrix]], dict[str, nn.Parameter]]:
        """The group's trainable parameters by name, or with `frozen` all: those with a subspace, and the others."""
        matrices: dict[str, tuple[nn.Parameter, Matrix]] = {}
        vectors: dict[str, nn.Parameter] = {}
        for parameter in group["params"]:
            if parameter.requires_grad or frozen:
                name, matrix = self._names[parameter], self.matrix(parameter, group["rank"])
                if matrix is None:
                    vectors[name] = parameter
                else:
                    matrices[name] = parameter, matrix
        return matrices, vectors

    def core(self, parameter: nn.Parameter, matrix: Matrix) -> Tensor:
        state = self.state[parameter]
        if "core" not in state:
            shape = self.basis(parameter).core_shape(matrix[:2])
            state["core"] = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
        return state["core"]

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))


def _stored(parameter: nn.Parameter) -> Tensor:
    """A parameter as it is stored, also where a Perturbed context is active, as it is during validation."""
    with torch._C.DisableTorchFunction():
        return parameter.detach()


def momentum_of(state: State) -> Tensor | None:
    """The mean of core gradients in the state of a matrix, if there is one."""
    return state.get("momentum_buffer", state.get("exp_avg"))
