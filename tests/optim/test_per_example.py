"""A direction for each example: losses of single examples, each at weights of its own, against a loop over examples."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import standard
from stacked_runs import LanguageModel
from tape import Tape
from zolightning import kernels
from zolightning.evaluation import row_groups
from zolightning.evaluation.examples import MicroBatch
from zolightning.kernels.noise import key
from zolightning.optim import GRZO, LOZO, ZOMOPI, MeZO, SubZero, ZerothOrderOptimizer
from zolightning.optim.estimators import PerExample, TwoSided
from zolightning.optim.share import Share

EPS = 1e-3
MAKERS: dict[str, Callable[..., ZerothOrderOptimizer]] = {
    "lozo": partial(LOZO, rank=2, lr=0.1, vector_lr=0.1),
    "lozo-matrices": partial(LOZO, rank=1, lr=0.1, vector_lr=0.0, noise="rademacher"),
    "subzero": partial(SubZero, rank=2, lr=0.1),
    "zo-mopi": partial(ZOMOPI, rank=2, power_rank=1, lr=0.1),
    "grzo": partial(GRZO, rank=2, lr=0.1),
    "mezo": partial(MeZO, lr=0.1),
}


class Tokens(LanguageModel):
    """Predicts the last tokens of sequences that begin with padding; the loss is a mean, weighted by `terms`."""

    def __init__(self, architecture: str = "llama", dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
        super().__init__(architecture, dtype, device)
        draw = torch.Generator().manual_seed(8)
        self.ids = torch.randint(2, 13, (6, 7), generator=draw).to(device)
        self.terms = torch.ones(6, dtype=torch.float64, device=device)
        self.mask = (torch.arange(7) >= torch.randint(0, 4, (6, 1), generator=draw)).long().to(device)

    def loss(self, rows: Any = slice(None)) -> Tensor:
        ids, mask = self.ids[rows], self.mask[rows]
        logits = self.net(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -2]
        losses = F.cross_entropy(logits.double(), ids[:, -1], reduction="none")
        return (losses * self.terms[rows]).sum() / self.terms[rows].sum()

    def in_examples(self, numbers: Mapping[int, int] | None = None, size: int = 6) -> list[MicroBatch[Any]]:
        """Micro-batches of some examples: by number, the row of each."""
        rows = list((numbers or {i: i for i in range(len(self.ids))}).items())
        return [
            MicroBatch(
                partial(self.loss, slice(part[0][1], part[-1][1] + 1)),
                {number: partial(self.loss, slice(row, row + 1)) for number, row in part},
            )
            for part in (rows[start : start + size] for start in range(0, len(rows), size))
        ]


def attached(net: Tokens, method: str, num_queries: int = 6, **options: Any) -> ZerothOrderOptimizer:
    options = {"eps": EPS, "seed": 4, "estimator": PerExample(), "num_queries": num_queries} | options
    optimizer = MAKERS[method](net.named_parameters(), **options)
    optimizer.attach(net)
    return optimizer


def in_a_loop(net: Tokens, optimizer: ZerothOrderOptimizer, queries: list[int], eps: float = EPS) -> list[float]:
    """Projected gradients of examples, each by two forwards at weights that are written out."""
    stored = {name: parameter.detach() for name, parameter in net.named_parameters()}
    found = []
    for row, query in enumerate(queries):
        losses = []
        for sign in (1, -1):
            changes, moved = optimizer.perturbations(query, sign), {}
            for name, parameter in net.named_parameters():
                moved[name] = torch.empty_like(stored[name])
                if parameter in changes:
                    changes[parameter].add_to(stored[name], moved[name])
                else:
                    moved[name].copy_(stored[name])
            with torch.no_grad():
                losses.append(torch.func.functional_call(_Loss(net), {f"net.{n}": v for n, v in moved.items()}, (row,)))
        found.append(((losses[0] - losses[1]) / (2 * eps)).item())
    return found


class _Loss(nn.Module):
    def __init__(self, net: Tokens) -> None:
        super().__init__()
        self.net = net

    def forward(self, row: int) -> Tensor:
        return self.net.loss(slice(row, row + 1))


CASES = [("llama", method) for method in MAKERS if method != "zo-mopi"] + [("gpt2", "lozo"), ("opt", "zo-mopi")]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_projected_grads_are_those_of_a_loop_over_examples(architecture: str, method: str) -> None:
    """Two forwards of all rows, padding among them; numbers of examples may be any, and share directions."""
    net = Tokens(architecture)
    optimizer = attached(net, method, num_queries=4)
    numbers = [0, 3, 9, 1, 5, 2]
    for size, rows in ((6, [6, 6]), (4, [4, 2, 4, 2])):
        moves = in_a_loop(net, optimizer, [number % 4 for number in numbers])
        batches = net.in_examples(dict(zip(numbers, range(6), strict=True)), size)
        optimizer.estimate(net.loss, micro_batches=batches)  # where tensors are cut is found out and compared
        net.rows.clear()
        record = optimizer.estimate(net.loss, micro_batches=batches)
        assert net.rows == rows
        expected = [4 * sum(move / 6 for n, move in zip(numbers, moves, strict=True) if n % 4 == q) for q in range(4)]
        assert record.projected_grads == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert record.forward_passes == 2
        optimizer.step()


@pytest.mark.parametrize("size", [6, 4])
def test_what_lies_below_the_first_trained_layer_runs_once_a_step_or_once_a_run(size: int) -> None:
    net, runs = Tokens(), Tape()
    below, above = net.net.model.layers
    below.mlp.act_fn = Noting(runs)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    above.requires_grad_(True)
    optimizer = attached(net, "lozo")
    for keep in (0, 2**20):
        optimizer.evaluator.prefix.keep_bytes = keep
        for _ in range(3):
            expected = in_a_loop(net, optimizer, list(range(6)))
            runs.clear()
            record = optimizer.estimate(net.loss, micro_batches=net.in_examples(size=size))
            assert record.projected_grads == pytest.approx(expected, rel=1e-6, abs=1e-9)
            optimizer.step()
        assert runs == [] if keep else runs == ([6] if size == 6 else [4, 2])


class Noting(nn.SiLU):
    """Keeps of how many rows it is called with."""

    def __init__(self, runs: Tape) -> None:
        super().__init__()
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        return super().forward(x)


def test_cores_of_all_examples_are_made_in_one_launch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bits of a launch for each; what is too large has launches of its own."""
    found, launches = [], []
    own = kernels.for_each

    def for_each(loop: Any, calls: Any) -> None:
        if loop is kernels.perturb:
            launches.append(len(calls))
        own(loop, calls)

    monkeypatch.setattr(kernels, "for_each", for_each)
    for host in ("cpu", "none"):
        monkeypatch.setattr(row_groups, "HOST", host)
        net = Tokens(dtype=torch.bfloat16)
        optimizer = attached(net, "lozo-matrices")
        for _ in range(2):
            launches.clear()
            found.append(optimizer.estimate(net.loss, micro_batches=net.in_examples()))
            optimizer.step()
        matrices = sum(p.ndim == 2 for n, p in net.named_parameters() if "embed" not in n)
        assert launches == ([] if host == "cpu" else [6 * (matrices + 1)] * 2)
    assert found[:2] == found[2:]


@pytest.mark.gpu
def test_a_gpu_finds_what_a_loop_over_examples_finds() -> None:
    net = Tokens(dtype=torch.float32, device="cuda")
    optimizer = attached(net, "lozo", eps=0.05)
    for _ in range(3):
        expected = in_a_loop(net, optimizer, list(range(6)), eps=0.05)
        record = optimizer.estimate(net.loss, micro_batches=net.in_examples(size=4))
        assert record.projected_grads == pytest.approx(expected, rel=1e-2, abs=1e-2)
        optimizer.step()


def test_losses_are_means_over_the_batch_and_terms_weigh_examples() -> None:
    net = Tokens()
    optimizer = attached(net, "lozo", eps=1e-6)
    terms = [1.0, 2.0, 0.0, 5.0, 1.0, 3.0]
    net.terms = torch.tensor(terms).double()

    def weighed(loss: Callable[[], Tensor], terms: float) -> tuple[Tensor, float]:
        return loss(), terms

    (batch,) = net.in_examples()
    own = {e: partial(weighed, loss, terms[e]) for e, loss in batch.examples.items()}
    weighted = MicroBatch(partial(weighed, batch.loss, sum(terms)), own)
    with torch.no_grad():
        mean = sum(w * net.loss(slice(i, i + 1)).item() for i, w in enumerate(terms) if w) / sum(terms)
    moves = in_a_loop(net, optimizer, list(range(6)), eps=1e-6)
    record = optimizer.estimate(net.loss, micro_batches=[weighted])
    assert record.losses == pytest.approx((mean, mean), rel=1e-4)
    expected = [6 * w / sum(terms) * move if w else 0.0 for w, move in zip(terms, moves, strict=True)]
    assert record.projected_grads == pytest.approx(expected, rel=1e-5, abs=1e-8)
    nothing = {e: lambda: (torch.tensor(float("nan")), 0.0) for e in batch.examples}
    record = optimizer.estimate(net.loss, micro_batches=[MicroBatch(lambda: nothing[0](), nothing)])
    assert record.projected_grads == (), "a step without terms is skipped"


def test_ranks_add_up() -> None:
    """Rank r of 2 has every second example: what is summed over ranks is what one rank has."""
    net = Tokens()
    optimizer = attached(net, "lozo")
    expected = optimizer.estimate(net.loss, micro_batches=net.in_examples())
    sent: list[Tensor] = []
    for rank in range(2):
        own = [partial(net.loss, slice(row, row + 1)) for row in range(rank, 6, 2)]
        rows = torch.arange(rank, 6, 2)
        batch = MicroBatch(partial(net.loss, rows), {2 * k + rank: loss for k, loss in enumerate(own)})
        optimizer.estimate(net.loss, Share(_kept(sent)), micro_batches=[batch])
    record = optimizer.estimate(net.loss, Share(lambda _: sent[0] + sent[1]), micro_batches=net.in_examples())
    assert record.projected_grads == pytest.approx(expected.projected_grads, rel=1e-9)
    assert record.losses == pytest.approx(expected.losses, rel=1e-12)


def _kept(sent: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def reduce(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    return reduce


class Mlp(nn.Module):
    """A network of two layers, and squared errors that its examples agree about or not."""

    def __init__(self, agreement: float) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
        for parameter in self.parameters():
            parameter.data.normal_(generator=draw).mul_(0.5)
        own, shared = torch.randn(8, 5, generator=draw), torch.randn(1, 5, generator=draw)
        self.inputs = (agreement * shared + (1 - agreement) * own).double()
        self.targets = torch.randn(8, 3, generator=draw).double() * (1 - agreement) + 1

    def loss(self, rows: slice = slice(None)) -> Tensor:
        return (self.net(self.inputs[rows]) - self.targets[rows]).square().sum(1).mean()

    def gradient(self, rows: slice = slice(None)) -> Tensor:
        with torch.enable_grad():
            found = torch.autograd.grad(self.loss(rows), list(self.parameters()))
        return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("agreement", [0.0, 0.8])
def test_the_estimate_is_unbiased_and_its_variance_is_what_theory_says(agreement: float) -> None:
    """Against autograd, at a fixed point, in d = 32 dimensions: the mean of ``g z`` over steps, and its squared error.

    With Gaussian z that is (d + 1) |G|^2 for one shared direction, and d mean|G_i|^2 / N for one an example, both up to
    1 / d of it. One step's has a relative spread of about 1.5, so that the mean over 100 is good to 0.15.
    """
    net = Mlp(agreement)
    gradient = net.gradient()
    own = torch.stack([net.gradient(slice(i, i + 1)) for i in range(8)])
    batches = [MicroBatch(net.loss, {i: partial(net.loss, slice(i, i + 1)) for i in range(8)})]
    dimensions, errors = gradient.numel(), {}
    for estimator, count in ((TwoSided(), 1), (PerExample(), 8)):
        optimizer = MeZO(net.named_parameters(), eps=1e-4, num_queries=count, estimator=estimator, seed=1)
        optimizer.attach(net)
        estimates = []
        for step in range(100):
            record = optimizer.estimate(net.loss, micro_batches=batches)
            total = torch.zeros_like(gradient)
            for query, g in enumerate(record.projected_grads):
                z = [standard(p.shape, key(1, step, query, n)).flatten().double() for n, p in net.named_parameters()]
                total += g * torch.cat(z) / count
            estimates.append(total)
            optimizer.param_groups[0]["step"] += 1
        found = torch.stack(estimates)
        error = (found.mean(0) - gradient).norm() / gradient.norm()
        errors[count] = ((found - gradient).square().sum(1).mean() / gradient.square().sum()).item()
        assert error < 3 * (errors[count] / 100) ** 0.5
    ratio = (own.square().sum(1).mean() / gradient.square().sum()).item()
    assert errors[1] == pytest.approx(dimensions + 1, rel=0.4)
    assert errors[8] / errors[1] == pytest.approx(ratio / 8, rel=0.4)
    assert ratio < 2 if agreement else ratio > 6  # of at least 1 and, N being 8, hardly more than 8


class Centred(nn.Module):
    """A network whose rows depend on each other, unless there is only one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - (self.linear(x).mean(0) if len(x) > 1 else 0)


class Recurrent(nn.Module):
    """A network whose hidden state has the rows in its second dimension, and takes those of all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x[:, None])[0][:, -1]


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Centred, "not those of separate runs.*not independent"), (Recurrent, "the loss fails on its output")],
)
def test_examples_run_one_by_one_where_rows_are_not_independent(network: type[nn.Module], reason: str) -> None:
    net = Mlp(0.0)
    net.net = network().double()
    batches = [MicroBatch(net.loss, {i: partial(net.loss, slice(i, i + 1)) for i in range(8)})]
    optimizer = LOZO(net.named_parameters(), rank=2, eps=EPS, num_queries=8, estimator=PerExample(), seed=4)
    optimizer.attach(net)
    expected = in_a_loop(net, optimizer, list(range(8)))
    with pytest.warns(UserWarning, match=f"once per example from here on.*{reason}"):
        record = optimizer.estimate(net.loss, micro_batches=batches)
    assert record.projected_grads == pytest.approx(expected, rel=1e-6)
    optimizer.estimate(net.loss, micro_batches=batches)  # and without another warning


def test_refusals() -> None:
    net = Mlp(0.0)
    with pytest.raises(ValueError, match="`num_queries` must be an integer, at least 2 with PerExample"):
        LOZO(net.named_parameters(), estimator=PerExample())
    with pytest.raises(ValueError, match="`align_queries` is True, but with PerExample"):
        LOZO(net.named_parameters(), estimator=PerExample(), num_queries=8, align_queries=True)
    optimizer = LOZO(net.named_parameters(), estimator=PerExample(), num_queries=8)
    with pytest.raises(ValueError, match="`evaluations_per_forward` is 4, but with PerExample"):
        optimizer.attach(net, 4)
    with pytest.raises(ValueError, match=r"`estimator` is PerExample\(\), which needs the loss of each example"):
        optimizer.estimate(net.loss)
    optimizer.attach(net)
    own = {e: partial(net.loss, slice(e, e + 1)) for e in range(8)}
    whole = MicroBatch(lambda: net.loss() + 1, own)
    with pytest.raises(ValueError, match=r"the loss of a batch, .*, is not the mean of those of its examples"):
        optimizer.estimate(net.loss, micro_batches=[whole])
    bad = [MicroBatch(net.loss, own | {0: lambda: (own[0](), -1.0)})]
    with pytest.raises(ValueError, match=r"`num_terms`.* must not be negative, got -1"):
        optimizer.estimate(net.loss, micro_batches=bad)
