"""Every file in ``configs/scopes`` and ``configs/blocks``, and what moves where files of several folders meet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from config_runs import (
    ARCHITECTURES,
    LR,
    SECOND,
    SUBSPACE_METHODS,
    assert_only_moved,
    compose,
    names,
    plant_outlier,
    train,
    write_rows,
)
from zolightning import CausalLM

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = [pytest.mark.usefixtures("at_project_root"), pytest.mark.filterwarnings("ignore::DeprecationWarning")]

# What each file in configs/scopes trains in a model of two layers whose second one has an outlier, by the names that
# Llama gives: a parameter trains if the expression matches somewhere. Each runs with another method and model; slices
# of parameters have no gradients for AdamW.
LAYERS, CHANNELS = r"\.(layers|h)\.", r"\.1\.(mlp\.c_\w+|mlp\.\w+_proj|fc[12])\."
SCOPES: dict[str, tuple[str, str, str]] = {
    "dominant_layer": (SECOND, "mezo", "smollm2_135m"),
    "dominant_layer_and_others": (SECOND, "mezo_adam", "qwen3_0.6b"),
    "dominant_layer_lora": (SECOND + r".*\.lora_", "mezo_momentum", "gpt2"),
    "dominant_layer_massive_direction": (SECOND + r".*\.lora_B", "mezo", "llama3_8b"),
    "dominant_layer_mlp": (CHANNELS, "adamw", "opt_125m"),
    "dominant_layer_mlp_without_outlier_channels": (CHANNELS, "mezo_population", "mistral_7b"),
    "dominant_layer_outlier_channels": (CHANNELS + "(?!bias)", "mezo_normalized", "smollm2_135m"),
    "dominant_layer_without_outlier_channels": (SECOND, "mezo_rademacher", "opt_1.3b"),
    "head": (r"lm_head", "zo_muon", "gpt2"),
    "layers": (LAYERS, "mezo_one_sided", "llama3_8b"),
    "lora": (r"\.lora_", "adamw", "mistral_7b"),
    "parameters": ("attn", "mezo", "gpt2"),
    "prefix": ("prompt_encoder", "mezo", "opt_1.3b"),
    "random_layer": (r"\.(layers|h)\.0\.", "mezo", "opt_125m"),
}
# A method and a model under which each file in configs/blocks moves some blocks and leaves others
BLOCKS: dict[str, tuple[str | None, str]] = {
    "adalezo": (None, "gpt2"),
    "b_pdf": (None, "opt_125m"),
    "focus": (None, "qwen3_0.6b"),
    "lezo": ("subzero", "opt_125m"),
    "mezo_bcd": ("mezo_momentum", "smollm2_135m"),
}


def test_scopes_below_are_all_files() -> None:
    # by_signal wants three layers, of which these models have two; logistic_regression has one step and its own test
    assert set(SCOPES) == set(names("scopes")) - {"by_signal", "logistic_regression"}


@pytest.mark.parametrize("scope", SCOPES)
def test_two_steps_of_a_scope(scope: str, write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    pattern, method, model = SCOPES[scope]
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", ARCHITECTURES[model])
    plant_outlier(folder, layer=1)

    files = compose("tasks/sst2", f"scopes/{scope}", f"methods/{method}", f"models/{model}")
    checkpoint, _ = train(
        [*files, "--trainer.precision", "32-true"],  # in bfloat16 the outlier would drown all else
        folder,
        "--model.init_args.optimizer.init_args.lr" if method in ("adamw", "sgd") else LR,
    )

    assert_only_moved(checkpoint, folder, pattern)
    assert {".lora_" in name for name in checkpoint["state_dict"]} == {False} | {"lora_" in pattern}


def test_blocks_below_are_all_files() -> None:
    assert set(BLOCKS) == set(names("blocks"))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_two_steps_of_blocks(blocks: str, write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    method, model = BLOCKS[blocks]
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", ARCHITECTURES[model])
    files = ["tasks/sst2", f"blocks/{blocks}", *([f"methods/{method}"] if method else []), f"models/{model}"]
    one_layer = ["--blocks.blocks_per_step", "1"] if blocks in ("lezo", "b_pdf") else []  # there are two
    checkpoint, _ = train([*compose(*files), *one_layer, "--trainer.precision", "32-true"], folder, LR)
    assert 0 < len(moved(checkpoint, folder)) < len(checkpoint["state_dict"])


def moved(checkpoint: dict[str, Any], folder: Path) -> list[str]:
    """Names of the weights that are not as they were."""
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    return [name for name, weight in after.items() if not torch.equal(weight, before[name])]


def test_two_steps_of_the_scales_alone(write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", "llama")
    files = compose("tasks/sst2", "quantization/qzo", "models/smollm2_135m")
    checkpoint, _ = train([*files, "--trainer.precision", "32-true"], folder, LR)
    before = CausalLM(str(folder), quantization="int8").state_dict()
    assert checkpoint["state_dict"].keys() == before.keys()
    for name, after in checkpoint["state_dict"].items():
        assert torch.equal(after, before[name]) is not name.endswith("weight_scale"), name


ORDERS = ("Cyclic", "RandomPermutation", "Uniform", "WeightNorm", "GaussSouthwellSweep", "Bandit", "AdaLeZO")
ZEROTH_ORDER = [name for name in names("methods") if name not in ("adamw", "sgd")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ZEROTH_ORDER)
def test_any_order_under_any_method(method: str, write_tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    order = ORDERS[ZEROTH_ORDER.index(method) % len(ORDERS)]
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", "llama")
    files = compose("tasks/sst2", "blocks/mezo_bcd", f"methods/{method}", "models/smollm2_135m")
    blocks = ["--blocks.order", order, "--blocks.interval", "1", "--blocks.others", "never"]
    checkpoint, _ = train([*files, *blocks, "--trainer.precision", "32-true"], folder, LR)
    layers = {name.split(".")[2] for name in moved(checkpoint, folder)}
    assert layers and layers <= {"0", "1"}, "others never move"
    assert layers == {"0", "1"} or order not in ("Cyclic", "RandomPermutation")


# What moves where files of different folders meet, in the network of two layers whose second has an outlier
COMPOSED = {
    ("blocks/focus", "scopes/lora"): r"\.lora_",
    ("methods/forward_gradient", "scopes/lora"): r"\.lora_",
    ("methods/hizoo", "scopes/lora"): r"\.lora_",
    ("methods/sparse_mezo", "scopes/dominant_layer"): SECOND,
}


@pytest.mark.parametrize(("files", "pattern"), COMPOSED.items())
def test_compositions(
    files: tuple[str, ...], pattern: str, write_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", "llama")
    plant_outlier(folder, layer=1)
    arguments = compose("tasks/sst2", *files, "models/smollm2_135m")
    checkpoint, _ = train([*arguments, "--trainer.precision", "32-true"], folder, LR)
    assert_only_moved(checkpoint, folder, pattern)
    adapters = [weight for name, weight in checkpoint["state_dict"].items() if ".lora_B." in name]
    assert bool(adapters) == ("scopes/lora" in files)
    assert not adapters or any(weight.any() for weight in adapters)


# All pairs are for `-m slow`; of the others each scope has one method, and each method a scope.
PAIRS = [
    pytest.param(scope, method, marks=() if (i - j) % len(SUBSPACE_METHODS) == 0 else pytest.mark.slow)
    for i, scope in enumerate(SCOPES)
    for j, method in enumerate(SUBSPACE_METHODS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "method"), PAIRS)
def test_subspace_methods_in_scopes(
    scope: str, method: str, write_tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Layers, adapters and slices of matrices in subspaces: what the scope names moves, and nothing else does."""
    pattern, _, _ = SCOPES[scope]
    folder = write_tiny_model(write_rows(tmp_path, "sst2") / "model", "llama")
    plant_outlier(folder, layer=1)
    files = compose("tasks/sst2", f"scopes/{scope}", f"methods/{method}", "models/smollm2_135m")
    checkpoint, _ = train([*files, "--trainer.precision", "32-true"], folder, LR)
    assert_only_moved(checkpoint, folder, pattern)
