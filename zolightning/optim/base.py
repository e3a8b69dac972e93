"""What all zeroth-order methods share: probing, the record of a step, and adding an update to the weights."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zolightning.directions.slices import SlicedPerturbation
from zolightning.evaluation.audit import audit, find_readers
from zolightning.evaluation.perturbed import Perturbation, Perturbed, Scratch
from zolightning.evaluation.shared_prefix import SharedPrefix, layers_of
from zolightning.evaluation.stacked import CannotStack, StackedNetwork, network_of
from zolightning.optim.checks import (
    loss_and_terms,
    require_choice,
    require_positive,
    require_queries,
    require_seed,
    require_trainable,
    some,
)
from zolightning.optim.estimators import Estimator, Probe, TwoSided
from zolightning.optim.named_parameters import NamedParameters
from zolightning.optim.precision import UPDATE_PRECISIONS, UpdatePrecision
from zolightning.optim.record import NonFiniteLossError, StepRecord

Evaluate = Callable[[], Tensor]
Reduce = Callable[[Tensor], Tensor]


class ZerothOrderOptimizer(NamedParameters, ABC):
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
        update_precision: how updates are added to half-precision weights, see :mod:`zolightning.optim.precision`.

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
        require_queries(num_queries, self.estimator)
        require_choice("update_precision", update_precision, UPDATE_PRECISIONS)
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        require_seed(seed)
        super().__init__(params, defaults | {"step": 0, "seed": int(seed), "forward_passes": 0})
        self.num_queries = num_queries
        self.update_precision: UpdatePrecision = update_precision
        self.record: StepRecord | None = None
        self._pending = False
        self.attached = False
        self._in_place: dict[nn.Parameter, bool] = {}  # the audit's verdict on each parameter it has seen
        self._module: nn.Module | None = None
        self._readers: dict[frozenset[nn.Parameter], tuple[nn.Module, ...] | None] = {}  # of parameters that move
        self._scratch = Scratch()
        self.prefix = SharedPrefix(())
        self._stack: StackedNetwork | None = None

    partners: tuple[str, ...] = ()  # names of callbacks that a run with this method cannot do without

    # What a method defines

    @abstractmethod
    def perturbations(self, query: int, sign: int) -> dict[nn.Parameter, Perturbation]:
        """``sign * eps`` times the direction of `query`, for every trainable parameter or its slice.

        For a `sign` of 0, what a method adds to stored weights at all times, mostly nothing.
        """

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
        results = self._results(probes, lambda: loss_and_terms(evaluate()))
        totals = torch.stack([torch.stack([loss * terms, terms]) for loss, terms in results])
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
            refresh=group.get("refresh", 0),
        )
        self._pending = True
        return self.record

    def perturbed(self, query: int, sign: int, scratch: Scratch | None = None) -> Perturbed:
        """A context in which the trainable parameters read as ``W + sign * eps * direction``."""
        perturbations = self.perturbations(query, sign)
        for parameter, part in self.slices.items():
            if parameter in perturbations:
                perturbations[parameter] = SlicedPerturbation(perturbations[parameter], part)
        in_place = [parameter for parameter in perturbations if self._in_place.get(parameter, True)]
        watched = dict.fromkeys((parameter for _, _, parameter in self.trainable()), None) | perturbations
        return Perturbed(watched, in_place, scratch or self._scratch)

    def effective(self) -> Perturbed:
        """A context for validation during training, in which weights read as this method means them."""
        return self.perturbed(0, 0, Scratch())  # inference mode would spoil the buffers that training uses

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

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        """Takes parameter names from `module`: directions depend on them, not on the parameters' order.

        Args:
            module: what owns the parameters.
            evaluations_per_forward: how many evaluations of a step share a run of the network, see
                :mod:`zolightning.evaluation.stacked`; those that do not share what lies below the first trained layer.

        Raises:
            ValueError: if there is nothing to train, or a parameter cannot be trained by forward passes; if
                evaluations are to share runs and no submodule holds all parameters.
        """
        self.attached = True
        self._module = module
        self._readers.clear()
        self.prefix = SharedPrefix(layers_of(module))
        self._names |= {parameter: name for name, parameter in module.named_parameters()}
        count, half = 0, []
        for _, name, parameter in self.trainable():
            count += 1
            require_trainable(name, parameter)
            if parameter.dtype in (torch.bfloat16, torch.float16) and self.update_precision == "native":
                half.append(name)
        if not count:
            raise ValueError("No parameter is trainable: all of the optimizer's have `requires_grad=False`.")
        if evaluations_per_forward > 1:
            network = network_of(module, (parameter for _, _, parameter in self.trainable()))
            self._stack = StackedNetwork(network, evaluations_per_forward)
        if half:
            rank_zero_warn(
                f"`update_precision` is 'native', which loses most of a small update in {some(half)}. 'exact' loses "
                "none, for 2 bytes a bfloat16 parameter, 4 a float16 one."
            )

    def detach(self) -> None:
        """Leaves the module for good, its stored weights being what was trained."""
        self.attached = False

    def _results(
        self, probes: Sequence[Probe], evaluate: Callable[[], tuple[Tensor, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Losses and the numbers of terms they average, of all probes."""
        contexts = [self.perturbed(*probe) for probe in probes]
        readers = self._find_readers(contexts[0], evaluate)
        for context in contexts:
            context.readers = readers
        if self._stack is not None and not any(context.in_place for context in contexts):
            try:
                return self._stack.evaluate(evaluate, contexts)
            except CannotStack as error:
                self._stack = None
                rank_zero_warn(
                    f"`evaluations_per_forward` is 1 from here on: {error}. Set it to 1, or freeze a parameter that "
                    "is in the way, or give it a `vector_lr` of 0."
                )
        results = []
        with self.prefix.one_step():
            for context in contexts:
                with context:
                    results.append(self.prefix.evaluate(evaluate, context))
        return results

    def _find_unseen(self, evaluate: Evaluate) -> None:
        """Audits parameters that take part for the first time; all are perturbed in place until that succeeds."""
        new = {parameter: name for _, name, parameter in self.trainable() if parameter not in self._in_place}
        unseen = audit(new, lambda: loss_and_terms(evaluate())[0]) if new else None
        if unseen is None:
            return
        self._in_place |= {parameter: parameter in unseen for parameter in new}
        if unseen:
            names = some([name for parameter, name in new.items() if parameter in unseen])
            rank_zero_warn(
                f"{len(unseen)} parameters are unused or read where torch's Python functions do not see it, and are "
                f"perturbed in place from a copy, which costs their size in memory: {names}."
            )
            if self._stack is not None:
                self._stack = None
                rank_zero_warn("`evaluations_per_forward` is 1 from here on: such parameters cannot be stacked.")

    def _find_readers(
        self, context: Perturbed, evaluate: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[nn.Module, ...] | None:
        """The modules that read the parameters of a context, found once for each set of them."""
        parameters = frozenset(context.perturbations).difference(context.in_place)
        if parameters and self._module is not None and parameters not in self._readers:
            self._readers[parameters] = find_readers(self._module, parameters, lambda: evaluate()[0])
        return self._readers.get(parameters)
