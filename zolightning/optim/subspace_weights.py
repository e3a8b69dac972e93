"""Weights of which a part is pending in the cores of subspaces: resampling, folding, saving."""

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
    """Abstract: with ``W`` the stored weight, (m, n), a step's losses are those of ``W + lift(core)`` and around it.

    Updates gather in the core, in fp32, and are *folded*, their lift added to the stored weight:

    * at the end of each :meth:`step`, where :attr:`fold_every_step` is set, as it is unless somebody says otherwise.
      Stored weights are then the trained ones between any two steps, for whoever reads or writes them.
    * else by :meth:`fold`, :meth:`resample` and :meth:`detach`, which saves a pass over the weights at each step.
      Nobody may then read or write weights in between, but by ``state_dict()``, which has them folded at any time;
      the optimizer's own ``state_dict()`` has the stored ones beside, so that a resumed run goes on bit for bit.

    Both ways lead to the same weights up to the rounding of sums. Records count the folds before a step, so that a
    replay folds at the same steps. Under a Trainer :class:`~zolightning.callbacks.ZerothOrder` chooses the way.

    Args:
        params, defaults: of :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
        offload_low_words: keep in host memory, pinned where weights are on a GPU, what completes half-precision
            matrices for exact updates (2 bytes a bf16 weight, 4 an fp16 one). It is on the device piece by piece, while
            cores are folded: the same bits, for one transfer each way a fold. Of use where folds are rare, which needs
            `fold_every_step` to be False. A run may go on from a checkpoint of one with the other setting.
        **common: of :class:`~zolightning.optim.base.ZerothOrderOptimizer`.

    Attributes:
        recorded: bases by their refresh index, which take the place of those that :meth:`resample` is given, or is not:
            of a run that is replayed.

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
        self._hooks: list[RemovableHandle] = []  # in whoever saves weights
        super().__init__(params, defaults, **common)
        if offload_low_words and self.update_precision == "native":
            raise ValueError(
                "`offload_low_words` is True, and with `update_precision` 'native' there are none. Set it to 'exact', "
                "or `offload_low_words` to False."
            )

    @property
    def momentum_kept(self) -> float | None:
        """Share of the momentum's squared norm that the last resampling kept; None where there was none."""
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
        """Folds the cores into the weights, draws the next bases and takes the momentum along.

        Without a Trainer it is for the training loop to call, before the step of every 50th batch, say; otherwise
        all of training stays in the first subspace. Under a Trainer
        :class:`~zolightning.callbacks.SubspaceResampling` does.

        ``momentum_kept`` is then the share of its squared norm that the momentum keeps as a matrix; None where there
        is none. Adam's second moments stay as they are: those of ``g z`` are that of g, in whatever coordinates.

        Args:
            given: factors of matrices that are not to be drawn from now on, in any dtype. A method with a factor on
                one side searches on the side that is given; one with two draws the other. They stay until others are
                given, and are saved with the state.

        Raises:
            ValueError: if a matrix has momentum in a basis of the other side.
        """
        given = self.recorded.pop(self.param_groups[0]["refresh"] + 1, given or {})
        for parameter, basis in given.items():
            if self.sides == "both" or momentum_of(self.state.get(parameter, {})) is None:
                continue
            if (self.basis(parameter).left is None) != (basis.left is None):
                raise ValueError(
                    f"`{self._names[parameter]}` has momentum in a basis of the other side than the one given. Give "
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
        """What is pending of a matrix: of the basis' core shape, fp32 or wider; made of zeros where nothing is."""
        state = self.state[parameter]
        if "core" not in state:
            shape = self.basis(parameter).core_shape(matrix[:2])
            state["core"] = torch.zeros(shape, dtype=arithmetic(parameter.dtype), device=parameter.device)
        return state["core"]

    @torch.inference_mode(False)  # a validation runs in it, and tensors of the state that are made there stay in it
    @torch.no_grad()
    def fold(self) -> None:
        """Adds the lifts of all cores to the stored weights, and counts it where there are any."""
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
        """Whether stored weights lack updates."""
        return any("core" in state for state in self.state.values())

    def attach(self, module: nn.Module, evaluations_per_forward: int = 1) -> None:
        super().attach(module, evaluations_per_forward)
        for group in self.param_groups:
            thin = [f"{name} {m.rank}" for name, (_, m) in self.split(group)[0].items() if m.rank < group["rank"]]
            if thin:
                rank_zero_info(f"`rank` is {group['rank']}, and less in {len(thin)} thin matrices: {some(thin)}.")
        self._hooks += substitute_in_state_dicts(module, self._names, self._lacks_updates, self._folded)
        if self.fold_every_step:
            self.fold()  # what a checkpoint, restored before, has pending

    def detach(self) -> None:
        super().detach()
        self.fold()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """Also what is in host memory."""
        parameters = list(parameters)
        super().release(parameters)
        if self.drops_left_state:
            for parameter in parameters:
                self._offloaded.pop(parameter, None)

    # Saving

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        is_vector = self.matrix(parameter, self._group_of(parameter)["rank"]) is None
        return is_vector or name in (*RESTS, "base")

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's; where updates are pending also the stored weights, ``base``, that they add to."""
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
        """Restores all of a run, the stored weights too where the checkpoint's module has them folded."""
        state, apart = dict(state_dict["state"]), {}  # apart: what would be a second model on the device
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
        """Where that is kept which completes a half-precision matrix."""
        return self._offloaded[parameter] if self.offload_low_words else self.state[parameter]

    def _kept(self, parameter: nn.Parameter) -> Mapping[str, Any]:
        return {**super()._kept(parameter), **self._offloaded.get(parameter, {})}


def _pieces(one: Tensor, other: Tensor, elements: range, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Some elements of ``one @ other.T``, flat, each piece after its place among them.

    So many rows are multiplied at a time, and the same ones whichever elements are wanted: a product may round a row in
    another way beside others.
    """
    columns = len(other)
    for part in chunks(len(one), max(1, rows)):
        start, stop = (min(max(row * columns, elements.start), elements.stop) for row in (part.start, part.stop))
        if start < stop:
            product = (one[part] @ other.T).flatten()
            yield start - elements.start, product[start - part.start * columns : stop - part.start * columns]
