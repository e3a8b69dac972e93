"""Weights of which a part is pending in the cores of subspaces: bases, resampling, folding, saving."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from zolightning.directions.basis import Basis, Sides, gaussian, orthonormal
from zolightning.directions.dense import arithmetic
from zolightning.kernels.compiled import chunks
from zolightning.messages import some
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.deferred import defer
from zolightning.optim.moments import CHUNK
from zolightning.optim.precision import State, add_tensor, as_contiguous
from zolightning.optim.record import StepRecord
from zolightning.rank_zero import rank_zero_info

Transport = Literal["project", "reset", "keep"]
TRANSPORTS: tuple[str, ...] = ("project", "reset", "keep")


class Matrix(NamedTuple):
    """How a parameter is searched: viewed as a (rows, columns) matrix, by factors of `rank` columns.

    All dimensions after the first are columns, unless a method says otherwise; of a parameter that trains in part
    (:class:`~zolightning.directions.slices.Slice`) only that part counts.
    """

    rows: int
    columns: int
    rank: int


class SubspaceWeights(ZerothOrderOptimizer):
    """Abstract: with ``W`` the stored weight, (m, n), a step's losses are those of ``W + lift(core)`` and around it.

    Updates gather in the core, in fp32, and are *folded*, their lift added to the stored weight:

    * at the end of each :meth:`step`, where :attr:`fold_every_step` is set, as it is unless somebody says otherwise.
      Stored weights are then the trained ones between any two steps, for whoever reads or writes them.
    * else by :meth:`fold`, :meth:`resample` and :meth:`detach`, which saves a pass over the weights at each step.
      Nobody may then read or write weights in between, but by ``state_dict()``, which has them folded at any time;
      the optimizer's own ``state_dict()`` has the stored ones beside, so that a resumed run goes on bit for bit.

    Both ways lead to the same weights up to the rounding of sums. Records count the folds before a step, so that a
    replay folds at the same steps. Under a Trainer :class:`~zolightning.callbacks.ZerothOrder` chooses the way.

    Bases are functions of (seed, refresh index, parameter name): a checkpoint holds none, unless `anchor` is used.
    They have the dtype of the weight, so a bf16 run searches in a subspace that is rounded to bf16, which is not quite
    that of an fp32 run.
    """

    sides: ClassVar[Sides]  # which factors a basis has
    unit: ClassVar[bool] = True  # columns are orthonormal, or Gaussian of unit variance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.fold_every_step = True
        self._bases: dict[nn.Parameter, Basis] = {}
        self._hooks: list[Any] = []
        super().__init__(*args, **kwargs)

    @property
    def momentum_kept(self) -> float | None:
        """Share of the momentum's squared norm that the last resampling kept; None where there was none."""
        return self.param_groups[0].get("momentum_kept")

    def apply(self, record: StepRecord) -> None:
        if record.seed != self.param_groups[0]["seed"]:  # of another run: its bases are to be drawn here too
            self.fold()
            self._bases.clear()
            for group in self.param_groups:
                group["seed"] = record.seed
        while self.param_groups[0]["refresh"] < record.refresh:
            self.resample()
        if self.param_groups[0]["folds"] != record.folds:
            self.fold()
        for group in self.param_groups:
            group["folds"] = record.folds
        super().apply(record)

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        """How a parameter is searched; None for dense directions."""
        shape = self.trainable_shape(parameter)
        if len(shape) < 2:
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        longest = {"left": rows, "right": columns, "both": min(rows, columns)}[self.sides]
        return Matrix(rows, columns, min(rank, longest)) if min(rows, columns) > 1 else None

    def split(
        self, group: dict[str, Any], frozen: bool = False
    ) -> tuple[dict[str, tuple[nn.Parameter, Matrix]], dict[str, nn.Parameter]]:
        """Sorts the trainable parameters of a group, or with `frozen` all of them.

        Returns:
            By name: parameters that are searched in a subspace, each with the matrix that it is seen as; and the
            others, of any shape, which move along dense directions.
        """
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

    # Bases

    def basis(self, parameter: nn.Parameter) -> Basis:
        """The basis of a matrix now: factors (rows, rank) and (columns, rank) in the dtype of its weight.

        Raises:
            ValueError: if the parameter is not searched in a subspace.
        """
        if parameter not in self._bases:
            state = self.state.get(parameter, {})
            is_anchored = "left" in state or "right" in state
            self._bases[parameter] = (
                Basis(state.get("left"), state.get("right")) if is_anchored else self._draw(parameter)
            )
        return self._bases[parameter]

    @torch.no_grad()
    def resample(self) -> None:
        """Folds the cores into the weights, draws the next bases and takes the momentum along.

        Without a Trainer it is for the training loop to call, before the step of every 50th batch, say; otherwise
        all of training stays in the first subspace. Under a Trainer
        :class:`~zolightning.callbacks.SubspaceResampling` does.

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
            state, new = self.state[parameter], self._draw(parameter)
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
        self.param_groups[0]["momentum_kept"] = after / before if before else None

    def _draw(self, parameter: nn.Parameter) -> Basis:
        group, name = self._group_of(parameter), self._names[parameter]
        matrix = self.matrix(parameter, group["rank"])
        if matrix is None:
            raise ValueError(f"`{name}` moves along dense directions and has no basis.")

        def factor(side: str, size: int) -> Tensor:
            drawn = gaussian(size, matrix.rank, group["seed"], group["refresh"], f"{name}/{side}", parameter.device)
            drawn = drawn.to(arithmetic(parameter.dtype))
            return (orthonormal(drawn) if self.unit else drawn).to(parameter.dtype)

        left = None if self.sides == "right" else factor("left", matrix.rows)
        right = None if self.sides == "left" else factor("right", matrix.columns)
        return Basis(left, right)

    # Pending updates

    def core(self, parameter: nn.Parameter, matrix: Matrix) -> Tensor:
        """What is pending of a matrix: of the basis' core shape, fp32 or wider; made of zeros where nothing is."""
        state = self.state[parameter]
        if "core" not in state:
            shape = self.basis(parameter).core_shape(matrix[:2])
            state["core"] = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
        return state["core"]

    @torch.inference_mode(False)  # a validation runs in it, and tensors of the state that are made there stay in it
    @torch.no_grad()
    def fold(self) -> None:
        """Adds the lifts of all cores to the stored weights, and counts it where there are any."""
        found = False
        for group in self.param_groups:
            for parameter, _ in self.split(group, frozen=True)[0].values():
                state = self.state.get(parameter, {})
                if "core" in state:
                    with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                        self._add_lift(weight, parameter, state)
                    del state["core"]
                    found = True
        if found:
            torch.clear_autocast_cache()  # casts of the weights as they were
            for group in self.param_groups:
                group["folds"] += 1

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        super().attach(module, evaluations_per_forward)
        for group in self.param_groups:
            thin = [f"{name} {m.rank}" for name, (_, m) in self.split(group)[0].items() if m.rank < group["rank"]]
            if thin:
                rank_zero_info(f"`rank` is {group['rank']}, and less in {len(thin)} thin matrices: {some(thin)}.")
        for submodule in module.modules():
            # TorchScript takes no hooks: what its modules own is written by the one around them.
            if not isinstance(submodule, torch.jit.ScriptModule) and any(p in self._names for _, p in _own(submodule)):
                # A partial object, for torch marks the hook with an attribute.
                self._hooks.append(submodule.register_state_dict_post_hook(partial(self._write_folded)))
        if self.fold_every_step:
            self.fold()  # what a checkpoint, restored before, has pending

    def detach(self) -> None:
        super().detach()
        self.fold()
        while self._hooks:
            self._hooks.pop().remove()

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; where updates are pending also the stored weights, ``base``, that they add to."""
        saved = super().state_dict()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [index for group in saved["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters, strict=True):
            if "core" in self.state.get(parameter, {}):
                saved["state"][index] = saved["state"][index] | {"base": parameter.detach()}
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores all of a run, the stored weights too where the checkpoint's module has them folded."""
        super().load_state_dict(state_dict)
        self._bases.clear()
        for parameter, state in self.state.items():
            if "base" in state:
                parameter.copy_(state.pop("base"))
        if self.fold_every_step and self.attached:  # else the bases' names may not be known yet
            self.fold()

    def state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state now, with the bases."""
        drawn = (basis for p, basis in self._bases.items() if not self.state.get(p, {}).keys() & {"left", "right"})
        factors = (factor for basis in drawn for factor in (basis.left, basis.right) if factor is not None)
        return super().state_bytes() + sum(factor.numel() * factor.element_size() for factor in factors)

    def _write_folded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        """A ``state_dict`` hook: whoever saves weights in the middle of an interval gets all of the training."""
        for name, parameter in _own(module):
            if "core" in self.state.get(parameter, {}) and prefix + name in state_dict:
                state_dict[prefix + name] = defer(partial(self._folded, parameter), like=parameter)

    @torch.no_grad()
    def _folded(self, parameter: nn.Parameter) -> Tensor:
        folded = parameter.detach().clone()
        with as_contiguous(folded, self.slices.get(parameter)) as weight:
            rest = {k: v.clone() for k, v in self.state[parameter].items() if k in ("low_word", "master")}
            self._add_lift(weight, parameter, rest)
        return folded

    def _add_lift(self, weight: Tensor, parameter: nn.Parameter, state: State) -> None:
        one, other = self.basis(parameter).factors(self.state[parameter]["core"])
        rows = max(1, CHUNK // other.shape[0])
        for part in chunks(one.shape[0], rows):
            delta = (one[part] @ other.T).flatten()
            add_tensor(weight, state, delta, self.update_precision, start=part.start * other.shape[0])

    def _group_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        return next(group for group in self.param_groups if any(p is parameter for p in group["params"]))


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that no other module with hooks owns: a module's own, and those of TorchScript within."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, parameter
    for name, child in module._modules.items():
        if isinstance(child, torch.jit.ScriptModule):
            for rest, parameter in child.named_parameters(remove_duplicate=False):
                yield f"{name}.{rest}", parameter


def momentum_of(state: State) -> Tensor | None:
    """The mean of core gradients in the state of a matrix, flat, if there is one."""
    return state.get("momentum_buffer", state.get("exp_avg"))
