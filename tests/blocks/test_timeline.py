"""How often each block has moved, in a table of fixed size."""

import torch

from zolightning.blocks.timeline import Timeline


def test_spans_grow_with_the_run() -> None:
    timeline = Timeline(3, columns=4, start=7)
    for step in range(9):
        timeline.add([0, 1] if step % 2 else [2])
    assert timeline.span == 4 and timeline.steps == 9
    assert timeline.counts.tolist() == [[2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 1, 0]]

    restored = Timeline(3, columns=4)
    restored.load_state_dict(saved := timeline.state_dict())
    for one in (timeline, restored):
        one.add([1])
    assert torch.equal(restored.counts, timeline.counts) and restored.steps == 10
    assert saved["counts"].sum() == 13  # as it was

    axes, shares, probabilities = timeline.figure(["a", "b", "c"], [0.25, 0.5, 0.25]).axes
    (image,) = axes.images
    assert image.get_extent() == [7, 17, 2.5, -0.5]
    assert image.get_array().tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    assert [bar.get_width() for bar in shares.patches] == [40, 50, 50]
    assert [bar.get_width() for bar in probabilities.patches] == [25, 50, 25]
    assert len(timeline.figure(["a", "b", "c"]).axes) == 2
