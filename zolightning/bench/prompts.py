"""Training steps on prompts, from tokens of ragged lengths to updated weights: ours and as published."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zolightning.bench.floors import forward_flops
from zolightning.bench.published import PublishedBatch, published_batch, published_loss
from zolightning.bench.rows import PUBLISHED, Evaluate, Row, Step
from zolightning.commands.timing import seconds_of
from zolightning.data import Batch
from zolightning.data.batch import collate
from zolightning.data.batching import LengthBuckets
from zolightning.data.encoding import Example
from zolightning.models import answer_log_probs, candidate_scores, classification_loss

# In half precision a log-probability of -8 is rounded to 1/16; the mean over a batch averages such errors.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Prompts:
    """The same examples in batches of ours and of the published recipe.

    Ours: batches of similar length, all candidates of one token scored by one forward, only the logits that are read.
    As published: batches in shuffled order, one row a candidate, all logits.
    """

    ours: Sequence[Batch]
    published: Sequence[PublishedBatch]

    @classmethod
    def of(cls, examples: Sequence[Example], batch_size: int, pad_id: int, device: torch.device) -> "Prompts":
        """Whole batches of the examples, on `device`."""
        batch_size = min(batch_size, len(examples))
        bucketed = LengthBuckets([example.length for example in examples], batch_size).epoch(0)
        shuffled = np.random.RandomState(0).permutation(len(examples))[: len(bucketed) * batch_size]
        return cls(
            [_moved(collate([examples[i] for i in batch], pad_id, "classification"), device) for batch in bucketed],
            [
                _moved(published_batch([examples[i] for i in batch], pad_id), device)
                for batch in shuffled.reshape(-1, batch_size).tolist()
            ],
        )

    def losses(self, row: Row, model: nn.Module) -> list[Evaluate]:
        """The loss of each batch, as the row takes it."""
        if row is PUBLISHED:
            return [partial(published_loss, model, batch) for batch in self.published]
        return [partial(our_loss, model, batch) for batch in self.ours]

    def tokens(self, row: Row) -> float:
        """Tokens of a forward, padding included; the mean over batches."""
        batches: Sequence[Mapping[str, Any]] = self.published if row is PUBLISHED else self.ours
        return statistics.fmean(batch["input_ids"].numel() for batch in batches)

    def flops(self, row: Row, model: nn.Module) -> float:
        """Floating point operations of a forward; the mean over batches."""
        return statistics.fmean(map(forward_flops, self.losses(row, model)))


def time_prompts(
    work: Sequence[tuple[Step, Sequence[Evaluate]]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], object] = lambda progress: None,
) -> list[float]:
    """Seconds of each step: the mean over the batches of medians over passes, in which the steps take turns."""
    for step, losses in work:
        seconds_of(partial(step, losses[0]))  # what happens only once is not timed
    batches = len(work[0][1])
    medians: list[list[float]] = []
    for number in range(batches):
        say(f"batch {number + 1} of {batches}")
        passes = [[seconds_of(partial(step, losses[number]), clock) for step, losses in work] for _ in range(repeats)]
        medians.append([statistics.median(row) for row in zip(*passes, strict=True)])
    return [statistics.fmean(column) for column in zip(*medians, strict=True)]


def check_same_loss(model: nn.Module, examples: Sequence[Example], pad_id: int) -> None:
    """Prints the loss of a batch computed both ways.

    Raises:
        RuntimeError: they are not the same, so that times of the two cannot be compared.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        ours = our_loss(model, _moved(collate(examples, pad_id, "classification"), device)).item()
        published = published_loss(model, _moved(published_batch(examples, pad_id), device)).item()
    tolerance = TOLERANCE[next(model.parameters()).dtype] * max(1.0, abs(published))
    text = f"loss of one batch: ours {ours:.5f}, published {published:.5f}, difference {ours - published:.1e}"
    if not abs(ours - published) <= tolerance:
        raise RuntimeError(f"The {text}, more than {tolerance:.1e}: their times cannot be compared.")
    print(f"\n{text} (at most {tolerance:.1e})")


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What ``CausalLM.training_step`` returns, which only runs under a Trainer."""
    return classification_loss(candidate_scores(*answer_log_probs(model, batch)), batch["label"])


def _moved(batch: Any, device: torch.device) -> Any:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
