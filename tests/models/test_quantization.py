"""A base quantised to 8 and 4 bits: what it computes, and what trains beside it, is saved, restored and exported."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from training import Save, weights
from zolightning import CausalLM
from zolightning.callbacks import (
    KeepLedger,
    RunOverview,
    SubspaceResampling,
    TrainLayers,
    TrainParameters,
    ZerothOrder,
)
from zolightning.checkpoints.replay import replay
from zolightning.memory import weight_bytes
from zolightning.models import answer_log_probs
from zolightning.network.quantization import Int8Linear, QuantizedLinear, num_weights, quantize, quantized_linears
from zolightning.optim import LOZO, MeZO
from zolightning.scopes import LoRA

EXAMPLES = [([5, 9, 3], [[6], [11]]), ([2, 4], [[6], [11]]), ([7, 7, 8, 2], [[6], [11]]), ([12], [[6], [11]])]
LINEARS_OF_A_LAYER = 7


@pytest.fixture(params=["int8", "nf4"])
def kind(request: pytest.FixtureRequest) -> Any:
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes (the extra `quantization`)")
    return request.param


class Data(L.LightningDataModule):
    num_classes = 2

    def __init__(self, batch: dict[str, Any]) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> DataLoader:
        return DataLoader([self.batch] * 2, batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture
def data(make_batch: Callable[..., dict]) -> Data:
    return Data(make_batch(EXAMPLES, [1, 0, 1, 0], prompt_only=True))


def log_probs(model: PreTrainedModel, data: Data) -> Tensor:
    with torch.no_grad():
        return answer_log_probs(model, data.batch)[0]


def rounded(weight: Tensor, kind: str) -> Tensor:
    if kind == "int8":
        scale = (weight.abs().amax(dim=1) / 127).bfloat16().float()
        zero = torch.zeros(len(scale), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
    from bitsandbytes import functional

    # The nearest of 16 levels, which the library lists; its own unpacking is wrong where rows cut blocks.
    levels = functional.get_4bit_type("nf4", device="cpu")
    blocks = weight.bfloat16().float().view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    return (levels[((blocks / scale)[..., None] - levels).abs().argmin(dim=-1)] * scale).view_as(weight)


@pytest.mark.parametrize("architecture", ["llama", "opt"])  # tied and no biases; biases
def test_computes_with_rounded_weights(
    kind: Any, architecture: str, make_model: Callable[..., PreTrainedModel], data: Data
) -> None:
    model, reference = make_model(architecture), make_model(architecture)
    before = weights(model)
    quantize(model, kind)
    linears = dict(quantized_linears(model))
    for name in linears:
        linear = reference.get_submodule(name)
        linear.weight.data = rounded(linear.weight.data, kind)

    assert torch.equal(log_probs(model, data), log_probs(reference, data))
    assert not torch.equal(log_probs(model, data), log_probs(make_model(architecture), data))
    # Everything else is as it was, and what the scales are survives another precision.
    kept = weights(model)
    assert all(torch.equal(kept[n], w) for n, w in before.items() if n.removesuffix(".weight") not in linears)
    again = dict(model.bfloat16().float().named_parameters())
    assert all(torch.equal(again[f"{name}.weight_scale"], kept[f"{name}.weight_scale"]) for name in linears)


def test_takes_a_half_and_a_quarter_of_bfloat16(kind: Any, make_model: Callable[..., PreTrainedModel]) -> None:
    model = make_model().bfloat16()
    total = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, kind)
    linears = [linear for _, linear in quantized_linears(model)]
    stored = sum(p.numel() * p.element_size() for linear in linears for p in linear.parameters())
    in_bfloat16 = sum(2 * linear.in_features * linear.out_features for linear in linears)
    # a scale for 32 or 48 codes here, and for 64
    low, high = (0.5, 0.5 + 1 / 32) if kind == "int8" else (0.25, 0.25 + 1 / 60)
    assert low < stored / in_bfloat16 <= high
    assert len(linears) == 2 * LINEARS_OF_A_LAYER
    assert num_weights(model) == total


@pytest.fixture
def fit(tiny_folder: Path, make_trainer: Any, data: Data) -> Callable[..., tuple[CausalLM, L.Trainer]]:
    def fit(
        kind: Any, *scope: L.Callback, module: CausalLM | None = None, ckpt_path: Any = None, **options: Any
    ) -> tuple[CausalLM, L.Trainer]:
        method = options.pop("method", partial(MeZO, lr=1e-2))
        module = module or CausalLM(str(tiny_folder), quantization=kind)
        callbacks = [*scope, ZerothOrder(method), *options.pop("callbacks", ())]
        settings = {"max_steps": 2, "precision": "bf16-true", "limit_val_batches": 0} | options
        trainer = make_trainer(callbacks=callbacks, **settings)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, trainer

    return fit


@pytest.mark.parametrize("method", [partial(MeZO, lr=1e-2), partial(LOZO, lr=1e-2, rank=2)], ids=["mezo", "lozo"])
def test_a_layer_trains_as_it_was_before_and_the_rest_stays_quantised(
    kind: Any, method: Any, fit: Any, tiny_folder: Path, data: Data, make_trainer: Any, tmp_path: Path
) -> None:
    resampling = [SubspaceResampling(interval=3)] if method.func is LOZO else []
    fit = partial(fit, kind, TrainLayers([1]), *resampling, method=method)
    untrained = weights(CausalLM(str(tiny_folder), quantization=kind))
    original = weights(CausalLM(str(tiny_folder), dtype="bfloat16"))
    at_first: dict[str, Tensor] = {}
    look = LambdaCallback(on_train_start=lambda _, module: at_first.update(weights(module)))
    module, trainer = fit(max_steps=4, callbacks=[look, Save(2, tmp_path / "half.ckpt")])
    after = weights(module)

    layer = {name: weight for name, weight in original.items() if ".layers.1." in name}
    assert len(layer) == LINEARS_OF_A_LAYER + 2
    for name, weight in layer.items():
        assert torch.equal(at_first[name], weight)
        assert after[name].dtype == torch.bfloat16 and not torch.equal(after[name], weight)
    assert all(torch.equal(after[n], untrained[n].to(after[n].dtype)) for n in after.keys() - layer.keys())
    assert len(list(quantized_linears(module))) == LINEARS_OF_A_LAYER

    # Resumed is not stopped, tested and exported is what was trained: in models made anew.
    resumed, _ = fit(max_steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(weight, after[name]) for name, weight in resumed.named_parameters())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    tester, fresh = make_trainer(precision="bf16-true"), CausalLM(str(tiny_folder), quantization=kind)
    tester.test(fresh, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert all(torch.equal(weight, after[name]) for name, weight in fresh.named_parameters())
    module.export(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.bfloat16)
    assert {type(child) for child in exported.modules()} & {QuantizedLinear, Int8Linear} == set()
    assert torch.equal(log_probs(exported, data), log_probs(module.model.eval(), data))


def test_adapters_train_beside_it(kind: Any, fit: Any, tiny_folder: Path, tmp_path: Path) -> None:
    untrained = weights(CausalLM(str(tiny_folder), quantization=kind))
    scope = partial(TrainLayers, "all", LoRA(2))
    module, _ = fit(kind, scope(), max_steps=4, callbacks=[Save(2, tmp_path / "half.ckpt")])
    after = weights(module)
    moved = {n for n, w in after.items() if ".lora_" in n and w.any()}
    assert len(moved) == 2 * 2 * 2
    base = {name.replace(".base_layer", ""): weight for name, weight in after.items() if name not in moved}
    assert base.keys() == untrained.keys()
    assert all(torch.equal(weight, untrained[name].to(weight.dtype)) for name, weight in base.items())

    resumed, _ = fit(kind, scope(), max_steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(weight, after[name]) for name, weight in resumed.named_parameters())
    module.export(tmp_path / "exported")
    assert (tmp_path / "exported/adapter_model.safetensors").is_file()


def test_scales_alone_train(kind: Any, fit: Any, tiny_folder: Path, data: Data, tmp_path: Path) -> None:
    untrained = weights(CausalLM(str(tiny_folder), quantization=kind))
    eps = {"int8": 3e-4, "nf4": 3e-2}[kind]  # a twentieth of the scales
    method = partial(MeZO, lr=eps, eps=eps, normalize=True)
    fit = partial(fit, kind, TrainParameters([r"weight_scale$"]), method=method)
    module, _ = fit(max_steps=4, callbacks=[Save(2, tmp_path / "half.ckpt"), KeepLedger(tmp_path)])
    after = weights(module)
    changed = {name for name, weight in after.items() if not torch.equal(weight, untrained[name].to(weight.dtype))}
    assert changed == {name for name in after if name.endswith("weight_scale")} and len(changed) == 14

    resumed, _ = fit(max_steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(weight, after[name]) for name, weight in resumed.named_parameters())
    replayed = CausalLM(str(tiny_folder), quantization=kind).bfloat16()
    replay(tmp_path / "ledger.bin", replayed, method)
    assert all(torch.equal(weight, after[name]) for name, weight in replayed.named_parameters())
    module.export(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.bfloat16)
    assert torch.equal(log_probs(exported, data), log_probs(module.model.eval(), data))


def test_scales_of_nf4_have_no_gradients(tiny_folder: Path, make_trainer: Any, data: Data) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(callbacks=[TrainParameters([r"weight_scale$"])], max_steps=1, limit_val_batches=0)
    with pytest.raises(MisconfigurationException, match="is 'nf4', but scales of its weights train, for which"):
        trainer.fit(CausalLM(str(tiny_folder), quantization="nf4"), data)


def test_layers_below_the_trained_one_run_once_a_step(
    fit: Any, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[QuantizedLinear] = []
    own = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: (runs.append(self), own(self, x))[1])

    fit("int8", TrainLayers([1]), callbacks=[LambdaCallback(on_train_batch_start=lambda *_: runs.clear())])
    assert len(runs) == LINEARS_OF_A_LAYER


def test_the_overview_counts_weights_and_the_bytes_in_which_they_are_stored(
    kind: Any, fit: Any, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = CausalLM(str(tiny_folder), dtype="bfloat16")
    shapes = [m.weight.shape for m in plain.model.model.layers[0].modules() if isinstance(m, nn.Linear)]
    total = sum(parameter.numel() for parameter in plain.parameters())
    caplog.set_level("INFO")
    module, _ = fit(kind, TrainLayers([1]), callbacks=[RunOverview()])
    assert f" TrainLayers: 7,744 of {total:,} parameters train" in caplog.text
    stored = {"int8": lambda m, n: m * n + 2 * m, "nf4": lambda m, n: m * n / 2 + 2 * math.ceil(m * n / 64)}[kind]
    saved = sum(2 * m * n - stored(m, n) for m, n in shapes)
    assert weight_bytes(module.model.model.layers) == weight_bytes(plain.model.model.layers) - saved


def test_refuses_to_write_what_is_quantised(
    fit: Any, tiny_folder: Path, make_trainer: Any, data: Data, tmp_path: Path, make_model: Any
) -> None:
    module = CausalLM(str(tiny_folder), quantization="int8")
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=r"`model.quantization` is 'int8', but nothing says .* `scope`"):
        fit("int8", module=module)
    assert all(torch.equal(weight.bfloat16(), before[n].bfloat16()) for n, weight in module.named_parameters())

    with pytest.raises(MisconfigurationException, match=r"`model\.model\.layers\.0\..*weight` is quantised \(int8\)"):
        fit("int8", TrainLayers([0]), module=module)

    with pytest.raises(MisconfigurationException, match="'int8', but the scope trains all 14 weights that it would"):
        fit("int8", TrainLayers("all"))

    trained, trainer = fit("int8", TrainLayers([1]))
    with pytest.raises(MisconfigurationException, match=r"`model\.model\.layers\.0\..*weight` is quantised \(int8\)"):
        fit("int8", TrainLayers([0]), module=trained)  # the others, of which nothing is kept any more
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MisconfigurationException, match=r"`model.quantization` is None, .* 'int8'"):
        tester = make_trainer(precision="bf16-true")
        tester.test(CausalLM(str(tiny_folder)), data, ckpt_path=tmp_path / "last.ckpt", verbose=False)

    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no nn\.Linear"):
        quantize(make_model("gpt2"), "int8")


def test_names_the_extra_that_is_missing_before_it_loads_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'zolightning\[quantization\]'"):
        CausalLM("no such model", quantization="nf4")
    with pytest.raises(ValueError, match=r"`quantization` must be None, 'int8' or 'nf4', got 'int2'"):
        CausalLM("no such model", quantization="int2")  # type: ignore[arg-type]  # what is tested
