"""Training steps on real prompts, from tokens of ragged lengths to updated weights: ours and as published."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zolightning.bench.published import published_batch, published_loss
from zolightning.bench.rows import FORWARD, PUBLISHED, Row
from zolightning.commands.report import Record
from zolightning.data import Batch, Task
from zolightning.data.batching import LengthBuckets
from zolightning.data.encoding import Example, collate, encode
from zolightning.data.sampling import sample
from zolightning.data.source import read_folder
from zolightning.models import CausalLM, answer_log_probs, candidate_scores, classification_loss

# In half precision a log-probability of -8 is rounded to 1/16; the mean over a batch averages such errors.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def measure_prompts(
    module: CausalLM, rows: list[Row], folder: Path | None, batch_size: int, num_batches: int, repeats: int
) -> list[Record]:
    """Seconds of a step: the mean over the same batches for every row of medians over passes.

    Ours: batches of similar length, all candidates of one token scored by one forward, only the logits that are read.
    As published: batches in shuffled order, one row a candidate, all logits.

    Args:
        module: model and tokenizer.
        rows: ways to make a step, with our loss.
        folder: rows of SST-2; the sentiment set of the package if not given.
        batch_size: examples a batch.
        num_batches: batches a pass; fewer if there are too few rows.
        repeats: passes.

    Raises:
        RuntimeError: the two compute different losses, so that their times cannot be compared.
    """
    examples = load_examples(module, folder, batch_size, num_batches)
    batch_size = min(batch_size, len(examples))
    pad_id = module.tokenizer.pad_token_id or 0  # it is masked out: any token will do
    bucketed = LengthBuckets([example.length for example in examples], batch_size).epoch(0)
    shuffled = np.random.RandomState(0).permutation(len(examples)).reshape(-1, batch_size).tolist()
    ours = [collate([examples[i] for i in batch], pad_id, "classification") for batch in bucketed]
    published = [published_batch([examples[i] for i in batch], pad_id) for batch in shuffled]
    check_same_loss(module.model, [examples[i] for i in bucketed[0]], pad_id)

    our_losses = [partial(our_loss, module.model, batch) for batch in ours]
    published_losses = [partial(published_loss, module.model, batch) for batch in published]
    work: list[tuple[Row, list[partial[Tensor]], Sequence[Mapping[str, Any]]]] = [
        (PUBLISHED, published_losses, published),
        *((row, our_losses, ours) for row in (FORWARD, *rows)),
    ]
    steps = [row.make(module.model) for row, _, _ in work]
    for step, (_, losses, _) in zip(steps, work, strict=True):
        step(losses[0])  # what happens only once is not timed
    seconds = [
        [
            [_seconds(partial(step, losses[number])) for step, (_, losses, _) in zip(steps, work, strict=True)]
            for _ in range(repeats)
        ]
        for number in range(len(bucketed))
    ]
    medians = [[statistics.median(row) for row in zip(*passes, strict=True)] for passes in seconds]
    means = [statistics.fmean(column) for column in zip(*medians, strict=True)]
    return [
        {
            "row": row.name,
            "mean_seconds": mean,
            # The recipe's own forwards are others: of all candidates and all logits.
            "over_its_forwards": None if row is PUBLISHED else mean / (row.forwards * means[1]),
            "published_over_row": means[0] / mean,
            "tokens_per_forward": statistics.fmean(batch["input_ids"].numel() for batch in batches),
        }
        for mean, (row, _, batches) in zip(means, work, strict=True)
    ]


def load_examples(module: CausalLM, folder: Path | None, batch_size: int, num_batches: int) -> list[Example]:
    """Samples and encodes whole batches of training rows, or all rows where there is not one batch of them."""
    task = Task.load("sst2" if folder else "sentiment")
    folder = folder or task.folder
    assert folder is not None  # the package's set comes with its rows
    split = read_folder(folder, "train", task)
    chosen = sample(split, batch_size * num_batches, seed=0)
    whole = len(chosen) // batch_size * batch_size
    return [
        encode(
            module.tokenizer,
            *task.render(split.row(index)),
            label=split.candidates[index],
            id=split.ids[index],
            max_length=module.context_length,
        )
        for index in chosen[: whole or None]
    ]


def check_same_loss(model: nn.Module, examples: list[Example], pad_id: int) -> None:
    """Prints the loss of a batch computed both ways, and raises a RuntimeError if they are not the same."""
    with torch.no_grad():
        ours = our_loss(model, collate(examples, pad_id, "classification")).item()
        published = published_loss(model, published_batch(examples, pad_id)).item()
    tolerance = TOLERANCE[next(model.parameters()).dtype] * max(1.0, abs(published))
    text = f"loss of one batch: ours {ours:.5f}, published {published:.5f}, difference {ours - published:.1e}"
    if not abs(ours - published) <= tolerance:
        raise RuntimeError(f"The {text}, more than {tolerance:.1e}: their times cannot be compared.")
    print(f"\n{text} (at most {tolerance:.1e})")


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What ``CausalLM.training_step`` returns, which only runs under a Trainer."""
    return classification_loss(candidate_scores(*answer_log_probs(model, batch)), batch["label"])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
