"""Where a task's gradient stands out from its noise: ``python -m zolightning.bench signal``.

Gradients by backpropagation, at the weights as they are, in the subspaces of rank-1 bases from activations: for each
linear map in the layers, the product of its gradient with the leading direction v of its inputs, scaled as
``ActivationBases`` does. For each set of maps it prints

* S, the squared norm of the mean gradient, N, the variance of the gradients of single examples around it, both in all,
  and N / S: batches of N / S examples have as much noise as signal;
* the *progress* ``S^2 / (Q (S + N / B))``, Q = S + N: twice the fall of the loss that a two-sided query on a batch of B
  can make at its best learning rate, with the empirical Fisher matrix in the place of the Hessian;
* that learning rate, ``S / (Q sqrt(S + N / B))``, for a method with `normalize`: it falls as the signal does;
* S and N of the whole matrices, which MeZO searches.

Most of the first gradient says which answers are too likely whatever the prompt. A bias for each answer learns that
very fast, so it is fitted first, and the gradient is that of the loss with it; ``--without-bias`` leaves it out.
Examples are dealt into four parts, each with a bias of its own, and S is the mean product of the gradients of two
parts: noise does not count as signal, and S may turn out negative where there is none.

  python -m zolightning.bench signal --patterns "layers.1[0-9]" "(gate|up)_proj" \\
    --config configs/tasks/sst2.yaml configs/models/smollm2_135m.yaml data.path=SST2
"""

import math
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zolightning.bench.figures import Value, append
from zolightning.bench.learn_entries import make, read
from zolightning.bench.options import option
from zolightning.commands.tables import Record, print_table
from zolightning.directions.second_moment import SecondMoment, scaled
from zolightning.layers import find_layers
from zolightning.models import CausalLM
from zolightning.models.scoring import answer_log_probs, candidate_scores

PARTS = 4
_LIMIT = 5.0  # of `rms`, the default of ActivationBases


@dataclass(frozen=True)
class Settings:
    """The options of the benchmark."""

    config: list[str] = option("files and settings, as for `learn`", metavar="WORD")
    patterns: list[str] = option("regular expressions, a line for the maps whose names match each", [])
    examples: int = option("validation rows to look at, in batches of 16", 256)
    batch_size: int = option("B, of training", 16)
    without_bias: bool = option("the gradient of the loss as it is, calibration and all", False)
    output: Path | None = option("CSV file to append a line a map to", None)


@dataclass
class Gradients:
    """Sums over examples of the gradients of one linear map with n inputs and m outputs."""

    direction: Tensor  # (n, 1), the leading direction of the inputs, scaled
    sums: Tensor  # (parts, m), for each part the sum of its gradients times `direction`
    whole: Tensor  # (parts, m, n), for each part the sum of its gradients
    # (2,), sums over all examples of the squared norms of these products, and of the gradients
    squares: Tensor = field(default_factory=lambda: torch.zeros(2))

    def add(self, part: int, inputs: Tensor, outer: Tensor) -> None:
        """Adds a batch: inputs (B, T, n) and the loss's gradients by outputs, (B, T, m)."""
        along = torch.einsum("btm,bt->bm", outer, (inputs @ self.direction).squeeze(-1))
        self.sums[part] += along.sum(0)
        self.whole[part] += torch.einsum("btm,btn->mn", outer, inputs)
        whole = ((outer @ outer.mT) * (inputs @ inputs.mT)).sum()  # |sum_t y_t x_t'|^2 of each example
        self.squares += torch.stack([along.square().sum(), whole])


@dataclass(frozen=True)
class Signal:
    """S and N of a set of numbers."""

    signal: float
    noise: float

    @classmethod
    def of(cls, sums: Iterable[Tensor], squares: float, counts: Sequence[int]) -> "Signal":
        """From the sum of each part's gradients, the sum of all their squared norms, and the sizes of the parts."""
        means = [part / count for part, count in zip(sums, counts, strict=True)]
        pairs = [float((one * other).sum()) for one, other in combinations(means, 2)]
        signal = sum(pairs) / len(pairs)
        return cls(signal, squares / sum(counts) - signal)

    def __add__(self, other: "Signal") -> "Signal":
        return Signal(self.signal + other.signal, self.noise + other.noise)

    def record(self, name: str, batch_size: int) -> Record:
        rate = progress = 0.0
        ratio = math.inf
        if self.signal > 0:  # an estimate, which is negative where there is nothing
            size = math.sqrt(self.signal + self.noise / batch_size)
            rate = self.signal / ((self.signal + self.noise) * size)
            progress, ratio = rate * self.signal / size, self.noise / self.signal
        return {
            "maps": name,
            "S": f"{self.signal:.3g}",
            "N": f"{self.noise:.3g}",
            "N / S": f"{ratio:.0f}",
            "progress": f"{progress:.2e}",
            "lr": f"{rate:.1e}",
        }


def measure(module: CausalLM, batches: Sequence[Any], with_bias: bool) -> tuple[dict[str, Gradients], list[int]]:
    """Gradients of all linear maps in the layers, and how many examples each part has; batches go to them in turns.

    Raises:
        ValueError: an example takes more than one row, or there are fewer batches than parts.
    """
    if len(batches) < PARTS:
        raise ValueError(
            f"There are {len(batches)} batches, and each of {PARTS} parts needs one. Ask for more examples."
        )
    stack = find_layers(module)
    maps = {
        f"{name}.{path}": submodule
        for name, layer in zip(stack.names, stack.layers, strict=True)
        for path, submodule in layer.named_modules()
        if isinstance(submodule, nn.Linear)
    }
    moments = {name: SecondMoment(one.in_features, 1, 0, name, one.weight.device) for name, one in maps.items()}
    module.eval().requires_grad_(False)
    scores = []
    with watched(maps, lambda name, inputs, _: moments[name].add(inputs.flatten(0, -2))), torch.no_grad():
        for batch in batches:
            scores.append(candidate_scores(*answer_log_probs(module.model, batch)))
            if batch["input_ids"].flatten(0, 1).shape[0] != len(scores[-1]):
                raise ValueError("An example of this task takes several rows; only answers of one token take one.")
    biases = []
    for part in range(PARTS):
        own = torch.cat(scores[part::PARTS]), torch.cat([batch["label"] for batch in batches[part::PARTS]])
        biases.append(best_bias(*own) if with_bias else torch.zeros(own[0].shape[1]))

    found = {}
    for name, one in maps.items():
        leading = moments[name].leading(1)
        assert leading is not None, name
        sums = torch.zeros(PARTS, one.out_features)
        found[name] = Gradients(scaled(leading, "rms", _LIMIT), sums, torch.zeros(PARTS, *one.weight.shape))
    first = module.model.get_input_embeddings()
    handle = first.register_forward_hook(lambda _, __, output: output.requires_grad_())
    for number, batch in enumerate(batches):
        part = number % PARTS

        def add(name: str, inputs: Tensor, outputs: Tensor, part: int = part) -> None:
            outputs.register_hook(lambda outer: found[name].add(part, inputs.detach(), outer))

        with watched(maps, add), torch.enable_grad():
            own_scores = candidate_scores(*answer_log_probs(module.model, batch)) + biases[part]
            F.cross_entropy(own_scores, batch["label"], reduction="sum").backward()
    handle.remove()
    return found, [sum(map(len, scores[part::PARTS])) for part in range(PARTS)]


def best_bias(scores: Tensor, labels: Tensor) -> Tensor:
    """The bias of the scores (B, C) of the answers with the lowest loss; pulled to 0 if an answer never occurs."""
    bias = torch.zeros(scores.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(scores + bias, labels) + 1e-4 * bias.square().sum()
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return bias.detach()


@contextmanager
def watched(maps: Mapping[str, nn.Linear], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls ``see(name, inputs, outputs)`` whenever one of the maps has run."""
    handles = [
        one.register_forward_hook(lambda _, inputs, output, name=name: see(name, inputs[0], output))
        for name, one in maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def signals(one: Gradients, counts: Sequence[int]) -> dict[str, Signal]:
    """The signals of one map: "cores" is that within rank-1 bases, "matrices" that of the whole gradient."""
    cores, matrices = one.squares.tolist()
    return {"cores": Signal.of(one.sums, cores, counts), "matrices": Signal.of(one.whole, matrices, counts)}


def total(chosen: Iterable[Signal]) -> Signal:
    """The signal of several sets of numbers taken together."""
    return sum(chosen, Signal(0.0, 0.0))


def run(settings: Settings) -> None:
    """Prints the tables."""
    size = max(1, min(16, settings.examples // PARTS))
    own = [f"data.num_validation={settings.examples}", f"data.eval_batch_size={size}"]
    config = read(shlex.join([*settings.config, *own]))
    L.seed_everything(0, verbose=False)
    made = make(config, "model", "data")
    module, data = made.model, made.data
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, limit_val_batches=1)
    trainer.validate(module, data, verbose=False)
    found, counts = measure(module, list(data.val_dataloader()), not settings.without_bias)
    each = {name: signals(one, counts) for name, one in found.items()}
    layers = find_layers(module).names
    sets = {"all": ""} | {layer.rpartition(".")[2].rjust(3): re.escape(layer) + r"\." for layer in layers}
    for kind in ("cores", "matrices"):
        records = [
            total(signal[kind] for name, signal in each.items() if re.search(pattern, name)).record(
                title, settings.batch_size
            )
            for title, pattern in (sets | {pattern: pattern for pattern in settings.patterns}).items()
        ]
        print_table(f"{sum(counts)} examples, {kind}", records)
    if settings.output:
        lines: list[dict[str, Value]] = [
            {"map": name, "searched": kind, "S": one.signal, "N": one.noise}
            for name, of in each.items()
            for kind, one in of.items()
        ]
        append(settings.output, ("map", "searched", "S", "N"), lines)
