"""The first half of a step: losses are evaluated at perturbed weights and recorded."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.examples import MicroBatch
from zolightning.optim.blocks import BlockwiseParameters
from zolightning.optim.checks import require_queries
from zolightning.optim.estimators import Estimator, ForwardGradient, PerExample, Probe, TwoSided
from zolightning.optim.forward_gradient import evaluate_derivatives
from zolightning.optim.per_example import evaluate_examples
from zolightning.optim.probing import Evaluate, evaluate_probes, evaluate_step
from zolightning.optim.record import Estimate, StepRecord
from zolightning.optim.share import WHOLE, Share


class Estimating(BlockwiseParameters, ABC):
    """Abstract: an optimizer that estimates gradients from losses and leaves the weights unchanged.

    Args:
        params, defaults: of :class:`~zolightning.optim.blocks.BlockwiseParameters`.
        num_queries, align_queries, estimator: of :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
    """

    has_unit_directions = False  # see `unit_directions`

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        num_queries: int,
        align_queries: bool,
        estimator: Estimator,
    ) -> None:
        require_queries(num_queries, estimator)
        if align_queries and isinstance(estimator, PerExample):
            raise ValueError(
                "`align_queries` is True, and under PerExample() each query is of another loss: set it to False."
            )
        if isinstance(estimator, ForwardGradient) and not self.has_unit_directions:
            raise ValueError(
                f"`estimator` is ForwardGradient(), and {type(self).__name__} searches a subspace, or along directions "
                "that depend on the weights: use MeZO or MeZOAdam."
            )
        self.num_queries = num_queries
        self.align_queries = align_queries
        self.estimator = estimator
        super().__init__(params, defaults)
        self._estimate = Estimate()
        self._estimate_pre_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        self.evaluator = Evaluator()

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` has been called."""
        return self.evaluator.module is not None

    @property
    def record(self) -> StepRecord | None:
        """The record of the last estimate; None before the first one."""
        return self._estimate.record

    @abstractmethod
    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        """What one evaluation adds to each trainable parameter, which it sees in its :meth:`trainable_shape`.

        It is :meth:`offsets` plus `sign` (1 or -1) times ``eps`` times the direction of `query`.
        """

    def unit_directions(self, query: int) -> dict[nn.Parameter, Perturbation]:
        """The direction of `query` for each trainable parameter; only where it does not depend on the weights."""
        raise NotImplementedError("only methods with `has_unit_directions` have it")

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        """:meth:`perturbations` of several queries."""
        return {query: self.perturbations(query, sign) for query in queries}

    def offsets(self) -> dict[nn.Parameter, Perturbation]:
        """Pending updates, which every evaluation adds to the stored weights, an unperturbed one too."""
        return {}

    @torch.no_grad()
    def estimate(
        self,
        evaluate: Evaluate,
        share: Share = WHOLE,
        skip_nonfinite: bool = False,
        micro_batches: Sequence[MicroBatch] | None = None,
    ) -> StepRecord:
        """Evaluates the loss at perturbed weights and keeps the record for :meth:`step`.

        The attached module is in evaluation mode during the evaluations (no dropout; batch norms use their stored
        statistics). All of them see the same random numbers (of torch, NumPy and Python), and only the first one may
        change the module (buffers, metrics), see :mod:`zolightning.evaluation.traces`.

        Args:
            evaluate: computes the loss of the step's batch, anew at each call and always with the same padding. It
                returns a scalar tensor (in float32 or wider, so that small differences survive), or a pair of it and
                the number of terms it is the mean of, by which losses are averaged over ranks; see
                :func:`~zolightning.optim.checks.loss_and_terms`. If no rank has any term, the step is recorded without
                projected gradients and changes nothing.
            share: which of the evaluations this rank makes, and how it gets the results of the others.
            skip_nonfinite: whether to record a step without projected gradients if a loss is NaN or infinite, instead
                of raising; at most ``MAX_NONFINITE_IN_A_ROW`` times in a row.
            micro_batches: for the estimator ``PerExample()``, which needs it: the batch in parts, with the loss of each
                example by its number in the batch of all ranks. `evaluate` then only serves to find where parameters
                are read.

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

    def expect(self, records: Iterable[StepRecord], evaluate: bool = False) -> None:
        """Has the next estimates return these records instead of new ones, to repeat steps of an interrupted run.

        The loss is not evaluated, except in steps in which it changed the module, which a record does not hold.

        Args:
            records: of the steps that come next, in order.
            evaluate: whether to evaluate the loss in all of these steps, for what it logs.

        Raises:
            ValueError: if they are not the records of the steps that come next.
        """
        known, step = list(records), self.param_groups[0]["step"]
        if [record.step for record in known] != list(range(step, step + len(known))):
            raise ValueError(f"Step {step} comes next, and the records begin with step {known[0].step} or have gaps.")
        self._estimate.known.clear()
        self._estimate.known.extend(known)
        self._estimate.evaluates_known = evaluate

    @property
    def is_replaying(self) -> bool:
        """Whether the next estimate returns a record given to :meth:`expect` and evaluates no loss."""
        last = self._estimate
        return bool(last.known) and last.known[0].says_all and not last.evaluates_known

    def _evaluated(
        self, evaluate: Evaluate, share: Share, skip_nonfinite: bool, micro_batches: Sequence[MicroBatch] | None
    ) -> StepRecord:
        """The record of a step whose losses are evaluated."""
        group, last = self.param_groups[0], self._estimate
        look = partial(evaluate_probes, self, self.estimator, self.estimator.probes(self.num_queries), evaluate, share)
        if isinstance(self.estimator, PerExample):
            look = partial(evaluate_examples, self, self.estimator, evaluate, share, micro_batches)
        elif isinstance(self.estimator, ForwardGradient):
            look = partial(evaluate_derivatives, self, self.estimator, evaluate, share)
        found = evaluate_step(self, last, look, skip_nonfinite)
        weight = group.get("block_weight", 1.0)
        return StepRecord(
            step=group["step"],
            seed=group["seed"],
            # `lr` itself belongs to schedulers, which may set it anew at every step.
            lr=tuple(float(group["lr"]) * group.get("lr_scale", 1.0) * weight for group in self.param_groups),
            projected_grads=tuple(found.projected_grads) if found.is_finite else (),
            losses=tuple(found.losses),
            forward_passes=len(found.losses) * self.estimator.forwards + last.measured,
            refresh=group.get("refresh", 0),
            folds=group.get("folds", 0),
            blocks=self.active,
            given="given" in group and group["given"] == group["refresh"] != 0,
            leaves_traces=self.evaluator.left_traces,
        )

    def register_estimate_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Registers a hook that is called as ``hook(optimizer, squared_grad)`` before every :meth:`estimate`.

        ``squared_grad(block, num_queries=1)`` is :meth:`squared_grad` on the loss of that estimate. The hook may
        :meth:`activate` blocks.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        handle = RemovableHandle(self._estimate_pre_hooks)
        self._estimate_pre_hooks[handle.id] = hook
        return handle

    @torch.no_grad()
    def squared_grad(self, block: int, num_queries: int = 1, *, evaluate: Evaluate, share: Share = WHOLE) -> float:
        """The mean squared projected gradient of one block along `num_queries` directions, all else being at rest.

        Its expectation is ``grad' S grad``, where S is the covariance of the method's directions: the squared norm of
        the block's gradient for MeZO, and ``grad' H^-1 grad`` for directions scaled by ``H^-1/2``. With one query the
        relative standard deviation is sqrt(2). It costs ``2 num_queries`` evaluations, which the next record counts.
        The directions are other ones than those of any step.

        Args:
            block: index of the block.
            num_queries: directions to average over.
            evaluate, share: as for :meth:`estimate`.

        Returns:
            The mean, or 0 if a loss is not finite.
        """
        estimator = TwoSided()
        probes = [Probe(self.num_queries + query, sign) for query, sign in estimator.probes(num_queries)]
        with self.only(block):
            grads = evaluate_probes(self, estimator, probes, evaluate, share, leaves_traces=False).projected_grads
        self._estimate.measured += len(probes)
        mean = sum(grad * grad for grad in grads) / len(grads)
        return mean if math.isfinite(mean) else 0.0

    def count(self, evaluations: int) -> None:
        """Adds evaluations that were made between steps to the ``forward_passes`` of the next record."""
        self._estimate.measured += evaluations
