"""The base class of all zeroth-order methods."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zolightning.directions.autocast import without_autocast
from zolightning.directions.shards import first_element, is_sharded, require_rows
from zolightning.kernels.noise import key as noise_key
from zolightning.messages import some
from zolightning.optim.checks import (
    require_choice,
    require_positive,
    require_seed,
    require_trainable,
)
from zolightning.optim.estimating import Estimating
from zolightning.optim.estimators import Estimator, ForwardGradient, PerExample, TwoSided
from zolightning.optim.precision import (
    RESTS,
    UPDATE_PRECISIONS,
    UpdatePrecision,
    as_contiguous,
    completed,
    round_stochastically,
)
from zolightning.optim.record import StepRecord
from zolightning.rank_zero import rank_zero_warn


class ZerothOrderOptimizer(Estimating):
    """Abstract base of the methods: an optimizer that reads losses instead of gradients.

    A step is two calls: :meth:`estimate` evaluates the loss at perturbed weights and keeps the result as a
    :class:`StepRecord`, and :meth:`step` applies that record. Weights change in :meth:`step` only.

    Hyperparameters and counters (``step``, ``seed``) are in ``param_groups`` and the tensors kept for each parameter in
    ``state``, so Lightning saves, restores, schedules and monitors a method like any other optimizer.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: hyperparameters of a group, among them ``lr`` (weight units per unit of the estimated gradient) and
            ``eps`` (weight units per unit-variance direction).
        num_queries: number of random directions in a step; their gradient estimates are averaged.
        align_queries: combine the directions by least squares instead of averaging, which has less variance if not
            many more parameters are searched than directions drawn; see :mod:`zolightning.optim.alignment`.
        estimator: which losses a step evaluates: ``TwoSided()`` (the default), ``OneSided()``, ``Population()``,
            ``ZScores()``, ``PerExample()`` or ``ForwardGradient()``; see :mod:`zolightning.optim.estimators`.
        seed: seed of the directions; None takes that of ``lightning.seed_everything``, or 0.
        update_precision: how updates are added to half-precision weights: "exact", as to fp32 weights, for 2 extra
            bytes per bfloat16 parameter or 4 per float16 one; "low_byte", as to 24-bit weights, for 1 extra byte per
            bfloat16 parameter; or "native", in the weight's dtype, which loses small updates. See
            :mod:`zolightning.optim.precision`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

    takes_shards = False  # whether `update` works for parameters of which a rank holds some rows only (FSDP2)

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        num_queries: int = 1,
        align_queries: bool = False,
        estimator: Estimator | None = None,
        seed: int | None = None,
        update_precision: UpdatePrecision = "exact",
    ) -> None:
        require_choice("update_precision", update_precision, UPDATE_PRECISIONS)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        require_seed(seed)
        super().__init__(
            params,
            defaults | {"step": 0, "seed": int(seed), "forward_passes": 0},
            num_queries=num_queries,
            align_queries=align_queries,
            estimator=TwoSided() if estimator is None else estimator,
        )
        self.update_precision: UpdatePrecision = update_precision

    # What a method defines

    @abstractmethod
    def update(self, record: StepRecord) -> None:
        """Moves the trainable parameters by the step that a record describes."""

    def measurements(self) -> dict[str, float]:
        """Diagnostics of the method to be logged, by name; called every few dozen steps."""
        return {}

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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the last estimate.

        Args:
            closure: called once, first, as Lightning expects. It does not evaluate the loss: :meth:`estimate` does.

        Raises:
            RuntimeError: if there has been no estimate since the last step.
        """
        result = None if closure is None else closure()
        record = self._estimate.record
        if record is None or not self._estimate.is_pending:
            raise RuntimeError(
                f"{type(self).__name__}.step() has no estimate to apply, and reads no gradients: use the callback "
                "ZerothOrder, or call `zeroth_order_step(module, loss_fn)` or `optimizer.estimate(loss_fn)` first."
            )
        self.apply(record)
        self._estimate.is_pending = False
        return result

    @torch.no_grad()
    def apply(self, record: StepRecord) -> None:
        """Applies a record, of this run or of a replayed one: equal weights before it are equal to the bit after it."""
        if tuple(record.blocks) != self.active:  # of another run
            self.activate(record.blocks)
        if record.projected_grads:
            with without_autocast(self.param_groups[0]["params"][0].device):
                self.update(record)
            torch.clear_autocast_cache()  # casts of the weights as they were
        for group in self.param_groups:
            group["step"] = record.step + 1
            group["forward_passes"] += record.forward_passes

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        """Prepares for losses computed by `module`, and takes the names of the parameters from it.

        Directions depend on parameter names, not on the order of parameters. To be called once before the first step.

        Args:
            module: the module that owns the parameters and computes the loss.
            evaluations_per_forward: how many evaluations of a step run as one batched forward pass, see
                :mod:`zolightning.evaluation.stacked`. At 1, layers below the first trained one run once per step
                instead.

        Raises:
            ValueError: if nothing is trainable, a parameter cannot be trained by forward passes, or
                `evaluations_per_forward` is above 1 where no submodule holds all parameters or the estimator batches
                in another way.
        """
        if evaluations_per_forward > 1 and isinstance(self.estimator, PerExample):
            raise ValueError(
                f"`evaluations_per_forward` is {evaluations_per_forward}, and under PerExample() the examples of an "
                "evaluation share a forward already. Leave it at 1."
            )
        if evaluations_per_forward > 1 and isinstance(self.estimator, ForwardGradient):
            raise ValueError(
                f"`evaluations_per_forward` is {evaluations_per_forward}, and under ForwardGradient() each evaluation "
                "is differentiated by itself. Leave it at 1."
            )
        self._names |= {parameter: name for name, parameter in module.named_parameters()}
        count, half = 0, []
        for _, name, parameter in self.trainable():
            count += 1
            require_trainable(name, parameter)
            require_rows(name, parameter)
            if parameter.dtype in (torch.bfloat16, torch.float16) and self.update_precision == "native":
                half.append(name)
        if any(is_sharded(parameter) for parameter in module.parameters()):
            self._refuse_with_shards(evaluations_per_forward)
        if not count:
            raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
        self.evaluator.attach(module, [parameter for _, _, parameter in self.trainable()], evaluations_per_forward)
        if half:
            rank_zero_warn(
                f"`update_precision` is 'native', which loses most of a small update in {some(half)}. 'exact' loses "
                "none, for 2 bytes a bfloat16 parameter, 4 a float16 one; 'low_byte' few, for 1 byte a bfloat16 one."
            )

    def needs_whole(self) -> Iterator[tuple[str, object, str]]:
        """The settings that do not work with sharded parameters (FSDP2): name, value, and a value that does."""
        if not self.takes_shards:
            yield "method", type(self).__name__, "MeZO, for one"
        if isinstance(self.estimator, PerExample | ForwardGradient):
            yield "estimator", f"{type(self.estimator).__name__}()", "TwoSided()"
        if self.align_queries:
            yield "align_queries", True, "False"

    def _refuse_with_shards(self, evaluations_per_forward: int) -> None:
        """Raises a ValueError that names a setting which does not work with sharded parameters."""
        several = [("evaluations_per_forward", evaluations_per_forward, "1")] if evaluations_per_forward > 1 else []
        for name, value, accepted in (*self.needs_whole(), *several):
            raise ValueError(
                f"`{name}` is {value}, which has not been made for parameters that are sharded over ranks. Use "
                f"{accepted}, or a strategy under which every rank holds all of them ('zo_ddp')."
            )

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops the state of parameters; half-precision weights are rounded first, stochastically.

        The random numbers are a function of the step and of the parameter's name.
        """
        parameters = list(parameters)
        for parameter in parameters if self.drops_left_state else ():
            if rest := {name: t.to(parameter.device) for name, t in self._kept(parameter).items() if name in RESTS}:
                key = noise_key(0, self.param_groups[0]["step"], -1, self._names[parameter])
                with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                    round_stochastically(weight, rest, self.update_precision, key, first_element(parameter))
        super().release(parameters)

    def completed(self, parameter: nn.Parameter) -> torch.Tensor:
        """The trained values of a parameter with all the bits that are kept of them, flat.

        For a float32 parameter that trains as a whole it is a view of the weight, which the next step changes.
        """
        part, weight = self.slices.get(parameter), parameter.detach()
        return completed(weight if part is None else part.take(weight), self._kept(parameter))

    def _kept(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The tensors kept for a parameter, by name."""
        return self.state.get(parameter, {})

    def detach(self) -> None:
        """Undoes :meth:`attach`; the module's stored weights are the trained ones afterwards."""
        self.evaluator.detach()
