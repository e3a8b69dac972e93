"""What a Trainer knows about metrics in the middle of an epoch, which Lightning's checkpoints leave out.

Without it, a run that resumes in mid-epoch would log the mean over the rest of the epoch only, and callbacks that look
for a metric at the end of the epoch would find none.
"""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.fabric.utilities.apply_func import move_data_to_device
from torchmetrics import Metric

from zolightning.training_loop import is_at_end_of_batch


class RunningMetrics:
    """The metrics of a fit on one rank, to be kept in its checkpoints and restored when it resumes."""

    def __init__(self) -> None:
        self._earlier: dict[str, dict[str, Any]] = {}  # sums from before the checkpoint that no batch has added to yet
        self._metrics: dict[str, Metric] = {}  # of the module

    def now(self, trainer: L.Trainer) -> dict[str, Any]:
        """The last values that callbacks see, and the sums of what training logs per epoch, for a checkpoint."""
        self.batch_ends(trainer)  # again: other callbacks may have logged since
        connector = trainer._logger_connector
        # The property has what the batch has logged, but between batches it would compute the means of the epoch.
        seen = connector.callback_metrics if is_at_end_of_batch(trainer) else connector._callback_metrics
        sums = self._earlier.copy()
        for key, result in trainer.fit_loop.epoch_loop._results.items():
            meta = result.meta
            if meta.on_epoch and not result.has_reset:
                metric = result if result.is_tensor else result.value
                sums[key] = {
                    "name": meta.forked_name(on_step=False),
                    "options": {
                        "logger": None if meta.logger else False,
                        "prog_bar": meta.prog_bar,
                        "reduce_fx": meta.reduce_fx.__name__,
                        "sync_dist": meta.sync.should,
                        "rank_zero_only": meta.sync.rank_zero_only,
                    },
                    "attribute": meta.metric_attribute,  # of the module, where it is a metric of its own
                    "state": {name: _copied(state) for name, state in metric.metric_state.items()},
                    "updates": metric.update_count,
                }
        return {"callback": dict(seen), "epoch": sums}

    def restore(
        self, trainer: L.Trainer, module: L.LightningModule, saved: Sequence[dict[str, Any]], is_over: bool = False
    ) -> None:
        """Restores what :meth:`now` returned on each rank, when training starts; nothing if `saved` is empty.

        On a different number of ranks sums start at zero, since a rank continues with other batches than those summed.
        They also do so if the epoch of the checkpoint `is_over`.
        """
        is_as_many = len(saved) == trainer.world_size
        own = saved[trainer.global_rank if is_as_many else 0] if saved else {}
        trainer._logger_connector._callback_metrics.update(own.get("callback", {}))
        # Which may be logged as they are, and be reduced over ranks, where NCCL needs them on its device
        earlier = move_data_to_device(own.get("epoch", {}), module.device)
        self._earlier = earlier if is_as_many and not is_over else {}
        self._metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
        for sums in self._earlier.values():
            if (metric := self._metrics.get(sums["attribute"])) is not None:
                _restore(metric, sums)

    def batch_ends(self, trainer: L.Trainer) -> None:
        """To be called when a batch has logged its values: earlier sums are added to those that begin with it."""
        results = trainer.fit_loop.epoch_loop._results if self._earlier else {}
        for key in [key for key in self._earlier if key in results and not results[key].has_reset]:
            state, result = self._earlier.pop(key)["state"], results[key]
            if result.is_tensor:
                own, before = result.value, state["value"]
                is_extreme = result.meta.is_max_reduction or result.meta.is_min_reduction
                result.value = result.meta.reduce_fx(before, own) if is_extreme else before + own
                if result.meta.is_mean_reduction:
                    result.cumulated_batch_size += state["cumulated_batch_size"]
                result._computed = None

    def epoch_ends(self, module: L.LightningModule) -> None:
        """To be called when the epoch is over: logs what no batch has logged since the checkpoint."""
        self.batch_ends(module.trainer)  # as above
        for sums in self._earlier.values():
            state, metric, size = sums["state"], self._metrics.get(sums["attribute"]), 1
            value = state.get("value") if metric is None else metric.compute()
            if metric is not None:
                metric.reset()
            elif "cumulated_batch_size" in state:
                size = int(state["cumulated_batch_size"])
                value = state["value"] / size
            module.log(sums["name"], value, on_step=False, on_epoch=True, batch_size=size, **sums["options"])
        self._earlier = {}


def _copied(state: Any) -> Any:
    return list(state) if isinstance(state, list) else state.clone()  # a metric appends to a list


def _restore(metric: Metric, sums: dict[str, Any]) -> None:
    for name, state in sums["state"].items():
        setattr(metric, name, move_data_to_device(state, metric.device))
    metric._update_count = sums["updates"]
    metric._computed = None
