"""Bases from what layers read: which directions, of which rows, how long, and what a run does with them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers.pytorch_utils import Conv1D

from training import Records
from zolightning.callbacks import ActivationBases, BlockCoordinateDescent, SubspaceResampling, ZerothOrder
from zolightning.directions.basis import Basis
from zolightning.directions.slices import Slice
from zolightning.optim import LOZO, ZOMOPI, SubspaceMeZO, SubZero, ZOMuon

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13

METHODS = {
    "lozo": partial(LOZO, lr=0.02, rank=2, normalize=True, clip=3.0),
    "subzero": partial(SubZero, lr=0.02, rank=2, momentum=0.5),
    "subspace-mezo": partial(SubspaceMeZO, lr=0.02, rank=2, betas=(0.9, 0.99)),
    "zo-muon": partial(ZOMuon, lr=0.02, rank=2, vector_lr=0.01),
    "zo-mopi": partial(ZOMOPI, lr=0.02, rank=2, power_rank=1, vector_lr=0.01),
}


class Network(nn.Module):
    """Reads padded sequences of tokens: by an embedding, two maps that share their input, a Conv1D and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.embedding = nn.Embedding(11, 6)
            self.layers = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Linear(6, 8, bias=False)})])
            self.across = Conv1D(5, 8)
            self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer["a"](hidden)) * layer["b"](hidden)
        return self.head(self.across(hidden))[:, -1]


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch["ids"], batch["mask"]).float(), batch["label"])

    def configure_optimizers(self) -> None:
        return None


def rows(padding: int = 0) -> list[dict[str, Tensor]]:
    """Twelve examples of five tokens, the first ones `padding` where the mask is 0."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(12):
        ids, mask = torch.randint(1, 11, (5,), generator=generator), torch.ones(5, dtype=torch.int64)
        ids[: number % 3], mask[: number % 3] = padding, 0
        found.append({"ids": ids, "mask": mask, "label": torch.tensor(number % 3)})
    return found


@pytest.fixture
def fit(make_trainer: Callable[..., L.Trainer]) -> Callable[..., Classifier]:
    def fit(
        method: Any, bases: ActivationBases | None, *callbacks: Callback, padding: int = 0, **kwargs: Any
    ) -> Classifier:
        ckpt_path, interval = kwargs.pop("ckpt_path", None), kwargs.pop("interval", 2)
        module, data = Classifier(), StatefulDataLoader(rows(padding), batch_size=4)
        resampling = SubspaceResampling(interval, bases=bases)
        trainer = make_trainer(**{"max_steps": 1, "callbacks": [resampling, ZerothOrder(method), *callbacks]} | kwargs)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return module

    return fit


def factors(module: Classifier, name: str) -> dict[str, Tensor]:
    return module.trainer.optimizers[0].given(module.get_parameter(f"network.{name}"))


@torch.no_grad()
def inputs(name: str, first_token: bool = True, examples: slice = slice(None)) -> Tensor:
    """What a map of the untrained network reads at tokens, computed by hand."""
    network, read = Network(), []
    for row in rows()[examples]:
        hidden = network.embedding(row["ids"])
        a, b = network.layers[0].values()
        after = torch.tanh(a(hidden)) * b(hidden)
        found = {"layers.0.a": hidden, "layers.0.b": hidden, "across": after, "head": network.across(after)}[name]
        read.append(found[row["mask"].bool()][0 if first_token else 1 :])
    return torch.cat(read)


def assert_same_directions(found: Tensor, expected: Tensor) -> None:
    for one, other in zip(found.T, expected.T, strict=True):
        torch.testing.assert_close(one * torch.sign(one @ other), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("first_token", "passes"), [(True, 2), (False, 1)])
def test_directions_are_those_of_an_svd_of_the_inputs(
    fit: Callable[..., Classifier], first_token: bool, passes: int
) -> None:
    module = fit(METHODS["lozo"], ActivationBases("unit", first_token=first_token, passes=passes))
    for name, side in {"layers.0.a": "right", "layers.0.b": "right", "across": "left", "head": "right"}.items():
        found = factors(module, f"{name}.weight")
        assert found.keys() == {side}
        assert_same_directions(found[side], torch.linalg.svd(inputs(name, first_token)).Vh[:2].T)
    assert factors(module, "embedding.weight") == {}, "no product reads it"


def test_other_inputs_than_those_of_the_map_before(make_trainer: Callable[..., L.Trainer]) -> None:
    """Of one token in each row, which the mask does not fit; and tied embeddings are read by rows, too."""

    class Pooling(Network):
        def __init__(self) -> None:
            super().__init__()
            del self.across, self.head

        def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
            a, b = self.layers[0].values()
            last = torch.tanh(a(self.embedding(ids)))[:, -1, :6]
            return F.linear(b(last)[:, :6], self.embedding.weight)

    module, network = Classifier(), Pooling()
    module.network = Pooling()
    callbacks = [SubspaceResampling(bases=ActivationBases("unit")), ZerothOrder(METHODS["lozo"])]
    make_trainer(max_steps=1, callbacks=callbacks).fit(module, DataLoader(rows(), batch_size=4))
    last = network.embedding(torch.stack([row["ids"][-1] for row in rows()]))
    after = torch.tanh(network.layers[0]["a"](last))[:, :6].detach()
    for name, read in (("a", inputs("layers.0.a")), ("b", after)):
        found = factors(module, f"layers.0.{name}.weight")["right"]
        assert_same_directions(found, torch.linalg.svd(read).Vh[:2].T)
    assert factors(module, "embedding.weight") == {}


def test_padding_does_not_count(fit: Callable[..., Classifier]) -> None:
    one, other = (fit(METHODS["lozo"], ActivationBases(), padding=padding) for padding in (0, 7))
    assert torch.equal(factors(one, "head.weight")["right"], factors(other, "head.weight")["right"])


def test_examples_have_the_precision_of_the_run(make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
    method = ZerothOrder(METHODS["lozo"])
    trainer = make_trainer(
        max_steps=1, callbacks=[SubspaceResampling(bases=ActivationBases()), method], precision="bf16-true"
    )
    trainer.fit(make_regression(), regression_data())
    assert trainer.optimizers[0].has_given


def test_scaling_and_skipping(fit: Callable[..., Classifier]) -> None:
    read = inputs("across")
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(read.T @ read / len(read)))
    found = factors(fit(METHODS["lozo"], ActivationBases("whitened")), "across.weight")["left"]
    torch.testing.assert_close((read @ found).square().mean(dim=0), torch.ones(2), rtol=1e-3, atol=0)
    limit = values[1].sqrt().item()
    found = factors(fit(METHODS["lozo"], ActivationBases("rms", limit)), "across.weight")["left"]
    expected = vectors[:, :2] * 8**0.5 * torch.stack([limit / values[0].sqrt(), torch.ones(())])
    assert_same_directions(found, expected)
    found = factors(fit(METHODS["lozo"], ActivationBases("unit", skip=1)), "across.weight")["left"]
    assert_same_directions(found, vectors[:, 1:3])


def test_a_part_of_the_inputs(fit: Callable[..., Classifier]) -> None:
    """Where only some columns of a matrix train, the inputs that they are multiplied by; of rows, all inputs."""

    class Restrict(Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: Classifier) -> None:
            a, b = (layer.weight for layer in pl_module.network.layers[0].values())
            trainer.optimizers[0].restrict({a: Slice(1, torch.tensor([0, 2, 5])), b: Slice(0, torch.tensor([1, 6]))})

    module = fit(METHODS["lozo"], ActivationBases("unit"), Restrict())
    for name, read in (("a", inputs("layers.0.a")[:, [0, 2, 5]]), ("b", inputs("layers.0.b"))):
        found = factors(module, f"layers.0.{name}.weight")["right"]
        assert_same_directions(found, torch.linalg.svd(read).Vh[:2].T)
    moved = module.network.layers[0]["a"].weight != Network().layers[0]["a"].weight
    assert moved.any(dim=0).tolist() == [True, False, True, False, False, True]


def test_a_refresh_mixes_in_what_is_known(fit: Callable[..., Classifier]) -> None:
    """Of the first batch's inputs the two directions that its bases had; the weights hardly move."""
    bases = ActivationBases(examples="batch", scaling="unit", refresh=True, decay=0.75)
    module = fit(partial(LOZO, lr=1e-12, rank=2), bases, max_steps=2, interval=1)
    old, new = (read.T @ read / len(read) for read in (inputs("across", examples=slice(i, i + 4)) for i in (0, 4)))
    values, vectors = (found[..., -2:] for found in torch.linalg.eigh(old))
    mixed = torch.linalg.eigh(0.75 * vectors * values @ vectors.T + 0.25 * new).eigenvectors[:, -2:]
    assert_same_directions(factors(module, "across.weight")["left"], mixed.flip(1))


def test_a_refresh_runs_the_trained_weights(fit: Callable[..., Classifier]) -> None:
    """Though updates wait until then, unless a callback looks at weights."""

    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pass

    method, bases = partial(LOZO, lr=0.5, rank=2), ActivationBases(refresh=True, scaling="unit")
    waiting, written = (fit(method, bases, *looks, max_steps=3) for looks in ([], [Looks()]))
    for one, other in zip(*(factors(module, "across.weight").values() for module in (waiting, written)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("refresh", [False, True])
def test_every_method_trains_and_resumes(
    fit: Callable[..., Classifier], tmp_path: Path, name: str, refresh: bool
) -> None:
    """Stopping in the middle of an interval changes no bit, of weights, moments and bases."""
    bases = ActivationBases(examples="batch" if refresh else "prompts", refresh=refresh, decay=0.5 * refresh)

    def run(**kwargs: Any) -> Classifier:
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)  # after 3 steps
        options = {"max_steps": 6, "precision": "bf16-true", "enable_checkpointing": True}
        return fit(METHODS[name], bases, saving, **options, **kwargs)

    whole = run()
    resumed = run(ckpt_path=tmp_path / "step=3.ckpt")
    one, other = (module.trainer.optimizers[0].state_dict() for module in (whole, resumed))
    assert one["param_groups"] == other["param_groups"]
    for index, state in one["state"].items():
        for key, value in state.items():
            assert torch.equal(value, other["state"][index][key]) if isinstance(value, Tensor) else True, key
    before = Classifier().bfloat16()
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key])
        assert value.isfinite().all() and not torch.equal(value, before.state_dict()[key]), key


@pytest.mark.parametrize("name", ["lozo", "zo-mopi"])
def test_a_step_stays_in_the_span_of_the_inputs(fit: Callable[..., Classifier], name: str) -> None:
    """Also where the method's own factor is on the other side; and the step is `core_step` of the right orientation."""
    module = fit(METHODS[name], ActivationBases("unit"))
    for layer, side in {"across": "left", "head": "right"}.items():
        moved = module.get_parameter(f"network.{layer}.weight") - Network().get_parameter(f"{layer}.weight")
        factor = factors(module, f"{layer}.weight")[side]
        rows = moved if side == "right" else moved.T
        assert moved.abs().max() > 0
        torch.testing.assert_close(rows @ factor @ factor.T, rows, rtol=1e-3, atol=1e-6)
        if name == "zo-mopi":  # of rank `power_rank`, `lr` long
            expected = torch.tensor([0.02] + [0.0] * (min(moved.shape) - 1))
            torch.testing.assert_close(torch.linalg.svdvals(moved), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("normalize_directions", [False, True])
def test_records_replay_with_the_bases_beside_them(fit: Callable[..., Classifier], normalize_directions: bool) -> None:
    recorder = Records()
    method = partial(METHODS["zo-mopi"], normalize_directions=normalize_directions)
    module = fit(method, ActivationBases(), recorder, max_steps=5)
    optimizer, replayed, records = module.trainer.optimizers[0], Classifier(), recorder.records
    replay = method(replayed.named_parameters())
    with pytest.raises(ValueError, match="has bases that were given, which no record holds"):
        method(Classifier().named_parameters()).apply(records[0])
    pairs = zip(replayed.parameters(), module.parameters(), strict=True)
    replay.recorded[1] = {twin: Basis(**given) for twin, p in pairs if (given := optimizer.given(p))}
    for record in records:
        replay.apply(record)
    replay.detach()
    for one, other in zip(replayed.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    # Two forwards of eight prompts would be four; here twelve rows in batches of four, twice
    assert records[0].forward_passes == 8 + 6 and records[1].forward_passes == 8


def test_blocks_keep_their_bases(fit: Callable[..., Classifier]) -> None:
    """While they rest, and whatever of their state is dropped."""
    blocks = BlockCoordinateDescent(interval=1, patterns=["across", "head"], others="never")
    module = fit(METHODS["subzero"], ActivationBases(), blocks, max_steps=4, interval=9)
    assert "momentum_buffer" not in module.trainer.optimizers[0].state[module.network.across.weight]
    fresh = fit(METHODS["subzero"], ActivationBases(), interval=9)
    for name, side in (("across.weight", "left"), ("head.weight", "right")):
        basis = module.trainer.optimizers[0].basis(module.get_parameter(f"network.{name}"))
        assert torch.equal(getattr(basis, side), factors(fresh, name)[side])


def test_the_random_bases_are_what_they_were(fit: Callable[..., Classifier]) -> None:
    """Of an embedding, beside bases from activations: as without them, at the same index."""
    beside = fit(METHODS["lozo"], ActivationBases())
    plain = fit(METHODS["lozo"], None, max_steps=3)
    one, other = (
        module.trainer.optimizers[0].basis(module.get_parameter("network.embedding.weight")).right
        for module in (beside, plain)
    )
    assert torch.equal(one, other)


class TestRefuses:
    def test_a_module_without_products(
        self, make_trainer: Callable[..., L.Trainer], fit: Callable[..., Classifier]
    ) -> None:
        class Images(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Conv2d(1, 2, 2)

            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return self.net(batch).square().mean()

            def configure_optimizers(self) -> None:
                return None

        callbacks = [SubspaceResampling(bases=ActivationBases()), ZerothOrder(METHODS["lozo"])]
        with pytest.raises(MisconfigurationException, match=r"ActivationBases, .* finite inputs \(there is none\)"):
            make_trainer(max_steps=1, callbacks=callbacks).fit(Images(), DataLoader(torch.rand(4, 1, 3, 3)))

    @pytest.mark.parametrize(
        ("argument", "value"),
        [("scaling", "none"), ("examples", "all"), ("limit", 0.0), ("num_prompts", 0), ("skip", -1), ("decay", 0.5)],
    )
    def test_values(self, argument: str, value: Any) -> None:
        with pytest.raises(ValueError, match=f"`{argument}`"):
            ActivationBases(**{argument: value})
