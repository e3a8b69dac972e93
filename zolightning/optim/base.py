"""What all zeroth-order methods share: probing, the record of a step, and adding an update to the weights."""

import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.examples import MicroBatch
from zolightning.kernels.noise import key as noise_key
from zolightning.messages import some
from zolightning.optim.blocks import BlockwiseParameters
from zolightning.optim.checks import (
    require_choice,
    require_positive,
    require_queries,
    require_seed,
    require_trainable,
)
from zolightning.optim.estimators import Estimator, PerExample, Probe, TwoSided
from zolightning.optim.per_example import evaluate_examples
from zolightning.optim.precision import (
    RESTS,
    UPDATE_PRECISIONS,
    UpdatePrecision,
    as_contiguous,
    round_stochastically,
)
from zolightning.optim.probing import Evaluate, evaluate_probes, evaluate_step
from zolightning.optim.record import Estimate, StepRecord
from zolightning.optim.share import WHOLE, Share
from zolightning.rank_zero import rank_zero_warn


class ZerothOrderOptimizer(BlockwiseParameters, ABC):
    """Abstract base of the methods: an optimizer that reads losses instead of gradients.

    A step is two calls: :meth:`estimate` evaluates the loss at perturbed weights and leaves a
    :class:`StepRecord`, :meth:`step` applies it. The weights change in :meth:`step` only.

    ``param_groups`` carry the hyperparameters and the counters (``step``, ``seed``), ``state`` the tensors of each
    parameter, so Lightning saves, restores, schedules and monitors a method like any optimizer.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: hyperparameters of a group; ``lr`` (weight units per unit of estimated gradient) and ``eps``
            (weight units per unit-variance direction) among them.
        num_queries: directions a step, whose estimates are averaged.
        align_queries: take the projection of the gradient on the span of these directions in the place of the average,
            which has less variance where not many more numbers are searched than directions drawn; see
            :mod:`zolightning.optim.alignment`.
        estimator: which losses to ask for: ``TwoSided()``, which is the default, ``OneSided()``, ``Population()`` or
            ``PerExample()`` (:mod:`zolightning.optim.estimators`).
        seed: of the run's directions; None takes the seed of ``lightning.seed_everything``, or 0.
        update_precision: how updates are added to half-precision weights: "exact", as if they were fp32, for 2 bytes a
            bfloat16 parameter or 4 a float16 one; "low_byte", rounded to 24 bits, for 1 byte a bfloat16 parameter; or
            "native", see :mod:`zolightning.optim.precision`.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """

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
        self.estimator = TwoSided() if estimator is None else estimator
        require_queries(num_queries, self.estimator)
        if align_queries and isinstance(self.estimator, PerExample):
            raise ValueError(
                "`align_queries` is True, and under PerExample() each query is of another loss: set it to False."
            )
        require_choice("update_precision", update_precision, UPDATE_PRECISIONS)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        require_seed(seed)
        super().__init__(params, defaults | {"step": 0, "seed": int(seed), "forward_passes": 0})
        self.num_queries = num_queries
        self.align_queries = align_queries
        self.update_precision: UpdatePrecision = update_precision
        self._estimate = Estimate()
        self._estimate_pre_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        self.evaluator = Evaluator()

    @property
    def attached(self) -> bool:
        """Whether a module has given the parameters their names, and is evaluated."""
        return self.evaluator.module is not None

    @property
    def record(self) -> StepRecord | None:
        """The record of the last estimate; None before the first one."""
        return self._estimate.record

    # What a method defines

    @abstractmethod
    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        """:meth:`offsets` plus `sign` (1 or -1) times ``eps`` times the direction of `query`.

        For every trainable parameter, as a tensor of :meth:`trainable_shape`.
        """

    def offsets(self) -> dict[nn.Parameter, Perturbation]:
        """What the network computes with beside the stored weights, also where nothing is perturbed."""
        return {}

    @abstractmethod
    def update(self, record: StepRecord) -> None:
        """Moves the trainable parameters by a step with these projected gradients."""

    def measurements(self) -> dict[str, float]:
        """What a method has to show of itself, by name: computed when it is asked for, every few dozen steps."""
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
    def estimate(
        self,
        evaluate: Evaluate,
        share: Share = WHOLE,
        skip_nonfinite: bool = False,
        micro_batches: Sequence[MicroBatch] | None = None,
    ) -> StepRecord:
        """Evaluates the loss at perturbed weights and keeps the record for :meth:`step`.

        The module that the optimizer is attached to is in evaluation mode meanwhile (no dropout; batch norms use their
        stored statistics). All evaluations draw the same random numbers (torch's, NumPy's and Python's), and only the
        first one leaves traces in the module, see :mod:`zolightning.evaluation.traces`.

        Args:
            evaluate: the loss of one batch, computed anew at each call, always on the same batch and padding: a
                scalar tensor (float32 or wider, so that differences survive), or a pair of it and the number of
                terms it averages, for a mean over ranks that does not depend on how the batch was split; see
                :func:`~zolightning.optim.checks.loss_and_terms`. Where there are no terms on any rank, the step is
                recorded without projected gradients.
            share: which of the step's evaluations this rank makes, and how it learns of the others.
            skip_nonfinite: record a step without projected gradients instead of raising, up to
                ``MAX_NONFINITE_IN_A_ROW`` times in a row.
            micro_batches: the batch in parts, with the loss of each example by its number in the batch of all ranks;
                the estimator ``PerExample()`` needs it, and others do not look at it. `evaluate` then finds out where
                parameters are read, no more.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
            ValueError: if a number of terms is negative, or `micro_batches` are missing.
        """
        last = self._estimate
        last.is_pending = False
        for hook in self._estimate_pre_hooks.values():
            hook(self, partial(self.squared_grad, evaluate=evaluate, share=share))
        found = None if self.is_replaying else self._evaluated(evaluate, share, skip_nonfinite, micro_batches)
        record = last.known.popleft() if last.known else found
        assert record is not None, "either it is known, or has just been made"
        last.record, last.is_pending, last.measured = record, True, 0
        return record

    def expect(self, records: Iterable[StepRecord]) -> None:
        """Has the next estimates return these records, of steps that the run has taken before.

        A loss is evaluated only where a record does not say all that its step did, for what it leaves in the module.
        Whatever else happens in a step happens as ever, so that a run goes on where its records end.

        Raises:
            ValueError: if they are not those of the steps that come next.
        """
        known, step = list(records), self.param_groups[0]["step"]
        if [record.step for record in known] != list(range(step, step + len(known))):
            raise ValueError(f"Step {step} comes next, and the records begin with step {known[0].step} or have gaps.")
        self._estimate.known.clear()
        self._estimate.known.extend(known)

    @property
    def is_replaying(self) -> bool:
        """Whether the next estimate returns a record of before, and evaluates no loss."""
        return bool(self._estimate.known) and self._estimate.known[0].says_all

    def _evaluated(
        self, evaluate: Evaluate, share: Share, skip_nonfinite: bool, micro_batches: Sequence[MicroBatch] | None
    ) -> StepRecord:
        """The record of a step whose losses are evaluated."""
        group, last = self.param_groups[0], self._estimate
        look = partial(evaluate_probes, self, self.estimator, self.estimator.probes(self.num_queries), evaluate, share)
        if isinstance(self.estimator, PerExample):
            look = partial(evaluate_examples, self, self.estimator, evaluate, share, micro_batches)
        found = evaluate_step(self, last, look, skip_nonfinite)
        weight = group.get("block_weight", 1.0)
        return StepRecord(
            step=group["step"],
            seed=group["seed"],
            # `lr` itself belongs to schedulers, which may set it anew at every step.
            lr=tuple(float(group["lr"]) * group.get("lr_scale", 1.0) * weight for group in self.param_groups),
            projected_grads=tuple(found.projected_grads) if found.is_finite else (),
            losses=tuple(found.losses),
            forward_passes=len(found.losses) + last.measured,
            refresh=group.get("refresh", 0),
            folds=group.get("folds", 0),
            blocks=self.active,
            leaves_traces=self.evaluator.left_traces,
        )

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
        """Applies a record, this run's or a replayed one: same weights before, same bits after."""
        if tuple(record.blocks) != self.active:  # of another run
            self.activate(record.blocks)
        if record.projected_grads:
            self.update(record)
            torch.clear_autocast_cache()  # casts of the weights as they were
        for group in self.param_groups:
            group["step"] = record.step + 1
            group["forward_passes"] += record.forward_passes

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        """Takes parameter names from `module`: directions depend on them, not on the parameters' order.

        Args:
            module: what owns the parameters.
            evaluations_per_forward: how many evaluations of a step share a run of the network, see
                :mod:`zolightning.evaluation.stacked`; those that do not share what lies below the first trained layer.

        Raises:
            ValueError: if there is nothing to train, or a parameter cannot be trained by forward passes; if
                evaluations are to share runs and no submodule holds all parameters, or examples share one.
        """
        if evaluations_per_forward > 1 and isinstance(self.estimator, PerExample):
            raise ValueError(
                f"`evaluations_per_forward` is {evaluations_per_forward}, and under PerExample() the examples of an "
                "evaluation share a forward already. Leave it at 1."
            )
        self._names |= {parameter: name for name, parameter in module.named_parameters()}
        count, half = 0, []
        for _, name, parameter in self.trainable():
            count += 1
            require_trainable(name, parameter)
            if parameter.dtype in (torch.bfloat16, torch.float16) and self.update_precision == "native":
                half.append(name)
        if not count:
            raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
        self.evaluator.attach(module, [parameter for _, _, parameter in self.trainable()], evaluations_per_forward)
        if half:
            rank_zero_warn(
                f"`update_precision` is 'native', which loses most of a small update in {some(half)}. 'exact' loses "
                "none, for 2 bytes a bfloat16 parameter, 4 a float16 one; 'low_byte' few, for 1 byte a bfloat16 one."
            )

    def register_estimate_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Calls ``hook(optimizer, squared_grad)`` at the beginning of every :meth:`estimate`.

        ``squared_grad(block, num_queries=1)`` is :meth:`squared_grad` with that estimate's loss. The hook may
        :meth:`activate` blocks by what it finds.

        Returns:
            A handle whose ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._estimate_pre_hooks)
        self._estimate_pre_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def squared_grad(self, block: int, num_queries: int = 1, *, evaluate: Evaluate, share: Share = WHOLE) -> float:
        """Squared projected gradient of one block, nothing else being perturbed: a mean over `num_queries` directions.

        Its expectation is the squared norm of the block's gradient in the metric of the method's directions:
        ``grad' S grad`` for directions of covariance S, ``grad' H^-1 grad`` where they are scaled by ``H^-1/2``. One
        query has a relative standard deviation of sqrt(2). Costs ``2 num_queries`` evaluations, which the next record
        counts; their directions are none that a step uses.

        Args:
            block: index of the block.
            num_queries: directions to average over.
            evaluate, share: as for :meth:`estimate`.

        Returns:
            0 where a loss is not finite.
        """
        estimator = TwoSided()
        probes = [Probe(self.num_queries + query, sign) for query, sign in estimator.probes(num_queries)]
        with self.only(block):
            grads = evaluate_probes(self, estimator, probes, evaluate, share, leaves_traces=False).projected_grads
        self._estimate.measured += len(probes)
        mean = sum(grad * grad for grad in grads) / len(grads)
        return mean if math.isfinite(mean) else 0.0

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Half-precision weights are rounded first, in a way that depends on the step's number and their names."""
        parameters = list(parameters)
        for parameter in parameters if self.drops_left_state else ():
            if rest := {name: t.to(parameter.device) for name, t in self._kept(parameter).items() if name in RESTS}:
                key = noise_key(0, self.param_groups[0]["step"], -1, self._names[parameter])
                with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                    round_stochastically(weight, rest, self.update_precision, key)
        super().release(parameters)

    def _kept(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        """The tensors kept of a parameter."""
        return self.state.get(parameter, {})

    def count(self, evaluations: int) -> None:
        """Adds evaluations that were made between steps to the ``forward_passes`` of the next record."""
        self._estimate.measured += evaluations

    def detach(self) -> None:
        """Leaves the module for good, its stored weights being what was trained."""
        self.evaluator.detach()
