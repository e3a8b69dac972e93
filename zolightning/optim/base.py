"""What all zeroth-order methods share: probing, the record of a step, and adding an update to the weights."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zolightning.estimators import Estimator, TwoSided
from zolightning.noise import MAX_ELEMENTS
from zolightning.perturbation import Perturbation, Perturbed, Scratch, audit
from zolightning.precision import UPDATE_PRECISIONS, UpdatePrecision

Evaluate = Callable[[], Tensor]
Reduce = Callable[[Tensor], Tensor]


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; the weights are those of the last completed step."""


@dataclass(frozen=True)
class StepRecord:
    """All that a step depends on beside the weights: applying a run's records to its first weights replays it.

    Attributes:
        step: number of the step, from 0; with `seed` it names the directions.
        seed: the run's seed.
        lr: learning rate of each parameter group.
        projected_grads: one a query; empty for a step that was skipped.
        loss: mean of the losses that were evaluated.
        forward_passes: evaluations of the loss.
    """

    step: int
    seed: int
    lr: tuple[float, ...]
    projected_grads: tuple[float, ...]
    loss: float
    forward_passes: int


class ZerothOrderOptimizer(torch.optim.Optimizer, ABC):
    """Abstract base of the methods: an optimizer that reads losses instead of gradients.

    A step is two calls: :meth:`estimate` evaluates the loss at perturbed weights and leaves a
    :class:`StepRecord`, :meth:`step` applies it. The weights change in :meth:`step` only.

    ``param_groups`` carry the hyperparameters and the counters (``step``, ``seed``), ``state`` the tensors of each
    parameter, so Lightning saves, restores, schedules and monitors a method like any optimizer.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: hyperparameters of a group; ``lr`` (weight units per unit of estimated gradient) and ``eps``
            (weight units per unit-variance direction) among them.
        num_queries: directions a step.
        estimator: which losses to ask for.
        seed: of the run's directions; None takes the seed of ``lightning.seed_everything``, or 0.
        update_precision: how updates are added to half-precision weights, see :mod:`zolightning.precision`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        num_queries: int = 1,
        estimator: Estimator | None = None,
        seed: int | None = None,
        update_precision: UpdatePrecision = "exact",
    ) -> None:
        self.estimator = TwoSided() if estimator is None else estimator
        if not isinstance(self.estimator, Estimator):
            raise ValueError(f"`estimator` must be an Estimator, TwoSided() for example, got {estimator!r}.")
        if not isinstance(num_queries, Integral) or num_queries < self.estimator.min_queries:
            name, least = type(self.estimator).__name__, self.estimator.min_queries
            raise ValueError(f"`num_queries` must be an integer, at least {least} with {name}, got {num_queries!r}.")
        if update_precision not in UPDATE_PRECISIONS:
            raise ValueError(f"`update_precision` must be one of {UPDATE_PRECISIONS}, got {update_precision!r}.")
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"`seed` must be an integer of at most 64 bits, got {seed!r}.")
        self._names: dict[nn.Parameter, str] = {}
        super().__init__(params, defaults | {"step": 0, "seed": int(seed), "forward_passes": 0})
        self.num_queries = num_queries
        self.update_precision: UpdatePrecision = update_precision
        self.record: StepRecord | None = None
        self._pending = False
        self.attached = False
        self._in_place: dict[nn.Parameter, bool] = {}  # the audit's verdict on each parameter it has seen
        self._scratch = Scratch()

    # What a method defines

    @abstractmethod
    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        """``sign * eps`` times the direction of `query`, for every trainable parameter."""

    @abstractmethod
    def update(self, record: StepRecord) -> None:
        """Moves the trainable parameters by a step with these projected gradients."""

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ValueError that names a hyperparameter of `group`, its value and what is accepted."""
        require_positive("lr", group["lr"])
        require_positive("eps", group["eps"])
        if group["eps"] != self.param_groups[0]["eps"]:
            raise ValueError("`eps` must be the same in all parameter groups: they share the losses of a step.")
        if not group.get("weight_decay", 0.0) >= 0:
            raise ValueError(f"`weight_decay` must not be negative, got {group['weight_decay']!r}.")

    # What a step calls

    @torch.no_grad()
    def estimate(self, evaluate: Evaluate, reduce: Reduce | None = None, skip_nonfinite: bool = False) -> StepRecord:
        """Evaluates the loss at perturbed weights and keeps the record for :meth:`step`.

        Args:
            evaluate: the loss of one batch, computed anew at each call, always on the same batch and padding: a
                scalar tensor (float32 or wider, so that differences survive), or a pair of it and the number of
                terms it averages, for a mean over ranks that does not depend on how the batch was split.
            reduce: sums a tensor over ranks; None on one rank.
            skip_nonfinite: record a step without projected gradients instead of raising.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
        """
        self._find_unseen(evaluate)
        probes = self.estimator.probes(self.num_queries)
        sums = []
        for probe in probes:
            with self.perturbed(*probe):
                loss, terms = loss_and_terms(evaluate())
            sums.append(torch.stack([loss * terms, terms]))
        totals = torch.stack(sums)
        totals = totals if reduce is None else reduce(totals)
        losses = (totals[:, 0] / totals[:, 1]).cpu()
        group = self.param_groups[0]
        finite = bool(torch.isfinite(losses).all())
        if not finite and not skip_nonfinite:
            values = ", ".join(f"{loss:g}" for loss in losses.tolist())
            raise NonFiniteLossError(f"The loss is not finite at step {group['step']}: {values}.")
        projected_grads = self.estimator.projected_grads(losses, group["eps"]).tolist() if finite else ()
        self.record = StepRecord(
            step=group["step"],
            seed=group["seed"],
            lr=tuple(float(group["lr"]) for group in self.param_groups),
            projected_grads=tuple(projected_grads),
            loss=losses.mean().item(),
            forward_passes=len(probes),
        )
        self._pending = True
        return self.record

    def perturbed(self, query: int, sign: int) -> AbstractContextManager[Any]:
        """A context in which the trainable parameters read as ``W + sign * eps * direction``."""
        perturbations = self.perturbations(query, sign) if sign else {}
        in_place = [parameter for parameter in perturbations if self._in_place.get(parameter, True)]
        return Perturbed(perturbations, in_place, self._scratch)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Applies the pending estimate; changes nothing where there is none.

        Args:
            closure: called once, first, as Lightning expects. It does not evaluate the loss: :meth:`estimate` does.
        """
        result = None if closure is None else closure()
        if self._pending and self.record is not None:
            self.apply(self.record)
            self._pending = False
        return result

    @torch.no_grad()
    def apply(self, record: StepRecord) -> None:
        """Applies a record, this run's or a replayed one: same weights before, same bits after."""
        if record.projected_grads:
            self.update(record)
            torch.clear_autocast_cache()  # casts of the weights as they were
        for group in self.param_groups:
            group["step"] = record.step + 1
            group["forward_passes"] += record.forward_passes

    # Parameters

    def trainable(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        """Group, name and parameter of everything that may move: frozen parameters are passed over."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, self._names[parameter], parameter

    def attach(self, module: nn.Module) -> None:
        """Takes parameter names from `module`: directions depend on them, not on the parameters' order.

        Raises:
            ValueError: if there is nothing to train, or a parameter cannot be trained by forward passes.
        """
        self.attached = True
        self._names |= {parameter: name for name, parameter in module.named_parameters()}
        count, half = 0, []
        for _, name, parameter in self.trainable():
            count += 1
            if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
                raise ValueError(
                    f"Parameter `{name}` has dtype {parameter.dtype}; trainable are float64, float32, bfloat16 and "
                    "float16. Freeze it (`requires_grad=False`)."
                )
            if parameter.numel() > MAX_ELEMENTS:
                raise ValueError(
                    f"Parameter `{name}` has {parameter.numel()} elements, at most {MAX_ELEMENTS} can train."
                )
            if parameter.dtype in (torch.bfloat16, torch.float16) and self.update_precision == "native":
                half.append(name)
        if not count:
            raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
        if half:
            rank_zero_warn(
                f"`update_precision` is 'native', which loses most of a small update in {_some(half)}. 'exact' loses "
                "none, for 2 bytes a bfloat16 parameter, 4 a float16 one."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, named by the module the optimizer is attached to, if it is."""
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        self.check(group)
        given = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
        for parameter, name in zip(group["params"], given, strict=True):
            self._names.setdefault(parameter, name)
        names = [self._names[parameter] for group in self.param_groups for parameter in group["params"]]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Two parameters are named `{max(names, key=names.count)}`, and directions depend on names: take those "
                "of one module's `named_parameters()`, or pass parameters without names."
            )

    def state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state now."""
        tensors = (t for state in self.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.numel() * t.element_size() for t in tensors)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores hyperparameters, counters and tensors, these in their own dtype."""
        # torch casts restored state to the parameter's dtype, which would ruin low words, masters and moments.
        super().load_state_dict({**state_dict, "state": {}})
        saved = (index for group in state_dict["param_groups"] for index in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for index, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value

    def _find_unseen(self, evaluate: Evaluate) -> None:
        """Audits parameters that take part for the first time; all are perturbed in place until that succeeds."""
        new = {parameter: name for _, name, parameter in self.trainable() if parameter not in self._in_place}
        unseen = audit(new, lambda: loss_and_terms(evaluate())[0]) if new else None
        if unseen is None:
            return
        self._in_place |= {parameter: parameter in unseen for parameter in new}
        if unseen:
            names = _some([name for parameter, name in new.items() if parameter in unseen])
            rank_zero_warn(
                f"{len(unseen)} parameters are unused or read where torch's Python functions do not see it, and are "
                f"perturbed in place from a copy, which costs their size in memory: {names}."
            )


def require_positive(name: str, value: float) -> None:
    """Raises a ValueError that names the argument unless `value` is a finite number above zero."""
    if not (isinstance(value, int | float | Tensor) and math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a positive number, got {value!r}.")


def require_fraction(name: str, value: float) -> None:
    """Raises a ValueError that names the argument unless `value` lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be at least 0 and below 1, got {value!r}.")


def loss_and_terms(output: Any) -> tuple[Tensor, Tensor]:
    """A loss and the number of terms it averages, both as wide scalars, from what `evaluate` returned."""
    loss, terms = output if isinstance(output, tuple) else (output, 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"The loss must be a tensor with one element, got {getattr(loss, 'shape', loss)}.")
    loss = loss.detach().view(()).to(torch.float32 if loss.device.type == "mps" else torch.float64)
    return loss, torch.as_tensor(terms, dtype=loss.dtype, device=loss.device)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
