"""The weights of a subspace method: the bases in which they are searched, and updates that wait in cores."""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from zolightning.checks import require_choice
from zolightning.directions.autocast import without_autocast
from zolightning.directions.basis import Basis, Sides
from zolightning.directions.dense import compute_dtype
from zolightning.directions.low_rank import LowRank
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.shards import first_element, own_rows
from zolightning.optim.base import ZerothOrderOptimizer
from zolightning.optim.bases import ANCHORED, GIVEN, BasisKind, Matrix, require_factors
from zolightning.optim.cores import lift_in_pieces
from zolightning.optim.momentum_transport import momentum_of, transport_momentum
from zolightning.optim.offload import add_offloaded, to_host
from zolightning.optim.precision import EXTRA_BITS, State, add_tensor, as_contiguous

Matrices = dict[str, tuple[nn.Parameter, Matrix]]
Split = tuple[Matrices, dict[str, nn.Parameter]]
Pending = tuple[dict[str, Any], nn.Parameter, Matrix, Tensor]


class SubspaceWeights(ZerothOrderOptimizer):
    """Abstract: a matrix W is trained as ``W + left @ core @ right.T``; what moves the cores is left to a subclass.

    ``left`` and ``right`` are the *basis* of the matrix (:mod:`zolightning.optim.bases`), drawn when it is first asked
    for, and anew by :meth:`resample`. Updates wait in the core until they are *folded*, that is, added to W
    (:mod:`zolightning.optim.cores` says when). Other parameters are trained as they are.

    Args:
        params, defaults, **common: see :class:`~zolightning.optim.base.ZerothOrderOptimizer`.
        offload_low_words: keep the extra bits of half-precision matrices (2 bytes per bf16 weight, 4 per fp16 one) in
            host memory and move them to the device, piece by piece, when cores are folded. The bits are the same, at
            the price of a transfer each way per fold, so it is meant for rare folds (`fold_every_step` False). It may
            differ between a run and the checkpoint that it resumes. Refused where `update_precision` keeps no bits.

    The state of a matrix has these entries, each only while it is needed:

    * ``core``: pending updates, in the core shape of its basis, float32 or wider;
    * ``momentum_buffer``, or ``exp_avg``, ``exp_avg_sq`` and ``step``: moments of the core's gradient, flat;
    * ``given_left``, ``given_right``: factors that were given to :meth:`resample`, in the weight's dtype;
    * ``left``, ``right``: the factors of a basis that keeps directions of the momentum (an anchored one), likewise;
    * ``low_word``, ``low_byte`` or ``master``: the extra bits of a half-precision weight, flat, unless they are
      offloaded (:mod:`zolightning.optim.precision`);
    * in ``state_dict()`` also ``base``: the stored weight, to which the core is to be added.

    Attributes:
        fold_every_step: whether each step ends with a :meth:`fold`.
        recorded: in a replay, the given bases of the recorded run by their refresh index, which :meth:`resample` takes.
    """

    kept_at_rest = tuple(GIVEN.values())
    sides: ClassVar[Sides]  # the sides on which a basis has a factor
    unit: ClassVar[bool] = True  # whether columns are orthonormal; if not, entries are Gaussian of unit variance
    normalize_directions: bool  # an argument of SubspaceOptimizer

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, offload_low_words: bool = False, **common: Any
    ) -> None:
        require_choice("sides", getattr(self, "sides", None), get_args(Sides))
        self.offload_low_words = offload_low_words
        self.fold_every_step = True
        self.recorded: dict[int, Mapping[nn.Parameter, Basis]] = {}
        self.basis_kind = BasisKind(self.sides, self.unit)
        self._bases: dict[nn.Parameter, Basis] = {}
        self._splits: dict[tuple[int, bool], tuple[object, Split]] = {}  # what was split, and its split
        self._offloaded: defaultdict[nn.Parameter, State] = defaultdict(dict)  # Trainers move `state` to the device
        super().__init__(params, defaults, **common)
        if offload_low_words and self.update_precision == "native":
            raise ValueError(
                "`offload_low_words` is True, but with `update_precision` 'native' there are none. Set that to "
                "'exact', or `offload_low_words` to False."
            )

    # Matrices and their bases

    def matrix(self, parameter: nn.Parameter, rank: int) -> Matrix | None:
        """The matrix that a parameter is searched as; None where it is searched along dense directions."""
        return self.basis_kind.matrix(self.trainable_shape(parameter), rank)

    def matrix_of(self, parameter: nn.Parameter) -> Matrix | None:
        """:meth:`matrix` at the rank of the parameter's group."""
        return self.matrix(parameter, self.group_of(parameter)["rank"])

    def split(self, group: dict[str, Any], frozen: bool = False) -> Split:
        """The trainable parameters of a group, or with `frozen` all of them, by name; not to be changed.

        First those that are searched in a subspace, each with its matrix; then those searched along dense directions.
        """
        named = self.named(group, frozen)
        of = named, group["rank"], dict(self.slices), [parameter.shape for parameter in named]
        before, found = self._splits.get((id(group), frozen), (None, ({}, {})))
        if before != of:
            matrices, vectors = found = {}, {}
            for parameter, name in named.items():
                if (matrix := self.matrix(parameter, group["rank"])) is None:
                    vectors[name] = parameter
                else:
                    matrices[name] = parameter, matrix
            self._splits[id(group), frozen] = of, found
        return found

    def basis(self, parameter: nn.Parameter) -> Basis:
        """The present basis of a matrix: factors (rows, rank) and (columns, rank), in the dtype of its weight."""
        basis = self._bases.get(parameter)
        if basis is None:
            state = self.state.get(parameter, {})
            anchored = {side: state[side] for side in ANCHORED if side in state}
            basis = self._bases[parameter] = Basis(**anchored) if anchored else self._drawn(parameter)
        return basis

    def set_names(self, names: Mapping[nn.Parameter, str]) -> None:
        """As of any method; bases are drawn anew, because they depend on the names."""
        super().set_names(names)
        self._bases.clear()

    def given(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The factors of a matrix that were given to :meth:`resample`, by side, "left" or "right"."""
        state = self.state.get(parameter, {})
        return {side: state[entry] for side, entry in GIVEN.items() if entry in state}

    @property
    def has_given(self) -> bool:
        """Whether any matrix has factors that were given."""
        return any(self.given(parameter) for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def resample(self, given: Mapping[nn.Parameter, Basis] | None = None) -> None:
        """Folds the cores into the weights, draws the next bases and expresses the momentum in them.

        Sets :attr:`momentum_kept`. Adam's second moments are kept as they are: that of ``g z`` is the second moment of
        g in any coordinates.

        Args:
            given: factors to use instead of drawn ones for some matrices, in any dtype. A method with a factor on one
                side then searches on the side that is given, and one with factors on both sides draws the other. Given
                factors stay until others are given, and are saved with the state. Their number of columns may differ
                from the rank: a momentum in a core of another shape starts from zero. A ValueError says where one does
                not fit the parameter or its momentum.
        """
        recorded = self.recorded.pop(self.param_groups[0]["refresh"] + 1, None)
        given = (given or {}) if recorded is None else recorded
        trained = {parameter for group in self.param_groups for parameter in group["params"]} if given else ()
        for parameter, basis in given.items():
            matrix = self.matrix_of(parameter) if parameter in trained else None
            has_side = matrix and self.sides != "both" and momentum_of(self.state.get(parameter, {})) is not None
            require_factors(basis, matrix, self.names.get(parameter, "?"), self.basis(parameter) if has_side else None)
        self.fold()
        moving = [  # frozen ones too: they may thaw
            (group, parameter, matrix, self.basis(parameter))
            for group in self.param_groups
            for parameter, matrix in self.split(group, frozen=True)[0].values()
            if momentum_of(self.state.get(parameter, {})) is not None
        ]
        self._bases.clear()
        for state, side in product(self.state.values(), ANCHORED):
            state.pop(side, None)
        for parameter, basis in given.items():
            matrix = self.matrix_of(parameter)
            if matrix is not None and self.normalize_directions and recorded is None:  # recorded ones are scaled
                basis = self.basis_kind.as_long_as_drawn(basis, matrix)
            for side, factor in basis.by_side.items():
                self.state[parameter][GIVEN[side]] = factor.to(parameter.device, parameter.dtype, copy=True)
        for group in self.param_groups:
            group["refresh"] += 1
            if given:
                group["given"] = group["refresh"]
        before = after = 0.0
        for group, parameter, matrix, old in moving:
            with without_autocast(parameter.device):
                state, drawn = self.state[parameter], self._drawn(parameter)
                self._bases[parameter], *norms = transport_momentum(state, matrix, old, drawn, group, self.unit)
            before, after = before + norms[0], after + norms[1]
        self.param_groups[0]["momentum_kept"] = after / before if before else None

    @property
    def momentum_kept(self) -> float | None:
        """Share of the momentum's squared norm that the last resampling kept; None if there was no momentum."""
        return self.param_groups[0].get("momentum_kept")

    def _drawn(self, parameter: nn.Parameter) -> Basis:
        """The basis that is drawn for a matrix at the present refresh index, with factors that were given."""
        group, name, matrix = self.group_of(parameter), self.names[parameter], self.matrix_of(parameter)
        if matrix is None:
            raise ValueError(f"`{name}` moves along dense directions and has no basis.")
        return self.basis_kind.draw(matrix, parameter, (group["seed"], group["refresh"], name), self.given(parameter))

    # Updates that wait in cores

    def at_rest(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any method; also frozen parameters with pending updates, because losses read their updated values."""
        yield from super().at_rest()
        for _, parameter, _, _ in self.pending():
            if not parameter.requires_grad:
                yield self.names[parameter], parameter

    def core(self, parameter: nn.Parameter, matrix: Matrix) -> Tensor:
        """The core of a matrix, in the core shape of its basis, fp32 or wider; zeros if it had none."""
        state = self.state[parameter]
        if "core" not in state:
            shape = self.basis(parameter).core_shape(matrix.shape)
            state["core"] = torch.zeros(shape, dtype=compute_dtype(parameter.dtype), device=parameter.device)
        return state["core"]

    def pending(self, without: Container[nn.Parameter] = ()) -> Iterator[Pending]:
        """Group, parameter, matrix and core of each matrix with updates that its weight lacks, even a frozen one."""
        if not any(["core" in state and parameter not in without for parameter, state in self.state.items()]):
            return
        for group in self.param_groups:
            for parameter, matrix in self.split(group, frozen=True)[0].values():
                core = self.state.get(parameter, {}).get("core")
                if core is not None and parameter not in without:
                    yield group, parameter, matrix, core

    def offsets(self, without: Container[nn.Parameter] = ()) -> dict[nn.Parameter, Perturbation]:
        """The updates in cores that have not been added to the weights, including those of frozen parameters."""
        return {p: LowRank(self.basis(p), matrix.shape, core, None) for _, p, matrix, core in self.pending(without)}

    @torch.inference_mode(False)  # tensors that a validation made in inference mode could not be changed later
    @torch.no_grad()
    def fold(self) -> None:
        """Adds the updates in all cores to the stored weights, and counts the fold if there were any."""
        for _, parameter, _, _ in (found := list(self.pending())):
            with as_contiguous(parameter, self.slices.get(parameter)) as weight:
                extra_bits = (self._offloaded if self.offload_low_words else self.state)[parameter]
                self._add_lift(weight, parameter, extra_bits)
            del self.state[parameter]["core"]
        if found:
            torch.clear_autocast_cache()  # it holds casts of the old weights
            for group in self.param_groups:
                group["folds"] += 1

    def _add_lift(self, weight: Tensor, parameter: nn.Parameter, extra_bits: State) -> None:
        """Adds the lift of a parameter's core to its weight, or to this rank's rows of it."""
        basis, core = self.basis(parameter), self.state[parameter]["core"]
        with without_autocast(weight.device):
            pieces = lift_in_pieces(basis, core, weight, first_element(parameter))
            if self.offload_low_words:
                add_offloaded(weight, extra_bits, pieces, self.update_precision)
                return
            for start, delta in pieces:
                add_tensor(weight, extra_bits, delta, self.update_precision, start=start)

    def is_pending(self, parameter: nn.Parameter) -> bool:
        """Whether the weight of a matrix lacks updates."""
        return "core" in self.state.get(parameter, {})

    @torch.no_grad()
    def folded(self, parameter: nn.Parameter) -> Tensor:
        """A copy of a weight with its pending updates."""
        folded = parameter.detach().clone()
        with as_contiguous(folded, self.slices.get(parameter)) as weight:
            self._add_lift(weight, parameter, {name: bits.clone() for name, bits in self.extra_bits(parameter).items()})
        return folded

    # What is kept

    def release(self, parameters: Iterable[nn.Parameter]) -> None:
        """As of any method; bases are freed too, and drawn again when the parameters move again."""
        parameters = list(parameters)
        super().release(parameters)
        for parameter in parameters:
            self._bases.pop(parameter, None)
            if self.drops_left_state:
                self._offloaded.pop(parameter, None)

    def extra_bits(self, parameter: nn.Parameter) -> Mapping[str, Tensor]:
        return {**super().extra_bits(parameter), **self._offloaded.get(parameter, {})}

    def state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state now, with the bases."""
        in_state = {id(value) for state in self.state.values() for value in state.values()}
        factors = (factor for basis in self._bases.values() for factor in basis.by_side.values())
        return super().state_bytes() + sum(factor.nbytes for factor in factors if id(factor) not in in_state)

    def host_bytes(self) -> int:
        return sum(bits.nbytes for state in self._offloaded.values() for bits in state.values())

    def is_by_element(self, parameter: nn.Parameter, name: str) -> bool:
        return self.matrix_of(parameter) is None or name in (*EXTRA_BITS, "base")

    def needs_whole(self) -> Iterator[tuple[str, object, str]]:
        yield from super().needs_whole()
        if self.offload_low_words:
            yield "offload_low_words", True, "False"

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
        super().load_state_dict(state_dict)
        self._bases.clear()
        if self.fold_every_step and self.attached:  # otherwise the names for the bases may not be known yet
            self.fold()

    def restore(self, parameter: nn.Parameter, entries: Mapping[str, Any]) -> None:
        is_offloaded = self.offload_low_words and self.matrix_of(parameter) is not None
        apart = {"base", *EXTRA_BITS} if is_offloaded else {"base"}  # as large as the weights, and kept off the device
        bits = entries.keys() & apart - {"base"}
        self._offloaded[parameter] = {name: to_host(entries[name], parameter.device) for name in bits}
        if "base" in entries:
            (own := own_rows(parameter)).copy_(own_rows(entries["base"]).view(own.shape))
        super().restore(parameter, {name: value for name, value in entries.items() if name not in apart})
