"""Remembers where losses read each parameter, which is found out in the first step that involves the parameter."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter

from torch import Tensor, nn

from zolightning.directions.opposite import Opposite
from zolightning.evaluation.find_reads import Readers, find_readers, find_unread, find_unseen, written_to
from zolightning.evaluation.gathered_weights import Gathered
from zolightning.evaluation.perturbed import Perturbations, Perturbed
from zolightning.evaluation.scratch import Scratch
from zolightning.messages import counted, some
from zolightning.rank_zero import rank_zero_warn

Names = Mapping[nn.Parameter, str]

_version = attrgetter("_version")  # how often a tensor was written to, as far as torch counts it: not through `.data`


class KnownReads:
    """Makes the contexts in which losses see perturbed parameters, and remembers where these are read.

    Args:
        module: the module that owns the parameters; None for parameters without a module.

    Attributes:
        gathered: the tensors that forwards read in place of sharded parameters.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.gathered = Gathered(nn.Module() if module is None else module)
        self._module = module
        self._scratch = Scratch()
        # Parameters that have been tried: those whose reads torch functions see, and the others. They are compared with
        # sets and dictionaries of parameters, which keep their members' hashes: hashing a tensor calls Python.
        self._seen: set[nn.Parameter] = set()
        self._unseen: set[nn.Parameter] = set()
        self._readers: dict[frozenset[nn.Parameter], Readers | None] = {}  # of the parameters that have been tried

    @property
    def has_unseen(self) -> bool:
        """Whether some parameters are perturbed in place."""
        return bool(self._unseen)

    def knows(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether all of them have been tried."""
        return set(parameters) <= self._seen | self._unseen

    def forget(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Forgets where some parameters, or all of them, are read."""
        self._readers.clear()
        forgotten = self._seen | self._unseen if parameters is None else set(parameters)
        self._seen -= forgotten
        self._unseen -= forgotten

    def are_outdated(self, unread: Sequence[nn.Parameter], trainable: Iterable[nn.Parameter]) -> bool:
        """Whether what is known is outdated, because a step has not read parameters, `unread`, that earlier ones have.

        Raises:
            RuntimeError: if they are sharded, because other ranks would not know that reads have to be found out again.
        """
        if unread and self.gathered and self.knows(trainable):
            raise RuntimeError(
                f"{len(unread)} parameters have been read by the losses of earlier steps but not by those of this one, "
                f"of shape {some([str(tuple(parameter.shape)) for parameter in unread])}. If parameters are sharded "
                "over ranks, each step must read the same ones."
            )
        # Sharded ones that are not known: the loss was not finite, so that it was not found out which are read at all.
        return bool(unread) and not self.gathered

    @contextmanager
    def unwritten(self, parameters: Names) -> Iterator[None]:
        """A context for a step's evaluations, which must not write to the parameters that train, as some may do late.

        Raises:
            ValueError: at its end, if they have; except through ``.data``, for which only the first step is looked at.
        """
        before = list(map(_version, parameters))
        yield
        if self.gathered or list(map(_version, parameters)) == before:
            return
        for (parameter, name), version in zip(parameters.items(), before, strict=True):
            if parameter in self._seen and parameter._version != version:  # others are perturbed in place
                raise written_to(f"`{name}`")

    def contexts(
        self, trainable: Names, resting: Names, perturbations: Sequence[Perturbations], loss: Callable[[], Tensor]
    ) -> list[Perturbed]:
        """A context for each evaluation of a step.

        Parameters that are new are tried; until that succeeds, which takes a finite loss, all are perturbed in place.

        Args:
            trainable: the parameters that train, and their names.
            resting: other parameters that train in other steps, or are moved, and their names.
            perturbations: the perturbed parameters of each evaluation.
            loss: evaluates the batch's loss, a scalar.
        """
        self._find_unseen({**trainable, **resting}, loss)
        found: list[Perturbed] = []
        by_changes: dict[int, Perturbed] = {}  # by the id of what an evaluation changes
        for changes in perturbations:
            plus = by_changes.get(id(changes.of)) if isinstance(changes, Opposite) else None
            if plus is None:
                context = by_changes[id(changes)] = self._perturbed(trainable, changes)
            else:
                context = Perturbed(Opposite(plus.perturbations), plus.in_place, self._scratch)
            found.append(context)
        readers = self._find_readers(found[0], resting, loss)
        for context in found:
            context.readers = readers
        return found

    def _find_unseen(self, parameters: Names, loss: Callable[[], Tensor]) -> None:
        if self.knows(parameters):
            return
        new = {p: name for p, name in parameters.items() if p not in self._seen and p not in self._unseen}
        if self.gathered:
            unseen = find_unread(new, self.gathered, lambda: self.gathered.sum(loss()))
        else:
            unseen = find_unseen(new, loss)
        if unseen is None:
            return
        self._seen |= new.keys() - unseen
        self._unseen |= new.keys() & unseen
        if unseen and not self.gathered:
            names = some([name for parameter, name in new.items() if parameter in unseen])
            rank_zero_warn(
                f"{counted(len(unseen), 'parameter is', 'parameters are')} unused or read where torch's Python "
                "functions do not see it, and perturbed in place from a copy, which costs their size in memory: "
                f"{names}. Freeze those that are unused: they move at random."
            )

    def _perturbed(self, trainable: Iterable[nn.Parameter], perturbations: Perturbations) -> Perturbed:
        watched: Perturbations = {**dict.fromkeys(trainable), **perturbations}
        if self.gathered:
            read = {self.gathered.read(p): change for p, change in watched.items() if p not in self._unseen}
            return Perturbed(read, (), self._scratch)
        unseen = set(watched) - self._seen
        in_place = [parameter for parameter in watched if parameter in unseen] if unseen else []
        return Perturbed(watched, in_place, self._scratch)

    def _find_readers(
        self, context: Perturbed, resting: Iterable[nn.Parameter], loss: Callable[[], Tensor]
    ) -> tuple[nn.Module, ...] | None:
        """The modules that read the parameters of a context, found once for these and all resting ones."""
        parameters = frozenset(context.perturbations).difference(context.in_place)
        read = self.gathered.read
        tried = parameters.union(read(p) for p in resting if p in self._seen)
        if parameters and self._module is not None and tried not in self._readers:
            self._readers[tried] = find_readers(self._module, tried, loss, read)
        readers = self._readers.get(tried)
        if readers is None or parameters == tried:
            return None if readers is None else tuple(readers)
        return tuple([module for module, read in readers.items() if not parameters.isdisjoint(read)])
