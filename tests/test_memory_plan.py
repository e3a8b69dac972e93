"""What a run is said to need of memory, against what it takes."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import stdev
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from live_bytes import LiveBytes
from zolightning.directions.basis import Basis
from zolightning.directions.second_moment import SecondMoment
from zolightning.evaluation.graph_inputs import Parts
from zolightning.memory import (
    BatchShape,
    kept_direction_bytes,
    plan,
    sketch_bytes,
    state_bytes,
    trained_by,
    trained_whole,
    weight_bytes,
    with_bases_of_inputs,
)
from zolightning.memory_alternatives import (
    LORA_RANK,
    alternatives,
    layer,
    on_quantized,
    with_lora,
    with_scales,
)
from zolightning.messages import in_units
from zolightning.network.adapters import add_adapter, lora_settings
from zolightning.network.quantization import quantize, quantized_linears
from zolightning.optim import LOZO, ZOMOPI, HiZOO, MeZO, StepRecord, SubspaceOptimizer, SubZero

SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 172, "num_key_value_heads": 2},
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 64},
}


def model(architecture: str = "llama", dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> PreTrainedModel:
    config = AutoConfig.for_model(architecture, **SIZES, **WIDTHS[architecture])
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.mark.filterwarnings("ignore:`update_precision` is 'native'")
def test_state_is_what_is_there_when_it_is_largest(
    method: Callable[..., Any], make_problem: Callable[..., Any]
) -> None:
    problem = make_problem(torch.bfloat16)
    method = partial(method, lr=1e-6)  # a large step would be added to the weights at once, and keep no core
    optimizer = method(problem.parameters())
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False
    optimizer.attach(problem)
    expected = state_bytes(trained_by(optimizer), method)[:2]
    assert optimizer.state_bytes() == 0  # nothing was done to the run's own
    optimizer.estimate(problem)
    optimizer.step()
    optimizer.fold()  # leaves low words, where there are any, beside the next core
    optimizer.estimate(problem)
    optimizer.step()
    assert (optimizer.state_bytes(), optimizer.host_bytes()) == expected


@pytest.mark.parametrize(("left_state", "count"), [("reset", 1), ("keep", 3)])
def test_blocks_at_rest_count_where_they_keep_their_state(
    left_state: Any, count: int, make_problem: Callable[..., Any]
) -> None:
    problem = make_problem()
    optimizer = MeZO(problem.parameters())
    optimizer.set_blocks([[parameter] for parameter in problem.parameters()], left_state)
    optimizer.activate([1])
    assert len(trained_by(optimizer)) == count


def test_what_moves_beside_blocks_keeps_no_curvature(make_problem: Callable[..., Any]) -> None:
    problem = make_problem(torch.bfloat16)
    optimizer = HiZOO(problem.parameters())
    optimizer.attach(problem)
    optimizer.set_blocks([[problem.matrix], [problem.vector]])
    optimizer.activate([0])
    expected = state_bytes(trained_by(optimizer), HiZOO)
    optimizer.estimate(problem)
    optimizer.step()
    assert (optimizer.state_bytes(), 0) == expected[:2]
    assert expected.device == 6 * problem.matrix.numel() + 2 * problem.images.numel()


def test_a_method_may_divide_by_the_spread_of_its_losses() -> None:
    class ByTheSpread(MeZO):
        def update(self, record: StepRecord) -> None:
            super().update(replace(record, lr=tuple(lr / stdev(record.losses) for lr in record.lr)))

    weights = trained_whole([torch.zeros(8, 6, dtype=torch.bfloat16)])
    assert state_bytes(weights, ByTheSpread) == state_bytes(weights, MeZO)


def test_a_method_may_read_numbers_of_its_tensors() -> None:
    class ByTheNorm(MeZO):
        def update(self, record: StepRecord) -> None:
            norms = [parameter.norm().item() for _, _, parameter in self.trainable()]
            super().update(replace(record, lr=tuple(lr / (1 + sum(norms)) for lr in record.lr)))

    weights = trained_whole([torch.ones(8, 6, dtype=torch.bfloat16, device="meta")])
    assert state_bytes(weights, partial(ByTheNorm, momentum=0.9)) == state_bytes(weights, partial(MeZO, momentum=0.9))


def test_state_in_host_memory() -> None:
    weights = trained_whole([torch.zeros(8, 6, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)])
    on_device, nothing, *_ = state_bytes(weights, partial(LOZO, rank=2))
    assert state_bytes(weights, partial(LOZO, rank=2, offload_low_words=True))[:2] == (on_device - 8 * 6 * 2, 8 * 6 * 2)
    assert state_bytes(weights, partial(LOZO, rank=2), offload_low_words=True)[:2] == (on_device - 8 * 6 * 2, 8 * 6 * 2)
    assert nothing == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", WIDTHS)
def test_activations_of_a_forward_pass(architecture: str, dtype: torch.dtype) -> None:
    network = model(architecture, dtype)
    ids = torch.arange(8 * 64).view(8, 64)
    padded = torch.ones_like(ids)
    padded[0, :2] = 0
    with torch.no_grad(), LiveBytes() as live:
        network(input_ids=ids, attention_mask=padded, logits_to_keep=torch.tensor([63]), use_cache=False)
    estimated = plan(network, [], MeZO, BatchShape(8, 64)).activations
    assert 0.85 * estimated < live.peak <= estimated


def test_logits_of_a_forward_pass() -> None:
    """Where they outweigh the activations: as the head writes them, in a copy, and normalised in float32."""
    network = model(dtype=torch.float32)
    ids = torch.arange(64 * 4).view(64, 4)
    with torch.no_grad(), LiveBytes() as live:
        logits = network(input_ids=ids, use_cache=False).logits
        torch.log_softmax(logits[ids >= 0], dim=-1, dtype=torch.float32)
    assert live.peak == pytest.approx(plan(network, [], MeZO, BatchShape(64, 4, 4)).logits, rel=0.02)


@pytest.mark.parametrize("method", [MeZO, partial(LOZO, rank=2), partial(ZOMOPI, rank=8, power_rank=4)])
def test_cuda_graphs_allocate_the_forward_again_and_copy_factors(method: Any) -> None:
    network, batch = model(), BatchShape(16, 32)
    trained = trained_whole(network.parameters())
    found = plan(network, trained, method, batch, cuda_graphs=True)
    plain = plan(network, trained, method, batch)
    assert plain.graphs == 0 and "graphs" not in str(plain)
    assert found.peak == plain.peak + found.graphs and f"graphs {in_units(found.graphs)}" in str(found)
    optimizer = method(network.named_parameters())
    optimizer.fold_every_step = False
    for group in optimizer.param_groups if isinstance(optimizer, SubspaceOptimizer) else ():
        for parameter, matrix in optimizer.split(group)[0].values():
            optimizer.core(parameter, matrix)
    tables = Parts([optimizer.perturbations(0, 1)], torch.device("cpu")).tables
    copied = sum(
        table.nbytes for table in tables if table.dtype != torch.int32 and table.numel() > 1
    )  # but the noise's
    assert found.graphs == plain.scratch + plain.activations + plain.logits + copied
    assert plan(network, trained, method, cuda_graphs=True).graphs is None


class Reads(nn.Module):
    """An embedding, and two maps that have their inputs on different sides of their weights."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, inputs)
        self.linear, self.across = nn.Linear(inputs, 12), Conv1D(5, inputs)

    def forward(self) -> Tensor:
        rows = self.embedding.weight
        return self.linear(rows).float().square().mean() + self.across(rows).float().square().mean()


@pytest.mark.parametrize(("inputs", "count"), [(40, 4), (100, 4), (72, 4)])
def test_sketches_of_what_layers_read(inputs: int, count: int) -> None:
    moment, module = SecondMoment(inputs, count, 0, "w", torch.device("cpu")), Reads(inputs)
    weights = with_bases_of_inputs(module, trained_whole(module.parameters()))
    assert sketch_bytes(weights, count) == 2 * (moment.test.nbytes + moment.product.nbytes)
    moment.add(torch.rand(200, inputs))
    kept = moment.leading(count)
    assert kept_direction_bytes(weights, count) == 2 * (kept.directions.nbytes + kept.values.nbytes + 4)


@pytest.mark.parametrize(
    "method", [partial(LOZO, rank=2, momentum=0.9), partial(SubZero, rank=4), partial(ZOMOPI, rank=6, power_rank=3)]
)
def test_state_with_bases_of_inputs(method: Any) -> None:
    """The factor has as many rows as there are inputs, and the core as there are outputs, for any method."""
    module = Reads(40).bfloat16()
    optimizer = method(module.named_parameters(), lr=1e-6)
    optimizer.attach(module)
    optimizer.fold_every_step = False
    expected = state_bytes(with_bases_of_inputs(module, trained_by(optimizer)), method)
    sides = {module.linear.weight: "right", module.across.weight: "left"}
    ranks = {weight: optimizer.matrix_of(weight).rank for weight in sides}
    optimizer.resample({weight: Basis(**{side: torch.rand(40, ranks[weight])}) for weight, side in sides.items()})
    for _ in range(2):
        optimizer.fold()  # leaves low words beside the next core
        optimizer.estimate(module)
        optimizer.step()
    assert optimizer.state_bytes() == expected.device


def test_networks_of_other_kinds_are_not_estimated() -> None:
    found = plan(nn.Linear(4, 3), [], MeZO, BatchShape(8, 64))
    assert found.activations is None and found.logits is None and found.weights == found.peak == 60
    assert str(found).endswith("activations not estimated, logits not estimated")
    assert plan(model(), [], MeZO).activations is None  # the batch is not known


def test_a_model_of_shapes_only_has_the_same_plan() -> None:
    for method in (partial(MeZO, lr=1e-3), partial(ZOMOPI, rank=8, power_rank=4)):
        real, shapes = model(), model(device="meta")
        batch = BatchShape(16, 32, 2)
        found = plan(real, trained_whole(real.parameters()), method, batch)
        assert found == plan(shapes, trained_whole(shapes.parameters()), method, batch)
        assert found.peak == found.certain + found.activations + found.logits > 0


def test_other_ways_to_train() -> None:
    """Sizes of adapters are those of a model that has them."""
    network, batch = model(device="meta"), BatchShape(16, 32)
    found = alternatives(network, trained_whole(network.parameters()), partial(MeZO, lr=1e-3), batch)
    whole_plan = plan(network, trained_whole(network.parameters()), MeZO, batch)
    assert found["method.update_precision native"].state == 0
    one_layer = found["one layer (scope DominantLayer)"]
    assert one_layer.state == 2 * sum(p.numel() for p in network.model.layers[0].parameters())
    assert len(layer(network)) == len(list(network.model.layers[0].parameters()))
    offloaded = found["method LOZO, offload_low_words true"]
    assert offloaded.host == 2 * sum(p.numel() for p in network.parameters() if p.ndim == 2)
    assert all(other.peak < whole_plan.peak for other in found.values())

    adapted = model()
    targets = [name for name, m in adapted.named_modules() if isinstance(m, nn.Linear) and "layers" in name]
    add_adapter(adapted, lora_settings(LORA_RANK, 16, list(targets)))
    adapters = [p for name, p in adapted.named_parameters() if "lora" in name]
    lora = with_lora(network, MeZO, batch)
    assert lora.weights == whole_plan.weights + 2 * sum(p.numel() for p in adapters)
    assert lora.state == 2 * sum(p.numel() for p in adapters)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base(kind: Any) -> None:
    """As it is computed for a model that is not, so it is of one that is."""
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    network, plain = model(), model(device="meta")
    quantize(network, kind)
    batch, bare = BatchShape(16, 32), plan(plain, [], MeZO)
    lora = with_lora(plain, MeZO, batch)
    found, adapters = on_quantized(lora, plain, kind), lora.weights - bare.weights
    assert found.weights - adapters == plan(network, [], MeZO).weights
    assert found.scratch == plan(network, [], MeZO).scratch == 2 * 64 * 172
    assert found.activations == plan(network, [], MeZO, batch).activations
    beside = on_quantized(bare, plain, kind, layer(plain)).weights - on_quantized(bare, plain, kind).weights
    # What trains stays as it is.
    assert beside == weight_bytes(plain.model.layers[0]) - weight_bytes(network.model.layers[0])
    scales = trained_whole(linear.weight_scale for _, linear in quantized_linears(network))
    assert with_scales(plain, kind, MeZO, batch) == plan(network, scales, MeZO, batch)
    assert "adapters, model.quantization nf4" not in alternatives(network, [], MeZO, batch)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method",
    [
        partial(MeZO, lr=1e-6),
        partial(MeZO, lr=1e-6, momentum=0.9),
        partial(LOZO, lr=1e-6, rank=4),
        partial(LOZO, lr=1e-6, rank=4, offload_low_words=True),
        partial(ZOMOPI, lr=1e-6, rank=16, power_rank=8),
    ],
)
def test_what_a_gpu_allocates(method: Any) -> None:
    """Peaks of steps and folds are the plan's, give or take what libraries and rounding of blocks take."""
    sizes = SIZES | {"vocab_size": 32_000, "hidden_size": 1024, "num_hidden_layers": 4}
    config = AutoConfig.for_model("llama", **sizes, intermediate_size=4096, num_key_value_heads=4)
    gc.collect()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    batch = BatchShape(16, 128)
    ids = torch.randint(32_000, (16, 128), device="cuda")

    def loss() -> Tensor:
        logits = network(input_ids=ids, logits_to_keep=1, use_cache=False).logits[:, 0]
        return -torch.log_softmax(logits, dim=-1, dtype=torch.float32)[:, 0].mean()

    optimizer = method(network.named_parameters())
    optimizer.attach(network)
    planned = plan(network, trained_by(optimizer), method, batch)
    assert torch.cuda.memory_allocated() - before == pytest.approx(planned.weights, rel=0.01)
    if isinstance(optimizer, SubspaceOptimizer):
        optimizer.fold_every_step = False
    for step in range(3):
        optimizer.estimate(loss)
        optimizer.step()
        if step < 2:
            optimizer.fold()
        if step == 0:
            torch.cuda.reset_peak_memory_stats()  # of the first one: reads are found, state is made
    assert (optimizer.state_bytes(), optimizer.host_bytes()) == (planned.state, planned.host)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert held >= planned.weights + planned.state
    assert planned.weights + planned.state <= peak <= 1.05 * planned.peak + 64 * 2**20
