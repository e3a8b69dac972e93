"""Updates that wait in the cores of subspaces: adding them to the weights, drawing new subspaces, saving."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zolightning.directions.autocast import without_autocast
from zolightning.directions.basis import Basis
from zolightning.directions.dense import arithmetic
from zolightning.directions.shards import first_element, own_rows
from zolightning.kernels.compiled import chunk_size, chunks
from zolightning.messages import some
from zolightning.optim.momentum_transport import momentum_of, transport_momentum
from zolightning.optim.offload import add_offloaded, to_host
from zolightning.optim.precision import RESTS, State, add_tensor, as_contiguous
from zolightning.optim.record import StepRecord
from zolightning.optim.state_dicts import substitute_in_state_dicts
from zolightning.optim.subspace_bases import Matrix, SubspaceBases
from zolightning.rank_zero import rank_zero_info

_CHUNK = 2**20  # elements of a lift at a time, at least


class SubspaceWeights(SubspaceBases):
    """Abstract: keeps the updates of a matrix W, (m, n), in a core until they are *folded*, that is, added to W.

    The trained weight is ``W + left @ core @ right.T``, and losses are evaluated at and around that. Cores are fp32. A
    core is folded

    * at the end of each :meth:`step` if :attr:`fold_every_step` is set, which is the default. The stored weights are
      then the trained ones between any two steps, and may be read and written.
    * otherwise by :meth:`fold`, :meth:`resample` and :meth:`detach` only, which saves a pass over the weights at each
      step. Between these, stored weights must not be read or written, except through the module's ``state_dict()``,
      which always holds the trained ones. The optimizer's ``state_dict()`` holds the stored ones as well, so that a
      resumed run has the same bits.

    Both ways give the same weights up to rounding. Records count the folds before a step, so that a replay folds at the
    same steps. Under a Trainer, :class:`~zolightning.callbacks.ZerothOrder` chooses the way.

    Args:
        params, defaults: as of :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
        offload_low_words: keep the extra bits of half-precision matrices (2 bytes per bf16 weight, 4 per fp16 one) in
            host memory and move them to the device, piece by piece, when cores are folded. The bits are the same, at
            the price of a transfer each way per fold, so it is meant for rare folds (`fold_every_step` False). It may
            differ between a run and the checkpoint that it resumes.
        **common: as of :class:`~zolightning.optim.base.ZerothOrderOptimizer`.

    Attributes:
        recorded: in a replay, the given bases of the recorded run by their refresh index, which :meth:`resample` takes.

    Raises:
        ValueError: if `offload_low_words` is set and `update_precision` keeps nothing.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, offload_low_words: bool = False, **common: Any
    ) -> None:
        self.fold_every_step = True
        self.offload_low_words = offload_low_words
        self.recorded: dict[int, Mapping[nn.Parameter, Basis]] = {}
        self._offloaded: defaultdict[nn.Parameter, State] = defaultdict(dict)
        self._hooks: list[RemovableHandle] = []  # in the `state_dict()` of modules
        super().__init__(params, defaults, **common)
        if offload_low_words and self.update_precision == "native":
            raise ValueError(
                "`offload_low_words` is True, and with `update_precision` 'native' there are none. Set it to 'exact', "
                "or `offload_low_words` to False."
            )

    @property
    def momentum_kept(self) -> float | None:
        """Share of the momentum's squared norm that the last resampling kept; None if there was no momentum."""
        return self.param_groups[0].get("momentum_kept")

    def apply(self, record: StepRecord) -> None:
        if record.seed != self.param_groups[0]["seed"]:  # of another run: its bases are to be drawn here too
            self.fold()
            self._bases.clear()
            for group in self.param_groups:
                group["seed"] = record.seed
        while self.param_groups[0]["refresh"] < record.refresh:
            self.resample()
        if record.given and self.param_groups[0]["given"] != record.refresh:
            raise ValueError(
                f"Step {record.step} has bases that were given, and no record has these: put them in `recorded`."
            )
        if self.param_groups[0]["folds"] != record.folds:
            self.fold()
        for group in self.param_groups:
            group["folds"] = record.folds
        super().apply(record)

    @torch.no_grad()
    def resample(self, given: Mapping[nn.Parameter, Basis] | None = None) -> None:
        """Folds the cores into the weights, draws the next bases and expresses the momentum in them.

        Under a Trainer :class:`~zolightning.callbacks.SubspaceResampling` calls it. A plain training loop calls it
        itself, every 50 steps for example; otherwise all of training stays in the first subspace.

        Sets :attr:`momentum_kept`. Adam's second moments are kept as they are: that of ``g z`` is the second moment of
        g in any coordinates.

        Args:
            given: factors to use instead of drawn ones for some matrices, in any dtype. A method with a factor on one
                side then searches on the side that is given, and one with factors on both sides draws the other. Given
                factors stay until others are given, and are saved with the state.

        Raises:
            ValueError: if a matrix has momentum in a basis with a factor on the other side than the given one.
        """
        given = self.recorded.pop(self.param_groups[0]["refresh"] + 1, given or {})
        for parameter, basis in given.items():
            if self.sides == "both" or momentum_of(self.state.get(parameter, {})) is None:
                continue
            if (self.basis(parameter).left is None) != (basis.left is None):
                raise ValueError(
                    f"`{self.names[parameter]}` has momentum in a basis of the other side than the one given. Give "
                    "bases before the first step, or start a new run from the weights."
                )
        self.fold()
        moving = [  # frozen ones too: they may thaw
            (group, parameter, self.basis(parameter), momentum.view(self.basis(parameter).core_shape(matrix[:2])))
            for group in self.param_groups
            for parameter, matrix in self.split(group, frozen=True)[0].values()
            if (momentum := momentum_of(self.state.get(parameter, {}))) is not None
        ]
        self._bases.clear()
        for state in self.state.values():
            state.pop("left", None), state.pop("right", None)
        for parameter, basis in given.items():
            self._give(parameter, self._as_long_as_drawn(parameter, basis) if self.normalize_directions else basis)
        for group in self.param_groups:
            group["refresh"] += 1
            if given:
                group["given"] = group["refresh"]
        before = after = 0.0
        for group, parameter, old, core in moving:
            with without_autocast(parameter.device):
                state, new = self.state[parameter], self._draw(parameter)
                if group["anchor"]:
                    new = new.anchored(old, core, min(group["anchor"], *core.shape), self.unit)
                    state |= {side: f for side in ("left", "right") if (f := getattr(new, side)) is not None}
                self._bases[parameter] = new
                norms = transport_momentum(state, old, core, new, group["transport"])
            before, after = before + norms[0], after + norms[1]
        self.param_groups[0]["momentum_kept"] = after / before if before else None

    # Pending updates

    def core(self, parameter: nn.Parameter, matrix: Matrix) -> Tensor:
        """The core of a matrix, in the core shape of its basis, fp32 or wider; zeros if it had none."""
        state = self.state[parameter]
        if "core" not in state:
            shape = self.basis(parameter).core_shape(matrix[:2])
            state["core"] = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
        return state["core"]

    @torch.inference_mode(False)  # tensors that a validation made in inference mode could not be changed later
    @torch.no_grad()
    def fold(self) -> None:
        """Adds the updates in all cores to the stored weights, and counts that if there were any."""
        found = False
        for group in self.param_groups:
            for parameter, _ in self.split(group, frozen=True)[0].values():
                state = self.state.get(parameter, {})
                if "core" in state:
                    with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                        self._add_lift(weight, parameter, self._rests(parameter))
                    del state["core"]
                    found = True
        if found:
            torch.clear_autocast_cache()  # casts of the weights as they were
            for group in self.param_groups:
                group["folds"] += 1

    @property
    def has_pending(self) -> bool:
        """Whether any core holds updates that the stored weights lack."""
        return any("core" in state for state in self.state.values())

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        super().attach(module, evaluations_per_forward)
        for group in self.param_groups:
            thin = [f"{name} {m.rank}" for name, (_, m) in self.split(group)[0].items() if m.rank < group["rank"]]
            if thin:
                rank_zero_info(f"`rank` is {group['rank']}, and less in {len(thin)} thin matrices: {some(thin)}.")
        self._hooks += substitute_in_state_dicts(module, self.names, self._lacks_updates, self._folded)
        if self.fold_every_step:
            self.fold()  # cores of a checkpoint that was restored before

    def detach(self) -> None:
        super().detach()
        self.fold()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Drops what is in host memory as well."""
        parameters = list(parameters)
        super().release(parameters)
        if self.drops_left_state:
            for parameter in parameters:
                self._offloaded.pop(parameter, None)

    # Saving

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        return self._matrix_now(parameter) is None or name in (*RESTS, "base")

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; for matrices with a core also ``base``, the stored weight that it adds to."""
        saved = super().state_dict()
        for index, parameter in self.numbered(saved):
            entries = saved["state"].get(index, {}) | self._offloaded.get(parameter, {})
            if "core" in entries:
                entries["base"] = parameter.detach()
            if entries:
                saved["state"][index] = entries
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores a run, including the stored weights of matrices with a core."""
        state, apart = dict(state_dict["state"]), {}  # apart: tensors as large as weights, kept off the device
        for index, parameter in self.numbered(state_dict):
            entries = dict(state.get(index, {}))
            is_offloaded = self.offload_low_words and self.matrix(parameter, 1) is not None
            names = {"base", *RESTS} if is_offloaded else {"base"}
            apart[parameter] = {name: entries.pop(name) for name in names & entries.keys()}
            state[index] = entries
        super().load_state_dict(state_dict | {"state": state})
        self._bases.clear()
        for parameter, entries in apart.items():
            if "base" in entries:
                own = own_rows(parameter)
                own.copy_(entries.pop("base").view(own.shape))
            self._offloaded[parameter] = {name: to_host(rest, parameter.device) for name, rest in entries.items()}
        if self.fold_every_step and self.attached:  # else the bases' names may not be known yet
            self.fold()

    def needs_whole(self) -> Iterator[tuple[str, object, str]]:
        yield from super().needs_whole()
        if self.offload_low_words:
            yield "offload_low_words", True, "False"

    def host_bytes(self) -> int:
        return sum(rest.nbytes for state in self._offloaded.values() for rest in state.values())

    def _lacks_updates(self, parameter: nn.Parameter) -> bool:
        return "core" in self.state.get(parameter, {})

    @torch.no_grad()
    def _folded(self, parameter: nn.Parameter) -> Tensor:
        folded = parameter.detach().clone()
        with as_contiguous(folded, self.slices.get(parameter)) as weight:
            rest = {name: value.clone() for name, value in self._rests(parameter).items() if name in RESTS}
            self._add_lift(weight, parameter, rest)
        return folded

    def _add_lift(self, weight: Tensor, parameter: nn.Parameter, state: State) -> None:
        """Adds the lift of a parameter's core to its weight, or to this rank's rows of it."""
        with without_autocast(weight.device):
            one, other = self.basis(parameter).factors(self.state[parameter]["core"])
            rows = max(_CHUNK, chunk_size(weight)) // len(other)
            first = first_element(parameter)
            pieces = _pieces(one, other, range(first, first + weight.numel()), rows)
            if self.offload_low_words:
                add_offloaded(weight, state, pieces, self.update_precision)
                return
            for start, delta in pieces:
                add_tensor(weight, state, delta, self.update_precision, start=start)

    def _rests(self, parameter: nn.Parameter) -> State:
        """The mapping that holds the extra bits of a half-precision matrix."""
        return self._offloaded[parameter] if self.offload_low_words else self.state[parameter]

    def rests(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        return {**super().rests(parameter), **self._offloaded.get(parameter, {})}


def _pieces(one: Tensor, other: Tensor, elements: range, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Computes some elements of ``one @ other.T`` in flat pieces, each with the index of its first element.

    `rows` rows are multiplied at a time, at the same places whichever elements are wanted, because the rounding of a
    row may depend on the rows that are multiplied with it.
    """
    columns = len(other)
    for part in chunks(len(one), max(1, rows)):
        start, stop = (min(max(row * columns, elements.start), elements.stop) for row in (part.start, part.stop))
        if start < stop:
            product = (one[part] @ other.T).flatten()
            yield start - elements.start, product[start - part.start * columns : stop - part.start * columns]
