"""CUDA graphs of the network's forward, with the stand-in of graph_runs.py on the CPU."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_runs import (
    CPUCapture,
    equal,
    inputs,
    language,
    llama,
    mlp,
    seeded,
    steps_of,
    train,
)
from training import assert_equal, weights
from zolightning.evaluation.graph_capture import CudaCapture
from zolightning.evaluation.graphs import GraphedNetwork
from zolightning.evaluation.losses import LossAndTerms
from zolightning.evaluation.outside_memory import OutsideMemory
from zolightning.evaluation.perturbed import Perturbed
from zolightning.optim import EGGROLL, LOZO, MeZO, SubZero, ZerothOrderOptimizer, ZOMuon
from zolightning.optim.estimators import OneSided

METHODS = {
    "mezo": partial(MeZO, lr=1e-2, num_queries=2),
    "one_sided": partial(MeZO, lr=1e-2, num_queries=2, estimator=OneSided(), noise="rademacher", momentum=0.5),
    "eggroll": partial(EGGROLL, lr=1e-2, num_queries=4),
    "lozo": partial(LOZO, lr=1e-2, rank=2),
    "subzero": partial(SubZero, lr=1e-2, rank=2, momentum=0.5, vector_lr=1e-2),
    "zo_muon": partial(ZOMuon, lr=1e-2, rank=2, vector_lr=1e-2),
}


class TestTheSameBits:
    """Six steps, of two lengths, by turns."""

    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_of_methods(self, method: Callable[..., ZerothOrderOptimizer]) -> None:
        batches = [(inputs(2 + step % 2, 4, seed=step),) for step in range(6)]
        plain, graphed, capture = seeded(mlp), seeded(mlp), CPUCapture()
        records = train(graphed, method, batches, capture)
        assert equal(train(plain, method, batches), records)
        assert_equal(weights(plain), weights(graphed))
        kinds = 2 if records[0].forward_passes % 2 else 1  # unperturbed evaluations have graphs of their own
        assert capture.recorded == 2 * kinds
        assert capture.replayed > capture.recorded

    @pytest.mark.parametrize("method", ["mezo", "one_sided", "eggroll", "subzero"])
    def test_of_evaluations_that_share_a_forward(self, method: str) -> None:
        batches = [(inputs(2 + step % 2, 4, seed=step),) for step in range(6)]
        plain, graphed, capture = seeded(mlp), seeded(mlp), CPUCapture()
        expected = train(plain, METHODS[method], batches, None, 2)
        records = train(graphed, METHODS[method], batches, capture, 2)
        assert equal(expected, records)
        assert_equal(weights(plain), weights(graphed))
        # Of three evaluations, two share a forward
        assert capture.recorded == (4 if records[0].forward_passes == 3 else 2)
        assert capture.replayed > capture.recorded

    def test_of_a_language_model(self) -> None:
        batches = [language(3 + step % 2, seed=step) for step in range(4)]
        plain, graphed, capture = seeded(llama), seeded(llama), CPUCapture()
        method = METHODS["mezo"]
        assert equal(train(plain, method, batches), train(graphed, method, batches, capture))
        assert_equal(weights(plain), weights(graphed))
        assert capture.recorded == 2

    @pytest.mark.filterwarnings("ignore:.*torch.jit")
    def test_of_parameters_that_are_perturbed_where_they_lie(self) -> None:
        def half_scripted() -> nn.Module:
            return nn.Sequential(nn.Linear(4, 4), torch.jit.trace(nn.Linear(4, 4), torch.zeros(2, 4)))

        batches = [(inputs(2, 4, seed=step),) for step in range(4)]
        plain, graphed, capture = seeded(half_scripted), seeded(half_scripted), CPUCapture()
        with pytest.warns(UserWarning, match="perturbed in place"):
            expected = train(plain, METHODS["mezo"], batches)
        with pytest.warns(UserWarning, match="perturbed in place"):
            assert equal(expected, train(graphed, METHODS["mezo"], batches, capture))
        assert capture.recorded == 1


class TestWhichGraphs:
    def test_one_for_each_second_sight_of_a_key(self) -> None:
        module, capture = seeded(mlp), CPUCapture()
        step, _ = steps_of(module, capture)
        step(inputs(2, 4))
        assert (capture.recorded, capture.replayed) == (1, 1)  # in the second evaluation, and compared
        step(inputs(2, 4, seed=1))
        step(inputs(2, 4, seed=2))
        assert (capture.recorded, capture.replayed) == (1, 5)
        step(inputs(4, 2).T)  # other strides
        step(inputs(2, 1, 4))
        assert capture.recorded == 3
        with torch.autocast("cpu"):
            step(inputs(2, 4))
        assert capture.recorded == 4

    def test_the_least_used_one_goes_first(self) -> None:
        capture = CPUCapture()
        step, _ = steps_of(seeded(mlp), capture, limit=2)
        with pytest.warns(UserWarning, match="batches have more than 2 shapes"):
            for rows in (1, 1, 2, 3):  # two evaluations a step
                step(inputs(rows, 4))
        assert capture.recorded == 2  # of 1 row and of 2; of 3 only when it comes twice as often as that of 2
        step(inputs(3, 4))
        assert capture.recorded == 3
        before = capture.replayed
        step(inputs(1, 4)), step(inputs(3, 4))
        assert capture.replayed == before + 4
        step(inputs(2, 4))  # used as often as that of 3
        assert (capture.recorded, capture.replayed) == (3, before + 4)

    def test_the_network_does_not_run_where_it_is_replayed(self) -> None:
        runs = []

        class Counting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                runs.append(x.shape)
                return super().forward(x)

        step, _ = steps_of(seeded(lambda: Counting(4, 3)), CPUCapture())
        for seed in range(3):
            step(inputs(2, 4, seed=seed))
        runs.clear()
        step(inputs(2, 4))
        assert not runs

    def test_replays_that_are_compared(self) -> None:
        """The first two, since the second one sees another perturbation, and one in another step."""
        runs = []

        class Counting(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                runs.append(x.shape)
                return super().forward(x)

        module = seeded(lambda: Counting(4, 3))
        optimizer = MeZO(module.parameters(), lr=1e-2, num_queries=4, seed=5)
        optimizer.attach(module)
        optimizer.estimate(partial(module.loss, inputs(1, 4)))  # which finds out where parameters are read
        optimizer.evaluator.graphs = GraphedNetwork(module.net, CPUCapture())
        counts = []
        for seed in range(3):
            runs.clear()
            optimizer.estimate(partial(module.loss, inputs(2, 4, seed=seed)))
            optimizer.step()
            counts.append(len(runs))
        assert counts == [5, 1, 0]  # recording takes two runs

    def test_weights_at_another_address_and_other_attributes(self) -> None:
        class Scaled(nn.Linear):
            scale = 2.0

            def forward(self, x: Tensor) -> Tensor:
                return self.scale * super().forward(x)

        module, plain, capture = seeded(lambda: Scaled(4, 3)), seeded(lambda: Scaled(4, 3)), CPUCapture()
        (step, _), (plain_step, optimizer) = steps_of(module, capture), steps_of(plain, None)
        optimizer.evaluator.graphs = None
        for seed in range(6):
            for net in (module.net, plain.net):
                if seed == 2:
                    net.weight.data = net.weight.data.clone()
                if seed == 4:
                    net.scale = 3.0
            assert equal([step(inputs(2, 4, seed=seed))], [plain_step(inputs(2, 4, seed=seed))])
        assert capture.recorded == 3


class Odd(nn.Linear):
    """A layer that does something which a graph cannot hold."""

    def __init__(self, odd: Callable[["Odd", Tensor], Any]) -> None:
        super().__init__(4, 3)
        self.odd = odd
        self.calls = 0
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor, *_: Any) -> Any:
        output = super().forward(x)
        found = self.odd(self, output)
        return output if found is None else found


class Opaque:
    """An output that is neither a tensor nor a container of tensors."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


_scale = [1.0]  # which is not part of any module


def outgrown(layer: Odd, output: Tensor) -> Tensor:
    return output * _scale[0]


ODD: dict[str, tuple[Callable[[Odd, Tensor], Any], str]] = {
    "reads_back": (
        lambda layer, output: output * 2 if output.sum() > 0 else output,
        r"RuntimeError: called a synchronizing CUDA operation \(test_graphs.py, line \d+: .*output.sum\(\) > 0",
    ),
    "draws": (lambda layer, output: output + 0 * torch.rand_like(output), "it draws random numbers"),
    "writes": (
        lambda layer, output: layer.mean.copy_(output[0])[:0].sum() + output,
        "it changes what its modules hold",
    ),
    "counts": (lambda layer, output: setattr(layer, "calls", layer.calls + 1), "it changes what its modules hold"),
    "returns": (lambda layer, output: Opaque(output), "it returns Opaque"),
    "outgrows": (outgrown, "a replay returned different numbers from a run"),
}


class TestWhatAGraphCannotHold:
    """Each runs without graphs from there on, with the same bits, and one line says why."""

    @staticmethod
    def compare(
        make: Callable[[], nn.Module], message: str, *options: Any, between: Callable[..., Any] = lambda *_: None
    ) -> None:
        records = []
        for is_graphed in (False, True):
            module = seeded(make)
            step, optimizer = steps_of(module, CPUCapture())
            graphs = optimizer.evaluator.graphs
            if not is_graphed:
                optimizer.evaluator.graphs = None
            found = []
            with pytest.warns(UserWarning, match=message) if is_graphed else nullcontext() as caught:
                for seed in range(5):
                    between(seed, module.net)
                    found.append(step(inputs(2, 4, seed=seed), *options))
            records.append(found)
        assert graphs.is_off and len(caught) == 1
        assert equal(*records)

    @pytest.mark.parametrize("name", ODD)
    def test_in_a_forward(self, name: str) -> None:
        odd, message = ODD[name]
        self.compare(lambda: Odd(odd), message, between=lambda step, _: _scale.__setitem__(0, 1.0 + step))

    def test_an_argument(self) -> None:
        self.compare(lambda: Odd(lambda *_: None), "an argument of the network is Opaque", Opaque(inputs(1)))

    def test_a_hook_inside(self) -> None:
        def hook(step: int, net: nn.Module) -> None:
            if step == 2:
                net[0][2].register_forward_hook(lambda *_: None)

        self.compare(lambda: nn.Sequential(mlp()), "`0.2` has a hook", between=hook)

    def test_other_attributes_at_each_step(self) -> None:
        self.compare(mlp, "are replaced at each step", between=lambda step, net: setattr(net, "mark", step))

    def test_gradients(self) -> None:
        module, capture = seeded(mlp), CPUCapture()
        step, optimizer = steps_of(module, capture)
        with pytest.warns(UserWarning, match="`training_step` differentiates"), torch.enable_grad():
            optimizer.evaluator.graphs.evaluate(
                lambda: LossAndTerms(module.loss(inputs(2, 4)), torch.ones(())), [Perturbed({})]
            )
        step(inputs(2, 4))
        assert not capture.recorded


def test_memory_that_a_run_reads_and_has_not_made() -> None:
    table, weight, rows = torch.arange(6.0), torch.ones(2, 3), torch.zeros(2)
    with OutsideMemory() as outside:
        made = torch.zeros(2, 3).add_(weight[:, 1:2])
        torch.stack([made.view(6) + table[None, 1:].sum()] * 2)
    assert set(outside.kept) == {tensor.untyped_storage().data_ptr() for tensor in (table, weight)}
    assert rows.data_ptr() not in outside.kept


class Counting(CudaCapture):
    """Counts recordings and replays."""

    recorded = replayed = 0

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        output, launch = super().record(run)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            launch()

        return output, replay


@pytest.mark.gpu
class TestOnADevice:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
    def test_the_same_bits(self, method: Callable[..., ZerothOrderOptimizer], dtype: torch.dtype) -> None:
        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Tanh(), nn.Linear(128, 32))

        batches = [(inputs(8 + step % 2, 64, seed=step).to("cuda", dtype),) for step in range(8)]
        plain, graphed = seeded(make, dtype, "cuda"), seeded(make, dtype, "cuda")
        counting = Counting(torch.device("cuda", torch.cuda.current_device()))
        assert equal(train(plain, method, batches), train(graphed, method, batches, counting))
        assert_equal(weights(plain), weights(graphed))
        assert counting.replayed > counting.recorded > 1

    def test_a_language_model(self) -> None:
        batches = [tuple(tensor.cuda() for tensor in language(3 + step % 2, seed=step)) for step in range(6)]
        plain, graphed = seeded(llama, torch.bfloat16, "cuda"), seeded(llama, torch.bfloat16, "cuda")
        counting = Counting(torch.device("cuda", torch.cuda.current_device()))
        method = METHODS["mezo"]
        assert equal(train(plain, method, batches), train(graphed, method, batches, counting))
        assert_equal(weights(plain), weights(graphed))
        assert counting.recorded == 2

    def test_a_table_that_a_cache_has_dropped(self) -> None:
        @lru_cache(maxsize=1)
        def table(rows: int) -> Tensor:
            return torch.arange(rows, device="cuda")[:, None] / rows

        class Tabled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * table(len(x))

        batches = [(inputs(8 + step % 2, 64, seed=step).to("cuda", torch.float32),) for step in range(8)]
        plain, graphed = (seeded(lambda: Tabled(64, 64), torch.float32, "cuda") for _ in range(2))
        counting = Counting(torch.device("cuda", torch.cuda.current_device()))
        assert equal(train(plain, METHODS["mezo"], batches), train(graphed, METHODS["mezo"], batches, counting))
        assert counting.recorded == 2

    @pytest.mark.parametrize("name", ["reads_back", "draws", "writes"])
    def test_what_a_graph_cannot_hold(self, name: str) -> None:
        odd, _ = ODD[name]
        module = seeded(lambda: Odd(odd), torch.float32, "cuda")
        step, optimizer = steps_of(module, CudaCapture(torch.device("cuda", torch.cuda.current_device())))
        with pytest.warns(UserWarning, match="`cuda_graphs` is off from here on"):
            step(torch.ones(2, 4, device="cuda"))
        assert optimizer.evaluator.graphs.is_off
        assert torch.cuda.get_sync_debug_mode() == 0
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        step(torch.ones(2, 4, device="cuda"))
