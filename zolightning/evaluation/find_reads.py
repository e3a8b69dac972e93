"""Finds, before the first step, which parameters torch's functions do not see, and which modules read the others."""

from collections import Counter
from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn

from zolightning.directions.dense import directions
from zolightning.directions.shards import own_rows
from zolightning.directions.trials import FlippedBit, Unchanged
from zolightning.evaluation.gathered_weights import Gathered
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.replaced import StandIn
from zolightning.evaluation.scratch import Scratch
from zolightning.rank_zero import rank_zero_warn

# The modules that read parameters, each with those that it owns or has read in its own forward
Readers = dict[nn.Module, frozenset[nn.Parameter]]

# Kernels that add in varying order differ in the last bits, which is small compared with what a change itself does.
_TOLERANCE = 1e-2
_TRIAL_EPS = 1e-2  # above the spacing of bf16 numbers near 1, where the gains of norms lie


@torch.no_grad()
def find_unseen(parameters: Iterable[nn.Parameter], evaluate: Callable[[], Tensor]) -> set[nn.Parameter] | None:
    """The parameters that :class:`Perturbed` must perturb in place, found with three to five evaluations.

    The loss is evaluated at the stored parameters, once with all of them changed by :class:`Perturbed`, and once with
    all of them changed in place by the same amount. In the last case they are still read through scratch memory,
    because products of pieces may round differently, which changes the losses of a large network as much as the change
    itself does. Parameters that no function has read are returned. If the last two losses differ nevertheless,
    something has read a parameter unseen, and all are returned. But if the loss at the stored parameters differs too
    when it is evaluated again, it depends on something else, which a warning says.

    Args:
        parameters: the parameters to be perturbed.
        evaluate: computes the loss of one batch, a scalar; must be deterministic.

    Returns:
        The parameters, or None if the loss is not finite, so that nothing can be compared.

    Raises:
        ValueError: if the evaluation writes to a parameter.
    """
    parameters = list(parameters)
    before = [_mark(parameter) for parameter in parameters]
    loss = evaluate()
    for parameter, mark in zip(parameters, before, strict=True):
        if _mark(parameter) != mark:
            raise written_to(f"A parameter of shape {tuple(parameter.shape)}")
    if not torch.isfinite(loss):
        return None
    flip, scratch = FlippedBit(), Scratch()
    with Perturbed(dict.fromkeys(parameters, flip), scratch=scratch) as exchanged:
        loss_exchanged = evaluate()
    unseen = {p for p in parameters if id(p) not in exchanged.seen}
    with Perturbed(dict.fromkeys(parameters, flip), unseen, scratch):
        loss_exchanged = evaluate() if unseen else loss_exchanged
    unchanged = Perturbed({p: Unchanged() for p in parameters if p not in unseen}, scratch=scratch)
    loss_in_place = _flipped([parameter.detach() for parameter in parameters], evaluate, unchanged)
    if _agree(loss, loss_exchanged, loss_in_place):
        return unseen
    again = evaluate()
    if (again - loss).abs() <= _TOLERANCE * (loss_in_place - loss).abs():
        return set(parameters)
    rank_zero_warn(
        f"The loss is {float(loss):g}, and evaluated again at the same weights {float(again):g}: such differences are "
        "noise in the gradients. All evaluations of a step see the same batch, random numbers of torch, NumPy and "
        "Python, and state of the module. Other objects (a simulator, an iterator, a generator inside one of them) the "
        "loss itself has to set back before it uses them."
    )
    return unseen


def written_to(which: str) -> ValueError:
    """The error that evaluations write to a parameter that trains."""
    return ValueError(
        f"{which} is changed by the evaluation of the loss itself (an optimizer's step in it, a weight that is "
        "normalized or clamped, nn.Embedding's `max_norm`), so that losses cannot be compared. Change it between steps "
        "(`on_train_batch_start`), or freeze it; if the network's first forward initializes it, run one before the fit."
    )


def _mark(parameter: nn.Parameter) -> tuple[int, int]:
    """Numbers that change when it is written to; the sum of its bits also through ``.data``, which torch misses."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter._version, int(parameter.detach().view(integer).sum(dtype=torch.int64))


@torch.no_grad()
def find_unread(
    parameters: Iterable[nn.Parameter], gathered: Gathered, evaluate: Callable[[], Tensor]
) -> set[nn.Parameter] | None:
    """The sharded parameters that no loss reads, found with three evaluations.

    A sharded parameter cannot be perturbed in place, so :class:`Perturbed` must see all reads that the loss depends on.

    Args:
        parameters: the parameters to be perturbed, as they are stored.
        gathered: the tensors that are read in their place.
        evaluate: computes the sum of all ranks' losses; must be deterministic.

    Returns:
        The parameters, or None if the loss is not finite, so that nothing can be compared.

    Raises:
        ValueError: if the loss depends on parameters that are read unseen.
    """
    parameters = list(parameters)
    loss = evaluate()
    if not torch.isfinite(loss):
        return None
    read, scratch = {gathered.read(parameter): parameter for parameter in parameters}, Scratch()
    with Perturbed(dict.fromkeys(read, FlippedBit()), scratch=scratch) as exchanged:
        loss_exchanged = evaluate()
    unchanged = Perturbed(dict.fromkeys(read, Unchanged()), scratch=scratch)
    loss_in_place = _flipped([own_rows(parameter) for parameter in parameters], evaluate, unchanged)
    if not _agree(loss, loss_exchanged, loss_in_place):
        raise ValueError(
            "The loss reads parameters where torch's Python functions do not see it (a compiled network, TorchScript, "
            "custom kernels). They are sharded over ranks, so that they cannot be perturbed in place. Remove that, or "
            "use a strategy under which every rank holds all of them ('zo_ddp')."
        )
    return {parameter for whole, parameter in read.items() if id(whole) not in exchanged.seen}


def _flipped(tensors: Iterable[Tensor], evaluate: Callable[[], Tensor], context: Perturbed) -> Tensor:
    """The loss within `context` while all tensors are changed in place; they are restored afterwards."""
    flip, flipped = FlippedBit(), []
    try:
        for tensor in tensors:
            flip.flip_(tensor)
            flipped.append(tensor)
        torch.clear_autocast_cache()
        with context:
            return evaluate()
    finally:
        for tensor in flipped:
            flip.flip_(tensor)
        torch.clear_autocast_cache()


def _agree(loss: Tensor, loss_exchanged: Tensor, loss_in_place: Tensor) -> Tensor:
    return (loss_exchanged - loss_in_place).abs() <= _TOLERANCE * (loss_in_place - loss).abs()


@torch.no_grad()
def find_readers(
    module: nn.Module,
    parameters: Set[nn.Parameter],
    evaluate: Callable[[], Tensor],
    read: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> Readers | None:
    """The submodules that own some of `parameters`, each with those that it may read, if nothing else reads any.

    Found by two evaluations along one random direction, one of them with all functions watched: their losses must have
    the same bits, and each parameter must be read the same number of times.

    Args:
        module: the module that owns all of the parameters.
        parameters: parameters as forwards read them, none of which :func:`find_unseen` has returned.
        evaluate: computes the loss of one batch, a scalar; must be deterministic.
        read: maps a parameter that the module owns to the tensor that forwards read in its place.

    Returns:
        The modules and their parameters; None if parameters are read elsewhere too.
    """
    owned = {
        m: {read(p) for p in m._parameters.values() if p is not None}
        for m in module.modules()
        if not isinstance(m, torch.jit.ScriptModule)
    }
    owners = tuple(owner for owner, own in owned.items() if not parameters.isdisjoint(own))
    named = {name: read(p) for name, p in module.named_parameters() if read(p) in parameters}
    # A weighted sum of four directions, because flipped bits do not move zeros and equal changes of a few elements
    # cancel in a sum; the small integers of a single direction cancel in a mean of four elements once in ten times.
    changes = directions(
        named, seed=0, step=0, coefficients={q: _TRIAL_EPS * 0.7**q for q in range(4)}, kind="gaussian"
    )
    scratch, moved = Scratch(), {named[name]: change for name, change in changes.items()}
    everywhere = Perturbed(moved, (), scratch)
    everywhere.seen = reads = _Reads()
    with everywhere:
        loss = evaluate()
    in_owners = _ByReader(moved, (), scratch, owners)
    with in_owners:
        same_loss = evaluate()
    seen = in_owners.seen_in
    if sum(seen.values(), Counter()) != reads.counts or not torch.equal(loss, same_loss):
        return None
    return {owner: frozenset(p for p in parameters if id(p) in seen[owner] or p in owned[owner]) for owner in owners}


class _Reads(set[int]):
    """The ids of the parameters that functions have read, and how often each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def add(self, key: int) -> None:
        super().add(key)
        self.counts[key] += 1


class _ByReader(Perturbed):
    """Counts the reads of parameters in the forward of each reader, without those of other readers inside it.

    Not by hooks: nn.TransformerEncoderLayer has a forward in C++ that reads parameters unseen, and where it finds hooks
    it calls its submodules instead.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen_in: dict[nn.Module, Counter[int]] = {reader: Counter() for reader in self.readers or ()}

    def _forward_of(self, reader: nn.Module) -> Callable[..., Any]:
        own = super()._forward_of(reader)

        def forward(_: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outside, self.seen = self.seen, (reads := _Reads())
            try:
                return own(*args, **kwargs)
            finally:
                self.seen_in[reader] += reads.counts
                self.seen = outside

        return StandIn(forward, reader.forward)
