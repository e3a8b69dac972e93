"""``zolightning doctor``: figures against NumPy, what it says of them, and that it leaves everything as it was."""

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cli_runs import NAME, Runs
from optimizer_steps import standard
from zolightning.callbacks import LearningRateProbe, ZerothOrder
from zolightning.commands.doctor import _difference
from zolightning.commands.findings import Examination, Output, ParameterGroup, findings
from zolightning.commands.rounding import Survival, loss_noise, perturbation_survival, spacing, update_survival
from zolightning.commands.trainer import Trainer
from zolightning.kernels.noise import key
from zolightning.optim import LOZO, MeZO
from zolightning.optim.estimators import Estimator, ForwardGradient, OneSided, Population, TwoSided, ZScores

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`update_precision` is 'native'"),
    pytest.mark.usefixtures("fresh_process"),
]
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}  # significant ones


class Net(nn.Module):
    """A matrix of small numbers, and gains near 1."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = nn.Parameter((0.05 * torch.randn(90, 40, generator=generator)).to(dtype))
        self.gains = nn.Parameter((1 + 0.1 * torch.randn(400, generator=generator)).to(dtype))

    def forward(self) -> Tensor:
        return sum(parameter.double().square().sum() + parameter.double().sum() for parameter in self.parameters())


def rounded(numbers: np.ndarray, bits: int) -> np.ndarray:
    """To the nearest numbers of so many significant bits, in float64."""
    apart = 2.0 ** (np.floor(np.log2(np.abs(numbers))) + 1 - bits)
    return np.rint(numbers / apart) * apart


def survived(weight: Tensor, name: str, scale: float, bits: int) -> tuple[float, float]:
    """Share of the elements that move when ``scale * z`` is added, and how far they move along it."""
    before, meant = (
        weight.detach().double().numpy(),
        scale * standard(weight.shape, key(0, 0, 0, name)).double().numpy(),
    )
    real = rounded(before + meant, bits) - before
    return np.mean(real[meant != 0] != 0), (real * meant).sum() / (meant * meant).sum()


@pytest.mark.parametrize(("dtype", "eps"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-4), (torch.float32, 3e-8)])
def test_what_is_read_of_perturbations(dtype: torch.dtype, eps: float) -> None:
    net = Net(dtype)
    optimizer = MeZO(net.named_parameters(), eps=eps, seed=0)
    found = perturbation_survival(optimizer, net)
    for name, parameter in net.named_parameters():
        share, size = survived(parameter, name, eps, BITS[dtype])
        assert (found[name].share, found[name].size) == pytest.approx((share, size), abs=0.01)
    assert found["gains"].share < 0.35 < 0.8 < found["matrix"].share
    assert optimizer.param_groups[0]["eps"] == eps


@pytest.mark.parametrize(
    ("dtype", "precision", "scale", "bits"),
    [
        (torch.bfloat16, "native", 2e-4, 8),
        (torch.bfloat16, "low_byte", 1e-6, 16),
        (torch.bfloat16, "exact", 3e-9, 24),
        (torch.float16, "native", 3e-5, 11),
        (torch.float16, "exact", 3e-9, 24),
        (torch.float32, "exact", 3e-9, 24),
    ],
)
def test_what_is_kept_of_updates(dtype: torch.dtype, precision: Any, scale: float, bits: int) -> None:
    net = Net(dtype)
    optimizer = MeZO(net.named_parameters(), seed=0, update_precision=precision)
    optimizer.attach(net)
    record = replace(optimizer.estimate(net), projected_grads=(10.0,))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    found = update_survival(optimizer, record, [scale / 10])
    for name, parameter in net.named_parameters():
        share, size = survived(parameter, name, -scale, bits)
        assert (found[name].share, found[name].size) == pytest.approx((share, size), abs=0.01)
    assert found["gains"].share < 0.5 < found["matrix"].share < 0.99
    assert optimizer.update_precision == precision and not optimizer.state and optimizer.param_groups[0]["step"] == 0
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize(("projected_grad", "share"), [(0.0, math.nan), (1e-9, 0.0)])
def test_of_an_update_that_is_lost_nothing_is_kept(projected_grad: float, share: float) -> None:
    """Of one of no length no share is known."""
    net = Net(torch.bfloat16)
    optimizer = MeZO(net.named_parameters(), seed=0, update_precision="native")
    optimizer.attach(net)
    record = replace(optimizer.estimate(net), projected_grads=(projected_grad,))
    found = update_survival(optimizer, record, [0.1])["gains"]
    assert (found.share, found.size) == pytest.approx((share, share), abs=0, nan_ok=True)


def test_a_large_weight_is_compared_with_itself() -> None:
    net = nn.Linear(300, 300)  # of which some elements are examined
    found = perturbation_survival(MeZO(net.named_parameters(), eps=1e-3, seed=0), lambda: torch.zeros(()))["weight"]
    assert found.size == pytest.approx(1, abs=1e-3) and found.meant < 300 * 300 * 0.8


def test_low_rank_directions_are_looked_at_in_built_weights() -> None:
    net = Net(torch.bfloat16)
    optimizer = LOZO(net.named_parameters(), lr=1e-3, rank=2, seed=0)
    optimizer.attach(net)
    record = optimizer.estimate(net)
    basis = optimizer.basis(net.matrix)
    core = standard(basis.core_shape(net.matrix.shape), key(0, 0, 0, "matrix")).bfloat16().double()
    left, right = (factor.double() for factor in basis.factors(1e-3 * core.bfloat16()))
    before, meant = net.matrix.detach().double().numpy(), (left @ right.T).numpy()
    real = rounded(before + meant, 8) - before
    found = perturbation_survival(optimizer, net)["matrix"]
    assert found.size == pytest.approx((real * meant).sum() / (meant * meant).sum(), abs=0.01)
    assert found.share == pytest.approx(np.mean(real[meant != 0] != 0), abs=0.01)
    kept = update_survival(optimizer, record, [1e-3])
    assert kept["matrix"].size == pytest.approx(1, abs=1e-3) and not optimizer.state[net.matrix].get("low_word", 0)

    few = torch.ones(1, 40, dtype=torch.bfloat16)  # rows: their product with the weight is perturbed, not the weight

    def loss() -> Tensor:
        return F.linear(few, net.matrix).double().sum() + net.gains.double().sum()

    assert list(perturbation_survival(optimizer, loss)) == ["gains"]
    tied = perturbation_survival(optimizer, lambda: loss() + F.embedding(torch.tensor([3]), net.matrix).double().sum())
    assert tied["matrix"] == found


@pytest.mark.parametrize("step", [0.0, 1e-2])
def test_noise_of_a_loss(step: float) -> None:
    """That of a loss rounded to multiples of `step` has a standard deviation of step / sqrt(12)."""
    net = Net(torch.float64)

    def loss() -> Tensor:
        return (net() / step).round() * step if step else net()

    optimizer = MeZO(net.named_parameters(), eps=0.05, seed=0)
    optimizer.attach(net)
    noise = loss_noise(optimizer, loss)
    assert step / math.sqrt(12) / 2 <= noise <= 2 * step / math.sqrt(12) + 1e-6


@pytest.mark.parametrize("estimator", [TwoSided(), OneSided(), Population(), ZScores(), ForwardGradient()])
def test_the_difference_of_two_losses(estimator: Estimator) -> None:
    """Whatever projected gradients are made of it."""
    net = Net(torch.float64)
    optimizer = MeZO(net.named_parameters(), seed=0, num_queries=3, estimator=estimator)
    optimizer.attach(net)
    records = []
    for _ in range(2):
        records.append(optimizer.estimate(net))
        optimizer.step()
    pairs = [(one - two) ** 2 for record in records for one, two in combinations(record.losses, 2)]
    expected = None if isinstance(estimator, ForwardGradient) else pytest.approx(np.sqrt(np.mean(pairs)))
    assert _difference(optimizer, records) == expected


def test_spacing() -> None:
    assert spacing(nn.Parameter(torch.full((4,), 1.5, dtype=torch.bfloat16))) == 2**-7
    assert spacing(nn.Parameter(torch.full((4,), 0.9, dtype=torch.float16))) == 2**-11


GROUP = ParameterGroup(
    "norm.weight", torch.bfloat16, 64, 1.0, 0.0078, Survival(100, 100, 1.0, 1.0), Survival(100, 100, 1.0, 1.0)
)
SEEN = Examination(
    groups=[GROUP],
    eps=1e-3,
    update_precision="exact",
    loss=0.7,
    difference=0.01,
    noise=1e-5,
    output=Output(100.0, "net.0", torch.bfloat16),
    step_seconds=1.0,
    steps=1000,
    lr=1e-6,
    measured_lr=2e-6,
    cost=0.01,
    sets_lr=False,
)
LOST = Survival(100, 4, 0.05, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        (
            {"groups": [replace(GROUP, perturbation=LOST)]},
            ["with `method.eps` 0.001 most elements of norm.weight (4% move; bfloat16 steps by 0.008)"],
        ),
        (
            {"groups": [replace(GROUP, update=LOST)], "update_precision": "native"},
            ["norm.weight (5% is kept); set `method.update_precision` to exact"],
        ),
        ({"groups": [replace(GROUP, update=LOST)]}, ["norm.weight (5% is kept); steps are too small"]),
        ({"groups": [replace(GROUP, dtype=torch.float16, largest=2e4)]}, ["norm.weight reaches 20,000 when perturbed"]),
        ({"output": Output(3e4, "net.0", torch.float16)}, ["net.0 outputs 30,000, but float16 ends at 65,504"]),
        ({"noise": 5e-3}, ["Rounding moves each loss by 0.005, and two losses of a step differ by 0.01"]),
        ({"difference": None, "noise": 1.0}, []),
        ({"difference": 0.0}, ["The loss is the same whatever is added"]),
        ({"lr": 2e-5}, ["`method.lr` 2e-05 is 10 times what was measured for 1,000 steps: the noise of the run would"]),
        ({"lr": 1e-7}, ["`method.lr` 1e-07 is 20 times smaller than what was measured"]),
        ({"lr": 2e-5, "sets_lr": True}, []),
        ({"lr": 2e-5, "steps": 17}, ["Try 2e-06, or --lr_probe LearningRateProbe."]),
        ({"lr": 2e-5, "steps": 16}, ["Try 2e-06."]),  # in all of which nothing would move
        ({"lr": 1e-7, "steps": 1}, ["than what was measured for 1 step, in which little will be learned. Try 2e-06."]),
        ({"measured_lr": None}, ["No learning rate was found"]),
    ],
)
def test_findings(changes: dict[str, Any], words: list[str]) -> None:
    found = list(findings(replace(SEEN, **changes)))
    assert len(found) == len(words)
    assert all(some in line for some, line in zip(words, found, strict=True))


def examined(module: Any, loader: Iterable[Any], folder: Path, steps: int = 40, **settings: Any) -> None:
    module.train_dataloader = lambda: loader
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        max_steps=steps,
        min_steps=steps,
        **settings,
    )
    trainer.doctor(module)


@pytest.mark.parametrize("probes", [[], [LearningRateProbe(num_steps=3, num_examples=8)]])
def test_nothing_is_trained_and_nothing_written(
    probes: list[Any], make_regression: Any, regression_data: Any, tmp_path: Path, capsys: Any
) -> None:
    module = make_regression().bfloat16()
    module.net[0].bias.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in module.named_parameters()}
    method = ZerothOrder(partial(MeZO, lr=1e-4, momentum=0.9))
    examined(module, regression_data(), tmp_path, precision="bf16-true", callbacks=[*probes, method])
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
    assert module.training and "training_step" not in vars(module) and not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "unfrozen parameters: 26 of 31 parameters train" in printed and "40 steps" in printed
    (matrices,) = (line for line in printed.splitlines() if line.startswith("net.*.weight"))
    assert matrices.split()[1:3] == ["25", "bfloat16"] and matrices.split()[-2:] == ["100.0%", "100.0%"]
    assert ("times smaller than what was measured" in printed) == (not probes)


def test_a_short_run_is_measured_in_fewer_steps(
    make_regression: Any, regression_data: Any, tmp_path: Path, capsys: Any
) -> None:
    method = ZerothOrder(partial(MeZO, lr=1e-9))
    examined(make_regression(), regression_data(), tmp_path, steps=3, callbacks=[method])
    printed = capsys.readouterr().out
    assert " measured for 3 steps, try " in printed and "LearningRateProbe" not in printed
    with pytest.raises(Exception, match="`doctor` measures in the steps before a run's last one, but the run has 1"):
        examined(make_regression(), regression_data(), tmp_path, steps=1, callbacks=[method])


def test_a_rate_is_measured_for_all_steps_of_the_run(
    make_regression: Any, regression_data: Any, tmp_path: Path, capsys: Any
) -> None:
    """Also of one in which those that measure would be most: it falls with the root of their number."""
    rates = []
    for steps in (10, 40):
        method = ZerothOrder(partial(MeZO, lr=1e-4))
        examined(make_regression(), regression_data(), tmp_path, steps, callbacks=[method])
        rates.append(float(re.search(rf"(\S+) measured for {steps} steps", capsys.readouterr().out)[1]))
    assert rates[0] == pytest.approx(2 * rates[1], rel=0.05)


def test_a_loss_that_is_not_finite_is_refused_by_name(
    make_regression: Any, regression_data: Any, tmp_path: Path
) -> None:
    module = make_regression()
    with torch.no_grad():
        module.net[3].weight.fill_(3e38)
        module.net[0].weight.fill_(1.0)
    with pytest.raises(Exception, match=r"The loss is (inf|nan) before the first step, and net\.3 is the first to out"):
        examined(module, regression_data(), tmp_path, callbacks=[ZerothOrder(partial(MeZO, lr=1e-3))])


def test_command_line(runs: Runs) -> None:
    probe = ("--lr_probe", "LearningRateProbe", "--lr_probe.num_steps", 2, "--lr_probe.num_examples", 4)
    printed = runs("doctor", *probe)
    for words in ("MeZO, lr 0.1", "layers.*.mlp.up_proj.weight", "rounding moves each by", "largest output", "6 steps"):
        assert words in printed
    assert "norm.weight" in printed.partition("Perturbations are lost")[2]
    assert not (runs.folder / "logs" / NAME).exists()

    assert runs.refused("doctor", method=None).startswith("error: `method` is not given, but `doctor` examines")
