"""Checks a method of one's own for what checkpoints, ledgers, scopes and half precision rely on."""

import copy
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zolightning.directions.slices import Slice
from zolightning.optim.base import Method, ZerothOrderOptimizer
from zolightning.optim.probing import Probe
from zolightning.optim.record import StepRecord
from zolightning.optim.settings import constructor_arguments, settings_of
from zolightning.optim.subspace import SubspaceOptimizer

_SMALL = 1e-4  # a factor of learning rates, with which updates are far below the spacing of bfloat16 numbers
_LOST = 0.1  # the share of such updates that a method may lose: rounded bases lose 0.02 of them
_ROUNDING = 1e-6  # of a loss in float64, far below the change that a perturbation makes: 1e-3
_RATES = (1.0, 0.5, 2.0)  # factors of the learning rate, in turn, as a scheduler might set them


def check_method(method: Method, steps: int = 8) -> None:
    """Checks that a method does what the rest of the package takes for granted, on a network of 80 numbers.

    That an estimate moves nothing and evaluates the loss where :meth:`perturbations` says; that one seed gives one run;
    that a run that is resumed, and one that is replayed from its records, ends with the bits of one that was not
    interrupted; that checkpoints hold all of the constructor's arguments; that frozen parameters, blocks at rest and
    what is outside of a slice stay as they are; that updates of bfloat16 weights are not lost to rounding; that the
    loss falls. It takes a second or two.

    Args:
        method: makes the method, given parameters, such as ``partial(MyMethod, lr=1e-2)``. The rate has to suit weights
            of unit variance and a loss whose curvature is about 1: 1e-2 for MeZO, and for methods whose step does not
            depend on the size of the gradient.
        steps: how many steps the runs have; as many as the method needs to do everything that it does.

    Raises:
        ValueError: naming the method, what it does differently, and what to do instead.

    Example::

        check_method(partial(MyMethod, lr=1e-2, num_queries=4))
    """
    run = _Run(method)
    try:
        run.go(steps)
        _check_seed(run, _Run(method).go(steps))
        _check_estimate(method, steps)
        _check_resuming(run, method)
        _check_replay(run, method)
        _check_settings(run.optimizer)
        _check_what_rests(method, steps)
        _check_half_precision(run, method)
        _check_descent(method, 10 * steps)
    except _Found as found:
        raise ValueError(f"{type(run.optimizer).__name__}: {found}") from None


class _Found(Exception):
    """Something that a method does differently."""


class _Network(nn.Module):
    """Reads a table by rows, two matrices and a vector; its numbers are exact in bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(5, 6), nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).bfloat16())
        self.to(dtype)

    def forward(self, rows: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.table(rows))))


def _loss_of(network: _Network) -> Tensor:
    rows = torch.tensor([0, 3, 1, 4, 2, 0, 1, 3])
    found = network(rows)
    wide = torch.promote_types(found.dtype, torch.float32)
    return F.mse_loss(found.to(wide), torch.eye(3, dtype=wide)[rows % 3])


class _Run:
    """A method and a network that it trains."""

    def __init__(self, method: Method, dtype: torch.dtype = torch.float32, evaluations_per_forward: int = 1) -> None:
        self.network = _Network(dtype)
        self.parameters = dict(self.network.named_parameters())
        self.optimizer = method(self.network.named_parameters())
        self.optimizer.attach(self.network, evaluations_per_forward)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.records: list[StepRecord] = []

    def estimate(self) -> StepRecord:
        """The first half of a step, at a rate of its own; a subspace method draws new subspaces in between."""
        step = len(self.records)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * _RATES[step % len(_RATES)]
        if step == 2 and isinstance(self.optimizer, SubspaceOptimizer):
            self.optimizer.resample()
        self.records.append(self.optimizer.estimate(partial(_loss_of, self.network)))
        return self.records[-1]

    def go(self, steps: int) -> "_Run":
        """Takes steps up to this number."""
        while len(self.records) < steps:
            self.estimate()
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def _different(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first parameter with different values, in backticks; empty if there is none."""
    return next((f"`{name}`" for name in expected if not torch.equal(found[name], expected[name])), "")


def _check_estimate(method: Method, steps: int) -> None:
    run = _Run(method, torch.float64)
    optimizer, estimator = run.optimizer, run.optimizer.estimator
    stacked = None if estimator.why_unbatched else _Run(method, torch.float64, evaluations_per_forward=2)
    for done in range(1, steps + 1):
        before, probes = run.weights(), estimator.probes(optimizer.num_queries)
        record = run.estimate()
        if name := _different(run.weights(), before):
            raise _Found(f"an estimate changed {name}. Move weights in `update` only.")
        if len(record.losses) != len(probes) or len(record.projected_grads) != optimizer.num_queries:
            raise _Found(
                f"{type(estimator).__name__} gave {len(record.losses)} losses and {len(record.projected_grads)} "
                f"projected gradients, but a ledger has room for {len(probes)} (one for each of its `probes`) and "
                f"{optimizer.num_queries} (`num_queries`). Give as many."
            )
        written = [_loss_at(run, probe) for probe in probes]
        optimizer.step()
        together = stacked.go(done).records[-1].losses if stacked else record.losses
        for probe, *losses in zip(probes, written, record.losses, together, strict=True):
            if max(losses) - min(losses) > _ROUNDING * (1 + abs(losses[0])):
                raise _Found(
                    f"the loss of query {probe.query} and sign {probe.sign} is {losses[0]} at the weights that "
                    f"`add_to` of its perturbations writes, but was {losses[1]} in the step, and {losses[2]} with "
                    "`evaluations_per_forward` 2: `add_to_rows`, `opposite`, `is_opposite`, `add_both` and all other "
                    "methods of a perturbation must agree."
                )


def _loss_at(run: _Run, probe: Probe) -> float:
    """The loss at weights that perturbations have written to a copy."""
    changes = run.optimizer.perturbations(*probe) if probe.sign else run.optimizer.offsets()
    moved = copy.deepcopy(run.network)
    for own, parameter in zip(moved.parameters(), run.network.parameters(), strict=True):
        if parameter in changes:
            changes[parameter].add_to(parameter.detach(), own.data)
    with torch.no_grad():
        return _loss_of(moved).item()


def _check_seed(run: _Run, other: _Run) -> None:
    if name := _different(other.weights(), run.weights()):
        raise _Found(
            f"two runs with the same seed end with different values of {name}. Draw by `self.directions`, or as a "
            "function of `record.seed` and `record.step`, not from torch's generators."
        )


def _check_resuming(run: _Run, method: Method) -> None:
    steps, stopped = len(run.records), _Run(method)
    for done in range(1, steps):
        saved = io.BytesIO()
        torch.save((stopped.go(done).network.state_dict(), stopped.optimizer.state_dict()), saved)
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=False)
        resumed = _Run(method)
        resumed.network.load_state_dict(weights)
        resumed.optimizer.load_state_dict(state)
        resumed.records = stopped.records[:]
        if name := _different(resumed.go(steps).weights(), run.weights()):
            raise _Found(
                f"a run resumed after step {done} of {steps} ends with different values of {name} from one that was "
                "not stopped. What a step needs from earlier ones must be in `self.state[parameter]` or in "
                f"`self.param_groups`, which checkpoints hold{_changed_attributes(stopped.optimizer, method)}."
            )


def _changed_attributes(optimizer: ZerothOrderOptimizer, method: Method) -> str:
    """Attributes whose plain values differ from the initial ones, in words; empty if there are none."""
    first = vars(method([nn.Parameter(torch.zeros(1, 1))]))
    names = [
        f"`{name}`"
        for name, value in vars(optimizer).items()
        if isinstance(value, Tensor)
        or (isinstance(value, bool | int | float | str | tuple) and value != first.get(name))
    ]
    return f", not in attributes: {', '.join(names)}" if names else ""


def _check_replay(run: _Run, method: Method) -> None:
    replayed = _Run(method)
    for record in run.records:
        replayed.optimizer.apply(record)
    replayed.optimizer.fold()
    if name := _different(replayed.weights(), run.weights()):
        raise _Found(
            f"its records, applied to the initial weights, give different values of {name} from the run's. `update` "
            "may read only `record`, `self.state` and what it keeps itself in `self.param_groups`: `record.lr`, not "
            "the `lr` of a group, and nothing that an estimate leaves in an attribute."
        )


def _check_settings(optimizer: ZerothOrderOptimizer) -> None:
    kept = settings_of(optimizer).keys() | {"self", "params", "defaults", "seed", "offload_low_words"}
    for name in sorted(constructor_arguments(type(optimizer)) - kept):
        raise _Found(
            f"its argument `{name}` is neither a hyperparameter (in `defaults`) nor an attribute of that name, so a "
            "run could be resumed with a different value unnoticed. Keep it under its name."
        )


def _check_what_rests(method: Method, steps: int) -> None:
    """What is frozen, at rest, or outside of a slice does not move, and moves on when it is its turn."""
    frozen, resting, sliced = _Run(method), _Run(method), _Run(method)
    before = frozen.weights()["hidden.weight"]
    frozen.parameters["hidden.weight"].requires_grad_(False)
    resting.optimizer.set_blocks([[resting.parameters["hidden.weight"]], [resting.parameters["table.weight"]]])
    resting.optimizer.activate([1])
    sliced.optimizer.restrict({sliced.parameters["hidden.weight"]: Slice(0, torch.tensor([0, 2, 3]))})
    for run, what, kept in (
        (frozen, "frozen (`requires_grad=False`)", slice(None)),
        (resting, "at rest (`activate`)", slice(None)),
        (sliced, "outside of its slice (`restrict`)", [1, 4]),
    ):
        with _named(f"`hidden.weight` was {what}"):
            run.go(steps)
        if not torch.equal(run.weights()["hidden.weight"][kept], before[kept]):
            raise _Found(
                f"it moved the part of `hidden.weight` that is {what}. Go over `self.named(group)`, `self.trainable()` "
                "or `self.directions(group, ...)`, and write by `as_contiguous(parameter, self.slices.get(parameter))`."
            )
    for block in (0, 1):
        resting.optimizer.activate([block])
        with _named("a block whose state was dropped when it came to rest moved again"):
            resting.go(len(resting.records) + 2)


@contextmanager
def _named(situation: str) -> Iterator[None]:
    """Adds the situation in which it was raised to an error of the method's own."""
    try:
        yield
    except Exception as error:
        error.add_note(f"(Raised in `check_method`, while {situation}.)")
        raise


def _check_half_precision(run: _Run, method: Method) -> None:
    if run.optimizer.update_precision != "exact":
        return
    wide, narrow = _Run(method), _Run(method, torch.bfloat16)
    before = wide.weights()
    for record in run.records:
        small = replace(record, lr=tuple(_SMALL * lr for lr in record.lr))
        wide.optimizer.apply(small)
        narrow.optimizer.apply(small)
    wide.optimizer.fold()
    narrow.optimizer.fold()
    for (name, parameter), other in zip(wide.network.named_parameters(), narrow.network.parameters(), strict=True):
        moved = parameter.detach() - before[name]
        lost = narrow.optimizer.completed(other).view_as(moved) - parameter.detach()
        if lost.norm() > _LOST * moved.norm():
            raise _Found(
                f"small updates of a bfloat16 weight, `{name}`, are lost to rounding. Add them by `add_direction` or "
                "`add_tensor` of `zolightning.optim.precision`, with the parameter's state."
            )


def _check_descent(method: Method, steps: int) -> None:
    run = _Run(method)
    with torch.no_grad():
        before, after = _loss_of(run.network).item(), _loss_of(run.go(steps).network).item()
    if not after < before:
        raise _Found(
            f"the loss rose from {before:.3g} to {after:.3g} in {steps} steps. Do steps go along the directions that "
            "losses were evaluated on, and against the gradient? If so, choose another `lr`."
        )
