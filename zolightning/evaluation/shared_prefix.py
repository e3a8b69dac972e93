"""Computes the layers below the first perturbed parameter once a step, because all evaluations share their outputs.

The first evaluation finds out how many layers that are: it looks at which parameters have been read when each layer
returns, and keeps the output of the last layer before the first perturbed parameter is read. The other evaluations get
that output without running these layers. No bit of any loss changes. Training layer `l` of `L` alone with two
evaluations costs ``1 - l / (2 L)`` of two forwards; memory is one layer output for the batch.

Where the same batches are repeated (``data.fixed_batches``), these outputs may be kept for the whole run: from
the second epoch on, nothing below the first trained layer is computed at all.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.nested import tensors_in
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.randomness import Generators, States
from zolightning.evaluation.replaced import replaced_forward
from zolightning.layers import find_layers
from zolightning.rank_zero import rank_zero_warn

_WRITES = ", because each generates its own text"
_LOOPS = ", because the network runs them again on outputs of trained layers"
_BESIDE = ", because the network does more between them than pass on their outputs (it adds residuals, for example)"


def layers_of(module: nn.Module) -> Sequence[nn.Module]:
    """The layers of a module that :class:`SharedPrefix` may skip; none if the module has no list of layers.

    For an encoder-decoder of transformers these are the encoder's layers, which read the longer texts.
    """
    for submodule in module.modules():
        is_pair = getattr(getattr(submodule, "config", None), "is_encoder_decoder", False)
        if is_pair and hasattr(submodule, "get_encoder"):
            module = submodule.get_encoder()  # type: ignore[operator]  # torch declares it as a module
            break
    try:
        layers = find_layers(module).layers
    except ValueError:
        return ()
    return () if any(isinstance(layer, torch.jit.ScriptModule) for layer in layers) else layers  # they take no hooks


class SharedPrefix:
    """The layer outputs that the evaluations of one step have in common.

    Args:
        layers: modules that run one after the other, each on the output of the one before.
        keep_bytes: bytes of layer outputs to keep from step to step, as long as the same parameters train. Meanwhile
            no other parameter may be changed.
    """

    def __init__(self, layers: Sequence[nn.Module], keep_bytes: int = 0) -> None:
        self.layers = layers
        self.keep_bytes = keep_bytes
        self.kept: dict[bytes, Any] = {}  # outputs by a digest of the first layer's inputs
        self._kept_bytes = 0
        self._kept_depth = 0  # after how many layers they were taken
        self._kept_for: frozenset[int] = frozenset()  # ids of the parameters that moved meanwhile
        self.depth: int | None = None  # layers that later evaluations skip; None before the first evaluation
        self.share = 0.0  # the share of layer runs in the last step that were skipped
        self._runs = self._skipped = 0  # in this step: how often the network ran, and how many layers were skipped then
        # For each time that the network runs in an evaluation, the output of the last of these layers, and the states
        # of the generators after it: where it is skipped, later layers must draw the same numbers all the same.
        self._outputs: list[tuple[Any, States | None]] = []
        # For each of these times but the first, a digest of the tensors that the first layer was called with. The
        # second evaluation, at other weights, must call it with the same: another part of the batch, not an output.
        self._inputs: list[bytes] = []
        self._is_independent = False  # whether that has been seen
        self._generators = Generators()
        self._proven = 0  # the greatest depth whose loss has been compared with that of computing everything

    def evaluate(
        self, evaluate: Callable[[AbstractContextManager[None]], LossAndTerms], perturbed: Perturbed
    ) -> LossAndTerms:
        """A loss and its number of terms, under one of the perturbations of a step.

        The first call of a step computes everything. If it finds more layers to share than any step before, it repeats
        the evaluation with these skipped, and shares nothing from then on unless the loss has the same bits, because a
        network may do more with its layers than run one after the other. Evaluations that generate texts share nothing
        either: each continues from its own tokens, with keys and values of all layers. Nor do those of a network that
        loops over its layers.

        Args:
            evaluate: evaluates the loss in `perturbed`, and within another context, in which layers are skipped.
            perturbed: how the evaluation sees parameters.
        """
        moving = frozenset(map(id, perturbed.perturbations))
        if self.depth is None and moving != self._kept_for:
            self.kept, self._kept_bytes, self._kept_depth, self._kept_for = {}, 0, 0, moving
        if self.depth is not None or (self.keep_bytes and self._kept_depth):
            is_first = self.depth is None
            try:
                result = evaluate(self._recall(self._kept_depth) if is_first else self._replay())
            except _CannotShare as error:
                self._give_up(str(error))
                return evaluate(nullcontext())
            self._is_independent |= not is_first and len(self._outputs) > 1
            return result
        result = evaluate(self._record(perturbed))
        if self.depth and self.depth > self._proven and torch.isfinite(result.loss):
            if self._gives_again(result, evaluate):
                self._proven = self.depth
            else:
                self._give_up(_BESIDE)
        self._kept_depth = min(self.depth or 0, self._proven)
        return result

    def _gives_again(
        self, result: LossAndTerms, evaluate: Callable[[AbstractContextManager[None]], LossAndTerms]
    ) -> bool:
        """Whether an evaluation gives the same bits when layers are skipped."""
        counts = self._runs, self._skipped
        try:
            return torch.equal(evaluate(self._replay()).loss, result.loss)
        except Exception:  # whatever a network raises if it misses what its layers leave elsewhere
            return False
        finally:
            self._runs, self._skipped = counts

    def _give_up(self, reason: str) -> None:
        self.layers, self.depth = (), 0
        rank_zero_warn(
            f"The layers below the first trained one cannot be shared by the forwards of a step{reason}. Each runs "
            "all of them, which takes longer."
        )

    @contextmanager
    def one_step(self, generators: Generators) -> Iterator[None]:
        """A context for the evaluations of one step: on one batch, at weights that differ by perturbations only.

        Args:
            generators: the random number generators; each evaluation draws the same numbers from them.
        """
        self._generators = generators
        try:
            yield
        finally:
            self.share = self._skipped / max(1, self._runs * len(self.layers))
            self._runs = self._skipped = 0
            self.depth, self._outputs, self._inputs = None, [], []

    @contextmanager
    def _record(self, perturbed: Perturbed) -> Iterator[None]:
        depth, runs, caches, continues = 0, 0, _Caches(), False

        # It is given itself: if it or `watch` held it, directions and caches would stay until garbage is collected
        def forward(this: Callable[..., Any], index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal depth, runs, continues
            output = own(*args, **kwargs)
            if index == 0:
                runs += 1
                self._runs += 1
                if runs > 1 and depth:
                    self._note_inputs(args, kwargs)
                continues = caches.come_again(args, kwargs) or continues
            if runs == 1 and index == depth and not perturbed.has_touched_any():
                depth, self._outputs = index + 1, [(output, self._generators.states())]
                watch(this, depth)
            elif runs > 1 and index + 1 == depth:  # another part of the batch, after all parameters have been read
                self._outputs.append((output, self._generators.states()))
            return output

        with ExitStack() as stack:

            def watch(this: Callable[..., Any], index: int) -> None:
                # Hooks that other code has put on a layer must see it run.
                if index < len(self.layers) and not _is_hooked(layer := self.layers[index]):
                    own = partial(this, this, index, layer.forward)
                    stack.enter_context(replaced_forward(layer, own))

            watch(forward, 0)
            yield
        self.depth = depth
        if depth and continues:
            self._give_up(_WRITES)

    @contextmanager
    def _recall(self, depth: int) -> Iterator[None]:
        """For a step's first evaluation: runs the shared layers only on inputs whose output is not kept."""
        digest, is_kept, before, caches = b"", False, self._generators.states(), _Caches()

        def forward(index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal digest, is_kept, before
            if index == 0:
                if caches.come_again(args, kwargs):
                    raise _CannotShare(_WRITES)
                if self._outputs:
                    self._note_inputs(args, kwargs)
                digest, before = _digest((args, kwargs)), self._generators.states()
                is_kept = digest in self.kept
                self._runs += 1
                if is_kept:
                    self._skipped += depth
                    self._outputs.append((self.kept[digest], None))
            if is_kept:
                return self._outputs[-1][0]
            output = own(*args, **kwargs)
            if index + 1 == depth:
                after = self._generators.states()
                self._outputs.append((output, after))
                size = sum(tensor.nbytes for tensor in tensors_in(output))
                if self._kept_bytes + size <= self.keep_bytes and after.equal(before):
                    self.kept[digest] = output
                    self._kept_bytes += size
            return output

        with self._forwards(lambda index, own: partial(forward, index, own), depth):
            yield
        self.depth = depth

    def _note_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_independent:
            self._inputs.append(_digest(tensors_in((args, kwargs))))

    def _is_known(self, run: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the first layer is called with what it was called with in this run of the first evaluation."""
        return not run or self._is_independent or _digest(tensors_in((args, kwargs))) == self._inputs[run - 1]

    @contextmanager
    def _replay(self) -> Iterator[None]:
        run, caches = -1, _Caches()

        def kept(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal run
            if index == 0:
                run += 1
                if caches.come_again(args, kwargs):
                    raise _CannotShare(_WRITES)
                if run >= len(self._outputs) or not self._is_known(run, args, kwargs):
                    raise _CannotShare(_LOOPS)
                self._runs += 1
                self._skipped += self.depth or 0
            output, states = self._outputs[run]
            if index + 1 == self.depth and states is not None:
                self._generators.set(states)
            return output

        with self._forwards(lambda index, _: partial(kept, index), self.depth or 0):
            yield

    @contextmanager
    def _forwards(self, make: Callable[[int, Callable[..., Any]], Callable[..., Any]], depth: int) -> Iterator[None]:
        """A context in which the first `depth` layers have another ``forward``, made from index and own ``forward``."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers[:depth]):
                stack.enter_context(replaced_forward(layer, make(index, layer.forward)))
            yield


class _CannotShare(Exception):
    """The evaluations of a step cannot share layers; the message says why."""


class _Caches:
    """The caches of keys and values (transformers') that a layer has been called with."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # by id; they are kept here, so that no other object gets it

    def come_again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call has a cache that an earlier call had, because the network generates a text token by token."""
        found = {id(value): value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")}
        has_come = not self._seen.keys().isdisjoint(found)
        self._seen |= found
        return has_come


def _is_hooked(layer: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())


def _digest(value: Any) -> bytes:
    """A hash of a structure: of the bits of its tensors, and of all its other values."""
    leaves, structure = tree_flatten(value)
    digest = hashlib.blake2b(str(structure).encode(), digest_size=16)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(leaf).encode())
    return digest.digest()
