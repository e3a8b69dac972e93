"""Counts when each block moved, in a table of fixed size, and draws it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Timeline:
    """Counts the steps in which each block moved, for spans of equally many steps.

    When the table is full, neighbouring spans are merged, so that it serves a run of any length. The number of columns
    is even, and `start` the number of the first step.
    """

    def __init__(self, num_blocks: int, columns: int = 512, start: int = 0) -> None:
        self.counts = torch.zeros(num_blocks, columns, dtype=torch.int32)
        self.span = 1  # steps in a column
        self.steps = 0  # counted so far
        self.start = start

    def add(self, active: Sequence[int]) -> None:
        """Counts a step."""
        if self.steps == self.span * self.counts.shape[1]:
            pairs = self.counts[:, ::2] + self.counts[:, 1::2]
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)], dim=1)
            self.span *= 2
        self.counts[list(active), self.steps // self.span] += 1
        self.steps += 1

    def figure(self, names: Sequence[str], probabilities: Sequence[float] = ()) -> "Figure":
        """A figure with a row for each block: when it moved, its share of all steps, and its probability."""
        from matplotlib.figure import Figure

        used = -(-self.steps // self.span)
        spans = torch.full((used,), self.span)
        spans[-1:] = self.steps - (used - 1) * self.span
        figure = Figure(figsize=(9, 1.4 + 0.18 * len(names)), layout="constrained")
        beside = {"% of all steps": self.counts.sum(1) / self.steps, "% to be drawn": torch.tensor(probabilities)}
        beside = {title: shares for title, shares in beside.items() if len(shares)}
        axes, *others = figure.subplots(1, 1 + len(beside), sharey=True, width_ratios=(5, *[1] * len(beside)))
        extent = (self.start, self.start + self.steps, len(names) - 0.5, -0.5)
        moved = (self.counts[:, :used] / spans).numpy()
        axes.imshow(moved, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_ylabel("block")
        axes.set_xlabel("step")
        many = f" (a column is {self.span} steps: paler where it moved in some)" if self.span > 1 else ""
        axes.set_title(f"when each block moved{many}", fontsize=9)
        for panel, (title, shares) in zip(others, beside.items(), strict=True):
            panel.barh(range(len(names)), (100 * shares).tolist(), color="C0")
            panel.set_title(title, fontsize=9)
            panel.spines[["top", "right"]].set_visible(False)
        for panel in (axes, *others):
            panel.set_yticks([row - 0.5 for row in range(len(names) + 1)], minor=True)
            panel.grid(axis="y", which="minor", color="#dddddd", linewidth=0.5)
            panel.tick_params(axis="y", which="minor", length=0)
        return figure

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.clone(), "span": self.span, "steps": self.steps, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"counts": state["counts"].clone()})
