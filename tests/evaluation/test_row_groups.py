"""Functions see the parameters of each group of rows, and what groups have in common is made once."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stacked_runs import METHODS, LanguageModel
from zolightning import kernels
from zolightning.directions.dense import directions
from zolightning.directions.perturbation import Perturbation
from zolightning.directions.trials import FlippedBit
from zolightning.evaluation import row_groups
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.row_groups import CannotStack, RowGroups
from zolightning.evaluation.scratch import Scratch

Makes = Callable[[nn.Parameter], Perturbation] | None  # what a group sees of a parameter; None: what is stored


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run, in order."""
    found: list[str] = []
    for name in ("perturb", "perturb_both", "perturb_rows"):
        own = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, n=name, f=own, **kwargs: (found.append(n), f(*args, **kwargs)))
    return found


def integers(*shape: int) -> Tensor:
    """Nothing is rounded in products of these and of directions of whole numbers."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(3)).float()


def direction(query: int, scale: float) -> Makes:
    return lambda parameter: directions({"w": parameter}, 0, 0, {query: scale}, "gaussian")["w"]


PLUS, MINUS = direction(0, 2.0), direction(0, -2.0)
GROUPS: dict[str, tuple[list[Makes], list[str]]] = {  # and the kernels that run for one parameter
    "both signs": ([PLUS, MINUS], ["perturb_both"]),
    "two queries": ([PLUS, direction(1, 4.0), direction(1, -4.0), MINUS], ["perturb_both"] * 2),
    "one-sided": ([None, PLUS, direction(1, 2.0)], ["perturb"] * 2),
    "no direction": ([MINUS, lambda _: FlippedBit(), PLUS], ["perturb_both"]),
}
EACH = pytest.mark.parametrize(("makes", "once"), GROUPS.values(), ids=GROUPS)


def check(
    run: Callable[[Tensor], Tensor], inputs: Tensor, parameters: Sequence[nn.Parameter], makes: Sequence[Makes]
) -> Scratch:
    """That each group's rows are those of a run for it alone, in all bits. Returns the memory that this took."""
    scratch = Scratch()
    changes = [{p: make and make(p) for p in parameters} for make in makes]
    groups = [Perturbed(change, scratch=scratch) for change in changes]
    with torch.no_grad(), RowGroups(groups, len(inputs), {id(parameter): "name" for parameter in parameters}):
        found = run(inputs)
    for part, rows, change in zip(found.chunk(len(makes)), inputs.chunk(len(makes)), changes, strict=True):
        with torch.no_grad(), Perturbed(change):
            expected = run(rows)
        assert part.dtype == expected.dtype and torch.equal(part, expected)
    return scratch


@EACH
@pytest.mark.parametrize("function", ["linear", "linear without bias", "addmm"])
def test_matrices(function: str, makes: list[Makes], once: list[str], calls: list[str]) -> None:
    weight, bias = nn.Parameter(integers(14, 6)), nn.Parameter(integers(6 if function == "addmm" else 14))
    run: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: F.linear(x, weight, bias),
        "linear without bias": lambda x: F.linear(x, weight),
        "addmm": lambda x: torch.addmm(bias, x, weight),
    }
    rows = (2 * len(makes), 14) if function == "addmm" else (2 * len(makes), 5, 6)
    check(run[function], integers(*rows), [weight, bias], makes)
    stacked = once * (1 if function == "linear without bias" else 2)
    assert calls[: len(stacked)] == stacked and "perturb_both" not in calls[len(stacked) :]


def test_matrices_in_pieces(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two groups share the memory, which the next two take, too."""
    monkeypatch.setattr(row_groups, "PIECE_BYTES", 2 * 8 * 24)  # rows of 24 bytes: pieces of 8 and 6 rows
    weight = nn.Parameter(integers(14, 6))
    makes, once = GROUPS["two queries"]
    scratch = check(lambda x: F.linear(x, weight), integers(8, 5, 6), [weight], makes)
    assert calls[: 2 * len(once)] == once * 2
    assert sum(buffer._bytes.nbytes for free in scratch._free.values() for buffer in free) == 2 * 8 * 24


@EACH
def test_rows_of_an_embedding(makes: list[Makes], once: list[str]) -> None:
    table = nn.Parameter(integers(14, 6))
    check(lambda x: F.embedding(x, table), integers(2 * len(makes), 5).long() + 5, [table], makes)


@EACH
@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 3)])
def test_what_all_rows_are_multiplied_by(shape: tuple[int, ...], makes: list[Makes], once: list[str]) -> None:
    """In the dtype that a row and a number, or a vector, of another dtype make."""
    scale, rows = nn.Parameter(torch.full(shape, 1.5)), integers(2 * len(makes), 2, 3).bfloat16()
    check(lambda x: x * scale, rows, [scale], makes)
    check(lambda x: scale * x, rows, [scale], makes)


def test_a_step_reads_each_parameter_once_for_both_signs(calls: list[str]) -> None:
    module = LanguageModel("llama", torch.float32)
    optimizer = METHODS["mezo"](module.parameters(), num_queries=1)
    optimizer.attach(module, 2)
    optimizer.estimate(module.loss)  # which looks around first
    calls.clear()
    optimizer.estimate(module.loss)
    rest = len(list(module.parameters())) - 1  # all but the embedding
    assert sorted(calls) == ["perturb_both"] * rest + ["perturb_rows"] * 2


def test_a_view_of_a_buffer_is_not_split() -> None:
    """As Swin reads its position biases: the flattened indices may be as many as rows, or a multiple of them."""
    table, index = nn.Parameter(integers(5, 3)), torch.arange(4).view(2, 2)
    groups = [Perturbed({table: make(table)}) for make in (PLUS, MINUS) if make]
    stacked = RowGroups(groups, 2, {id(table): "table"}, {index.data_ptr()})
    with torch.no_grad(), stacked, pytest.raises(CannotStack, match="reads `table` without the rows of a batch"):
        table[index.view(-1)]
