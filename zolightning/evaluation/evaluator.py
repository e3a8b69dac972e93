"""Evaluates a loss at perturbed weights: the optimizer says where, this says how."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from zolightning.directions.perturbation import Perturbation
from zolightning.evaluation.audit import audit, find_readers
from zolightning.evaluation.mode import evaluation_mode
from zolightning.evaluation.perturbed import Perturbed, Scratch
from zolightning.evaluation.shared_prefix import SharedPrefix, layers_of
from zolightning.evaluation.stacked import CannotStack, StackedNetwork, network_of
from zolightning.messages import some

Evaluate = Callable[[], tuple[Tensor, Tensor]]  # a loss and the number of terms it averages, both wide scalars
Perturbations = Mapping[nn.Parameter, Perturbation]


class Evaluator:
    """Evaluates the losses of a step, each under perturbations of its own; the stored weights stay as they are.

    Attributes:
        module: what owns the parameters; None for parameters on their own.
        prefix: what the evaluations of a step have in common, computed once.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.prefix = SharedPrefix(())
        self._scratch = Scratch()
        self._stack: StackedNetwork | None = None
        self._in_place: dict[nn.Parameter, bool] = {}  # the audit's verdict on each parameter it has seen
        self._readers: dict[frozenset[nn.Parameter], tuple[nn.Module, ...] | None] = {}  # of parameters that move

    def attach(self, module: nn.Module, parameters: Iterable[nn.Parameter], evaluations_per_forward: int = 1) -> None:
        """Evaluates losses of `module` from now on.

        Args:
            module: what owns the parameters.
            parameters: those that train.
            evaluations_per_forward: how many evaluations of a step share a run of the network, see
                :mod:`zolightning.evaluation.stacked`.

        Raises:
            ValueError: if evaluations are to share runs and no submodule holds all parameters.
        """
        self.module = module
        self.prefix = SharedPrefix(layers_of(module))
        self._readers.clear()
        if evaluations_per_forward > 1:
            self._stack = StackedNetwork(network_of(module, parameters), evaluations_per_forward)

    def detach(self) -> None:
        """Leaves the module for good."""
        self.module = None

    def evaluate(
        self, evaluate: Evaluate, trainable: Mapping[nn.Parameter, str], perturbations: Sequence[Perturbations]
    ) -> list[tuple[Tensor, Tensor]]:
        """Losses, and the numbers of terms they average, under each of some perturbations.

        Args:
            evaluate: computes the loss of one batch anew at each call.
            trainable: the parameters that train, and their names.
            perturbations: what each evaluation changes; parameters that are left out read as they are stored.
        """
        with evaluation_mode(self.module) if self.module is not None else nullcontext():
            return self._evaluate(evaluate, trainable, perturbations)

    def _evaluate(
        self, evaluate: Evaluate, trainable: Mapping[nn.Parameter, str], perturbations: Sequence[Perturbations]
    ) -> list[tuple[Tensor, Tensor]]:
        self._find_unseen(trainable, evaluate)
        contexts = [self._perturbed(trainable, changes) for changes in perturbations]
        readers = self._find_readers(contexts[0], evaluate)
        for context in contexts:
            context.readers = readers
        if self._stack is not None and not contexts[0].in_place:
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

    def _perturbed(self, trainable: Iterable[nn.Parameter], perturbations: Perturbations) -> Perturbed:
        watched = dict.fromkeys(trainable, None) | dict(perturbations)
        in_place = [parameter for parameter in watched if self._in_place.get(parameter, True)]
        return Perturbed(watched, in_place, self._scratch)

    def _find_unseen(self, trainable: Mapping[nn.Parameter, str], evaluate: Evaluate) -> None:
        """Audits parameters that take part for the first time; all are perturbed in place until that succeeds."""
        new = {parameter: name for parameter, name in trainable.items() if parameter not in self._in_place}
        unseen = audit(new, lambda: evaluate()[0]) if new else None
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

    def _find_readers(self, context: Perturbed, evaluate: Evaluate) -> tuple[nn.Module, ...] | None:
        """The modules that read the parameters of a context, found once for each set of them."""
        parameters = frozenset(context.perturbations).difference(context.in_place)
        if parameters and self.module is not None and parameters not in self._readers:
            self._readers[parameters] = find_readers(self.module, parameters, lambda: evaluate()[0])
        return self._readers.get(parameters)
