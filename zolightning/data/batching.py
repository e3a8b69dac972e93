"""Which examples make up which batch, on one rank or many, and where a resumed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from zolightning.messages import counted
from zolightning.rank_zero import rank_zero_warn


class LengthBuckets:
    """Training batches of examples of similar length: a pure function of the seed and the batch's number.

    Each epoch is shuffled anew, sorted by length within windows of `bucket_batches` batches, cut into
    batches, and the batches are shuffled. Batch ``i`` of a run belongs to epoch ``i // len(self)``. No
    generator is kept or touched.

    A rank gets every `num_replicas`-th example of a global batch, so n ranks with a batch size of b/n see
    together what one rank with b sees. Examples that do not fill a last batch sit out an epoch (different ones
    each time), unless there is no full batch at all; fewer examples than ranks are a ValueError. More batches in a
    window mean less padding; 1 is a plain shuffle. With `fixed` the same examples stay together.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        bucket_batches: int = 8,
        fixed: bool = False,
    ) -> None:
        _check_enough_examples(len(lengths), num_replicas)
        self.lengths = lengths
        self.global_batch_size = min(batch_size * num_replicas, len(lengths))
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.bucket_batches = bucket_batches
        self.fixed = fixed
        self._latest: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.lengths) // self.global_batch_size

    def __getitem__(self, index: int) -> list[int]:
        epoch, position = divmod(index, len(self))
        if self._latest[0] != epoch:
            self._latest = (epoch, self.epoch(epoch))
        return self._latest[1][position][self.rank :: self.num_replicas]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Returns the global batches of an epoch."""
        random = np.random.RandomState([self.seed, 0 if self.fixed else epoch])
        size = self.global_batch_size
        shuffled = random.permutation(len(self.lengths))[: len(self) * size].tolist()
        window = size * self.bucket_batches
        bucketed = [
            index
            for start in range(0, len(shuffled), window)
            for index in sorted(shuffled[start : start + window], key=self.lengths.__getitem__)
        ]
        if self.fixed:
            random = np.random.RandomState([self.seed, epoch])
        return [bucketed[batch * size : (batch + 1) * size] for batch in random.permutation(len(self))]

    def settings(self) -> dict[str, int]:
        """What the order depends on."""
        return {
            "seed": self.seed,
            "global batch size": self.global_batch_size,
            "examples": len(self.lengths),
            "tokens": sum(self.lengths),
            "fixed batches": self.fixed,
        }


def even_batches(lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0) -> list[list[int]]:
    """Cuts a split into evaluation batches: each example once, equally many batches on each rank.

    The longest examples come first, so what does not fit in memory fails at once. Equal numbers matter
    wherever ranks talk in every forward, as with sharded weights: a rank with a batch less would leave the
    others waiting. So the examples are spread over all batches, whose sizes differ by one at most. Only if
    `batch_size` is 1, and the examples do not divide by the number of ranks, does a batch have one more. Fewer
    examples than ranks are a ValueError.

    Returns:
        The examples of each batch of this rank.
    """
    _check_enough_examples(len(lengths), num_replicas)
    num_batches = min(-(-len(lengths) // (batch_size * num_replicas)), len(lengths) // num_replicas)
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    parts = np.array_split(longest_first, num_batches)
    return [part.tolist()[rank::num_replicas] for part in parts]


Order = TypeVar("Order", LengthBuckets, list[list[int]])


class Batches(Dataset[Any], Generic[Order]):
    """The batches of a run by their number."""

    def __init__(
        self,
        examples: Sequence[Any],
        order: Order,
        collate: Callable[[Sequence[Any]], Any],
    ) -> None:
        self.examples = examples
        self.order: Order = order
        self.collate = collate

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.collate([self.examples[example] for example in self.order[index]])


class BatchNumbers(DistributedSampler):
    """The numbers of an epoch's batches, from `start()` on; `start` is called at each ``iter()``.

    It is a DistributedSampler because that is how Lightning knows that a loader has shared its examples among
    the ranks already. Lightning replaces any other sampler or, if it cannot, refuses it.

    Args:
        batches: the batches of this rank.
        start: returns the number of the first batch. With the Trainer's count of finished batches a run goes
            on with the batch after the last one it trained on, whenever its checkpoint was written, and a
            callback that looks at a few batches changes nothing.
    """

    def __init__(self, batches: Batches[Any], start: Callable[[], int] = lambda: 0) -> None:
        super().__init__(batches, num_replicas=1, rank=0, shuffle=False)
        self.batches = batches
        self.start = start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[int]:
        start = self.start()
        return iter(range(start, start + len(self)))


class TrainLoader(DataLoader[Any]):
    """A loader that can resume within an epoch: the Trainer's progress says which batch comes next.

    Lightning takes a loader with `state_dict` and `load_state_dict` for one that resumes safely. The state holds
    the settings of the order, so that a resumed run with other settings is warned of.
    """

    dataset: Batches[LengthBuckets]

    def first_batches(self, num_examples: int) -> Iterator[Any]:
        """The first examples as they are stored, whatever the order of training, in batches of the usual size.

        All ranks make the same batches, also where they cannot share a global batch evenly.
        """
        examples, order = self.dataset.examples[:num_examples], self.dataset.order
        size = -(-order.global_batch_size // order.num_replicas)
        for start in range(0, len(examples), size):
            yield self.dataset.collate(examples[start : start + size])

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.dataset.order.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before, now = state["order"], self.dataset.order.settings()
        changed = [f"{key} {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            rank_zero_warn(
                f"The checkpoint comes from a run with different training batches ({'; '.join(changed)}). This run "
                "continues at the same batch number, but with different examples than that run would have had."
            )


def _check_enough_examples(num_examples: int, num_replicas: int) -> None:
    if num_examples < num_replicas:
        examples = counted(num_examples, "example is", "examples are")
        raise ValueError(f"{examples} too few for {num_replicas} ranks: use more rows or fewer ranks.")
