"""The base class of all zeroth-order methods."""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from zolightning.checks import require_choice, require_positive, require_seed
from zolightning.directions.autocast import without_autocast
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.shards import is_sharded
from zolightning.evaluation.evaluator import Evaluator
from zolightning.evaluation.examples import MicroBatches
from zolightning.evaluation.losses import LossFunction
from zolightning.optim import checks
from zolightning.optim.estimators import Estimator, TwoSided
from zolightning.optim.evaluate_step import evaluate_step, squared_grad
from zolightning.optim.named_parameters import NamedParameters
from zolightning.optim.precision import UPDATE_PRECISIONS, UpdatePrecision, warn_of_native
from zolightning.optim.record import Estimate, StepRecord
from zolightning.optim.settings import refuse_unknown
from zolightning.optim.share import WHOLE, Share, warn_of_other_processes


class ZerothOrderOptimizer(NamedParameters, ABC):
    """Abstract base of the methods: an optimizer that reads losses instead of gradients.

    A step is two calls: :meth:`estimate` evaluates the loss at perturbed weights and keeps the result as a
    :class:`StepRecord`, and :meth:`step` applies that record. Weights change in :meth:`step` only.

    Hyperparameters and counters (``step``, ``seed``) are in ``param_groups`` and the tensors kept for each parameter in
    ``state``, so Lightning saves, restores, schedules and monitors a method like any other optimizer.

    A method defines :meth:`perturbations` and :meth:`update`, usually by deriving from
    :class:`~zolightning.optim.dense.DenseOptimizer` or :class:`~zolightning.optim.subspace.SubspaceOptimizer`. Other
    methods that it may define follow these two.

    Args:
        params: parameters, named parameters or parameter groups, as in ``torch.optim``.
        defaults: hyperparameters of a group, among them ``lr`` (weight units per unit of the estimated gradient) and
            ``eps`` (weight units per unit-variance direction).
        num_queries: number of random directions in a step; their gradient estimates are averaged.
        align_queries: combine the directions by least squares instead of averaging, which has less variance unless
            far more parameters are searched than directions drawn; see :mod:`zolightning.optim.alignment`.
        estimator: which losses a step evaluates: ``TwoSided()`` (the default), ``OneSided()``, ``Population()``,
            ``ZScores()``, ``PerExample()`` or ``ForwardGradient()``; see :mod:`zolightning.optim.estimators`.
        seed: seed of the directions; None takes that of ``lightning.seed_everything``, or 0.
        update_precision: how updates are added to half-precision weights: "exact", as to fp32 weights, for 2 extra
            bytes per bfloat16 parameter or 4 per float16 one; "low_byte", as to 24-bit weights, for 1 extra byte per
            bfloat16 parameter; or "native", in the weight's dtype, which loses small updates. See
            :mod:`zolightning.optim.precision`.
        **unknown: arguments that no constructor of the method takes; refused.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
        TypeError: naming an argument that the method does not have.
    """

    takes_shards: ClassVar[bool] = False  # whether `update` works for parameters of which a rank has some rows (FSDP2)
    has_unit_directions: ClassVar[bool] = False  # whether there are `unit_directions`

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
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self), unknown)  # Python's own error would name this class, which the user did not call
        require_choice("update_precision", update_precision, UPDATE_PRECISIONS)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        require_seed(seed)
        estimator = TwoSided() if estimator is None else estimator
        if not isinstance(estimator, Estimator):
            raise ValueError(f"`estimator` must be an Estimator, such as TwoSided(), got {estimator!r}.")
        self.num_queries = num_queries
        self.align_queries = align_queries
        self.estimator = estimator
        estimator.check(self)
        self.update_precision: UpdatePrecision = update_precision
        # Objects that are changed in place only: wrappers copy an optimizer's attributes (Fabric's does).
        self.evaluator = Evaluator()
        self._estimate = Estimate()
        self._estimate_pre_hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()
        defaults = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}
        super().__init__(params, defaults | {"step": 0, "seed": int(seed), "forward_passes": 0})

    # What a method defines

    @abstractmethod
    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        """What one evaluation adds to each trainable parameter, in the parameter's :meth:`trainable_shape`.

        It is :meth:`offsets` plus `sign` (1 or -1) times ``eps`` times the direction of `query`.
        """

    @abstractmethod
    def update(self, record: StepRecord) -> None:
        """Moves the trainable parameters by the step that a record describes."""

    def check(self, group: dict[str, Any]) -> None:
        """Raises a ValueError that names a hyperparameter of `group`, its value and what is accepted."""
        require_positive("lr", group.get("lr"))  # None where a method has left it out of its `defaults`
        require_positive("eps", group.get("eps"))
        if group["eps"] != self.param_groups[0]["eps"]:
            raise ValueError("`eps` must be the same in all parameter groups: they share the losses of a step.")
        if not group.get("weight_decay", 0.0) >= 0:
            raise ValueError(f"`weight_decay` must not be negative, got {group['weight_decay']!r}.")
        if group.get("weight_decay") and "weight_decay" not in self.defaults:
            raise ValueError(f"`weight_decay` is {group['weight_decay']!r}, but {type(self).__name__} has none: use 0.")

    def measurements(self) -> dict[str, float]:
        """Diagnostics of the method to be logged, by name; called every few dozen steps."""
        return {}

    def unit_directions(self, query: int) -> dict[nn.Parameter, Perturbation]:
        """The direction of `query` for each trainable parameter; only where it does not depend on the weights."""
        raise NotImplementedError("only methods with `has_unit_directions` have it")

    def perturbations_of(self, queries: Iterable[int], sign: int) -> dict[int, dict[nn.Parameter, Perturbation]]:
        """:meth:`perturbations` of several queries."""
        return {query: self.perturbations(query, sign) for query in queries}

    def offsets(self) -> dict[nn.Parameter, Perturbation]:
        """Pending updates, which every evaluation adds to the stored weights, even an unperturbed one."""
        return {}

    def needs_whole(self) -> Iterator[tuple[str, object, str]]:
        """The settings that do not work with sharded parameters (FSDP2): name, value, and a value that does work."""
        if not self.takes_shards:
            yield "method", type(self).__name__, "MeZO, for one"
        if not self.estimator.takes_shards:
            yield "estimator", f"{type(self.estimator).__name__}()", "TwoSided()"
        if self.align_queries:
            yield "align_queries", True, "False"

    # A step

    def attach(
        self,
        module: nn.Module,
        evaluations_per_forward: int = 1,
        keep_prefix_gib: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        """Prepares for losses computed by `module`, and takes the names of the parameters from it.

        Directions depend on parameter names, not on the order of parameters. Call it once, before the first step.

        Args:
            module: the module that owns the parameters and computes the loss: the network, or a module that holds it.
            evaluations_per_forward: how many evaluations of a step run as one batched forward pass, see
                :mod:`zolightning.evaluation.stacked`. At 1, layers below the first trained one run once per step
                instead.
            keep_prefix_gib: memory, in GiB, to keep the outputs of these layers for batches that recur.
            cuda_graphs: record the network's forward as CUDA graphs, see :mod:`zolightning.evaluation.graphs`. The
                module must be on its device already.

        Raises:
            ValueError: if nothing is trainable, a parameter cannot be trained by forward passes, or a setting does not
                fit another setting, the estimator, the module or its device.
        """
        checks.require_batching(evaluations_per_forward, self.estimator)
        checks.require_prefix(keep_prefix_gib, cuda_graphs)
        self.set_names({parameter: name for name, parameter in module.named_parameters()})
        trained = {parameter: name for _, name, parameter in self.trainable()}
        checks.require_trainable(trained)
        if any(is_sharded(parameter) for parameter in module.parameters()):
            several = [("evaluations_per_forward", evaluations_per_forward, "1")] if evaluations_per_forward > 1 else []
            checks.refuse_with_shards([*self.needs_whole(), *several])
        keep_prefix_bytes = int(keep_prefix_gib * 2**30)
        self.evaluator.attach(module, list(trained), evaluations_per_forward, keep_prefix_bytes, cuda_graphs)
        if self.update_precision == "native":
            warn_of_native(trained)

    @property
    def attached(self) -> bool:
        """Whether :meth:`attach` has been called."""
        return self.evaluator.module is not None

    def detach(self) -> None:
        """Undoes :meth:`attach`; the module's stored weights are the trained ones afterwards."""
        self.evaluator.detach()

    @torch.no_grad()
    def estimate(
        self,
        loss_fn: LossFunction,
        share: Share = WHOLE,
        skip_nonfinite: bool = False,
        micro_batches: MicroBatches | None = None,
    ) -> StepRecord:
        """Evaluates the loss at perturbed weights and keeps the record for :meth:`step`.

        The attached module is in evaluation mode during the evaluations (no dropout; batch norms use their stored
        statistics). All of them see the same random numbers (of torch, NumPy and Python), and only the first one may
        change the module (buffers, metrics), see :mod:`zolightning.evaluation.traces`.

        Args:
            loss_fn: computes the loss of the step's batch, anew at each call and always with the same padding. It
                returns a scalar tensor (in float32 or wider, so that small differences survive), or a pair of it and
                the number of terms it is the mean of, by which losses are averaged over ranks; see
                :func:`~zolightning.evaluation.losses.loss_and_terms`. If no rank has any term, the step is recorded
                without projected gradients and changes nothing.
            share: which of the evaluations this rank makes, and how it gets the results of the others.
            skip_nonfinite: whether to record a step without projected gradients if a loss is NaN or infinite, instead
                of raising; at most ``MAX_NONFINITE_IN_A_ROW`` times in a row.
            micro_batches: for the estimator ``PerExample()``, which needs it: the batch in parts, with the loss of each
                example by its number in the batch of all ranks. `loss_fn` then only serves to find where parameters
                are read.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite.
            ValueError: if a number of terms is negative, or `micro_batches` are missing.
        """
        last = self._estimate
        if share is WHOLE and last.record is None:
            warn_of_other_processes()
        last.is_unapplied = False
        for hook in self._estimate_pre_hooks.values():
            hook(self, partial(squared_grad, self, loss_fn=loss_fn, share=share))
        evaluates = not last.is_replaying
        found = evaluate_step(self, last, loss_fn, share, skip_nonfinite, micro_batches) if evaluates else None
        record = last.known.popleft() if last.known else found
        assert record is not None, "either it is known, or has just been made"
        last.record, last.is_unapplied = record, True
        return record

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
        if record is None or not self._estimate.is_unapplied:
            raise RuntimeError(
                f"{type(self).__name__}.step() has no estimate to apply, and reads no gradients: use the callback "
                "ZerothOrder, or call `zeroth_order_step(module, loss_fn)` or `optimizer.estimate(loss_fn)` first."
            )
        self.apply(record)
        self._estimate.is_unapplied = False
        return result

    @torch.no_grad()
    def apply(self, record: StepRecord) -> None:
        """Applies a record, of this run or of a replayed one. Weights that were equal stay equal to the last bit."""
        if tuple(record.blocks) != self.active:  # from another run
            self.activate(record.blocks)
        if record.projected_grads:
            with without_autocast(self.param_groups[0]["params"][0].device):
                self.update(record)
            torch.clear_autocast_cache()  # it holds casts of the old weights
        for group in self.param_groups:
            group["step"] = record.step + 1
            group["forward_passes"] += record.forward_passes
            group.pop("measured", None)

    @property
    def record(self) -> StepRecord | None:
        """The record of the last estimate; None before the first one."""
        return self._estimate.record

    def register_estimate_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Registers a hook that is called as ``hook(optimizer, squared_grad)`` before every :meth:`estimate`.

        ``squared_grad(block, num_queries=1)`` is :func:`~zolightning.optim.evaluate_step.squared_grad` on the loss of
        that estimate. The hook may :meth:`activate` blocks.

        Returns:
            A handle whose ``remove()`` removes the hook.
        """
        handle = RemovableHandle(self._estimate_pre_hooks)
        self._estimate_pre_hooks[handle.id] = hook
        return handle

    def count(self, evaluations: int) -> None:
        """Adds evaluations that were made between steps to the ``forward_passes`` of the next step's record."""
        group = self.param_groups[0]  # which checkpoints hold
        group["measured"] = group.get("measured", 0) + evaluations

    def expect(self, records: Iterable[StepRecord], evaluate: bool = False) -> None:
        """Makes the next estimates return these records, see :meth:`~zolightning.optim.record.Estimate.expect`."""
        self._estimate.expect(records, self.param_groups[0]["step"], evaluate)

    @property
    def is_replaying(self) -> bool:
        """Whether the next estimate returns a record given to :meth:`expect` and evaluates no loss."""
        return self._estimate.is_replaying

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but hooks and what is known about the attached module.

        Copied together, ``copy.deepcopy((module, optimizer))``, the copies continue as the originals do, once they are
        attached to each other.
        """
        # A scheduler replaces `step` with a function bound to its own optimizer.
        own = {name: value for name, value in vars(self).items() if "hook" not in name and name != "step"}
        return own | {"evaluator": Evaluator(), "_estimate_pre_hooks": OrderedDict()}


Method = Callable[[Iterable[Any]], ZerothOrderOptimizer]
"""Makes a method from parameters, as ``partial(MeZO, lr=1e-6)`` does."""
