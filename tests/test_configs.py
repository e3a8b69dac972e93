"""Every file under ``configs/``: its command parses, it composes in any order, and it trains."""

import json
import re
import shlex
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cli_runs import parsed
from zolightning.__main__ import main
from zolightning.data.classification import Classification
from zolightning.data.task_files import load_task
from zolightning.layers import find_layers, mlp_of

# Lightning 2.6 calls what jsonargparse 4.49 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))


def names(folder: str) -> list[str]:
    return [Path(file).stem for file in FILES if Path(file).parent.name == folder]


# The architecture of each file in configs/models.
ARCHITECTURES = {
    "gemma3_270m": "gemma3_text",
    "gpt2": "gpt2",
    "llama3_8b": "llama",
    "mistral_7b": "mistral",
    "opt_1.3b": "opt",
    "opt_125m": "opt",
    "qwen3_0.6b": "qwen3",
    "smollm2_135m": "llama",
    "t5_small": "t5",
}

# An invented row of each task, with the fields that its data set has on the hub; the label goes through its values.
ROWS: dict[str, dict[str, Any]] = {
    "agnews": {"text": "The harbour reopened on Monday after the storm."},
    "boolq": {"question": "is the soup warm", "passage": "The soup came straight from the stove."},
    "cb": {"premise": "The cook thought that the soup was ready.", "hypothesis": "the soup was ready", "idx": 0},
    "copa": {
        "premise": "The soup boiled over.",
        "choice1": "The cook had left the room.",
        "choice2": "The table was set.",
        "question": "cause",
        "idx": 0,
    },
    "drop": {
        "passage": "Ada sold 3 boats, Ben 5.",
        "question": "How many?",
        "answers_spans": {"spans": ["8"], "types": ["number"]},
    },
    "imdb": {"text": "A boat.<br /><br />It sinks."},
    "countdown": {"numbers": "3 7 5", "target": 6, "solution": "3 * (7 - 5)"},
    "mr": {"text": "a warm and clever little soup ."},
    "record": {
        "passage": "Ada sold it.\n@highlight\nBen bought it",
        "query": "@placeholder has it",
        "entities": ["Ada", "Ben"],
        "answers": ["Ben"],
        "idx": {"passage": 0, "query": 0},
    },
    "squad": {
        "id": "0",
        "title": "Boats",
        "context": "The boat is red.",
        "question": "Which colour is it?",
        "answers": {"text": ["red"], "answer_start": [12]},
    },
    "sst5": {"text": "a warm and clever little soup", "label_text": "positive"},
    "mnli": {"premise": "The boat is red.", "hypothesis": "The boat has a colour.", "idx": 0},
    "multirc": {
        "paragraph": "Ada sold the boat to Ben.",
        "question": "Who has the boat now?",
        "answer": "Ben",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
    },
    "rte": {"premise": "The boat is red.", "hypothesis": "The boat has a colour.", "idx": 0},
    "sentiment": {"sentence": "a warm and clever little soup", "idx": 0},
    "snli": {"premise": "The boat is red.", "hypothesis": "The boat has a colour."},
    "sst2": {"sentence": "a warm and clever little soup ", "idx": 0},
    "trec": {"text": "How many boats are red ?", "fine_label": 0},
    "wic": {"word": "bank", "sentence1": "The bank lends.", "sentence2": "They sat on the bank.", "idx": 0},
    "wsc": {
        "text": "The cook told the guest that he was early.",
        "span1_index": 1,
        "span2_index": 6,
        "span1_text": "The cook",
        "span2_text": "he",
        "idx": 0,
    },
}

FOLDERS = [names("tasks"), names("methods"), list(ARCHITECTURES)]
RUNS = [tuple(files[i % len(files)] for files in FOLDERS) for i in range(max(map(len, FOLDERS)))]


def compose(*files: str) -> list[str]:
    return ["fit", *(part for file in files for part in ("--config", f"configs/{file}.yaml"))]


@pytest.fixture(autouse=True)
def at_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def parse(arguments: list[str]) -> Any:
    return parsed(arguments).fit


def header(file: str) -> list[str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


@pytest.mark.parametrize("file", FILES)
def test_header_has_a_command_that_parses_and_ends(file: str) -> None:
    commands = [line.removeprefix("#   ") for line in header(file) if line.startswith("#   zolightning fit")]
    assert commands, f"{file} does not begin with a comment with its command"
    program, *arguments = shlex.split(commands[0])
    assert program == "zolightning"
    assert file in arguments

    config = parse(arguments)

    assert config.model.init_args.model_name
    trainer = config.trainer
    assert 0 < trainer.max_steps <= 20_000
    assert trainer.max_steps % trainer.val_check_interval == 0, "the last weights are not validated"
    assert trainer.check_val_every_n_epoch is None


@pytest.mark.parametrize(("method", "model"), [("mezo", "llama3_8b"), ("adamw", "llama3_8b"), ("adamw", "t5_small")])
def test_order_of_files_does_not_matter(method: str, model: str) -> None:
    files = ("tasks/cb", f"methods/{method}", f"models/{model}", "strategies/ddp_cpu")
    configs = [parse(compose(*order)) for order in permutations(files)]
    for config in configs:
        del config["config"]
    assert all(config == configs[0] for config in configs)
    assert configs[0].data.init_args.task["name"] == "cb"
    assert configs[0].model.init_args.dtype == ("bfloat16" if model == "llama3_8b" else None)
    assert configs[0].model.class_path.rpartition(".")[2] == ("CausalLM" if model == "llama3_8b" else "Seq2SeqLM")
    assert configs[0].trainer.strategy == "ddp"
    assert configs[0].trainer.max_steps == (500 if method == "adamw" else 2000)


def test_later_files_and_flags_override() -> None:
    files = compose("tasks/sst2", "methods/mezo", "models/gpt2", "tasks/rte", "models/opt_125m")
    config = parse([*files, "--trainer.max_steps", "3", "--data.batch_size", "5"])
    assert (config.data.init_args.task["name"], config.data.init_args.batch_size) == ("rte", 5)
    assert config.model.init_args.model_name == "facebook/opt-125m"
    assert config.trainer.max_steps == 3


def test_runs_below_cover_all_files() -> None:
    tasks, methods, models = (set(used) for used in zip(*RUNS, strict=True))
    assert (tasks, methods, models) == (set(names("tasks")), set(names("methods")), set(ARCHITECTURES))


@pytest.mark.filterwarnings("ignore:The network runs once an example")  # Gemma's norms, which train here
@pytest.mark.parametrize(("task", "method", "model"), RUNS)
def test_two_steps(
    task: str, method: str, model: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    checkpoint, folder = train(
        compose(f"tasks/{task}", f"methods/{method}", f"models/{model}"),
        write_tiny_model(write_rows(task) / "model", ARCHITECTURES[model]),
        "--model.init_args.optimizer.init_args.lr" if method in ("adamw", "sgd") else LR,
    )
    assert changed(checkpoint, folder / "model")


def test_quickstart_two_steps(write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    folder = write_rows("sentiment")
    checkpoint, _ = train(compose("quickstart"), write_tiny_model(folder / "model"), LR)
    assert changed(checkpoint, folder / "model")


def test_recommended_two_steps(write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    folder = write_rows("sentiment")
    arguments = [*compose("recommended"), "--scope.patterns", r"['layers\.1\..*proj']"]  # its own layers are not there
    checkpoint, _ = train(arguments, write_tiny_model(folder / "model", "llama"), LR)
    assert_only_moved(checkpoint, folder / "model", r"layers\.1\..*proj")


def test_a_scope_and_a_method_in_one_file(
    write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    folder = write_tiny_model(write_rows("sentiment") / "model", "llama")
    plant_outlier(folder, layer=1)
    arguments = [*compose("dominant_layer_zo_mopi"), "--trainer.precision", "32-true", VECTOR_LR, "0.1"]
    checkpoint, _ = train(arguments, folder, LR)
    assert_only_moved(checkpoint, folder, SECOND)


# What each file in configs/scopes trains in a model of two layers whose second one has an outlier, by the names that
# Llama gives: a parameter trains if the expression matches somewhere. Each runs with another method and model; slices
# of parameters have no gradients for AdamW.
LAYERS, SECOND, CHANNELS = r"\.(layers|h)\.", r"\.(layers|h)\.1\.", r"\.1\.(mlp\.c_\w+|mlp\.\w+_proj|fc[12])\."
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
LR = "--method.lr"
# The method's rate for what has no subspace
VECTOR_LR = "--method.vector_lr"
SUBSPACE_METHODS = [name for name in names("methods") if name.startswith(("lozo", "sub", "zo_mu", "zo_mo"))]
for name in ("lozo_activations", "lozo_per_example"):  # which refuse a single channel: it has no subspace
    SUBSPACE_METHODS.remove(name)


def test_scopes_below_are_all_files() -> None:
    # by_signal wants three layers, of which these models have two; linear_probing has one step, and a test of its own
    assert set(SCOPES) == set(names("scopes")) - {"by_signal", "linear_probing"}


@pytest.mark.parametrize("scope", SCOPES)
def test_two_steps_of_a_scope(
    scope: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    pattern, method, model = SCOPES[scope]
    folder = write_tiny_model(write_rows("sst2") / "model", ARCHITECTURES[model])
    plant_outlier(folder, layer=1)

    files = compose("tasks/sst2", f"scopes/{scope}", f"methods/{method}", f"models/{model}")
    checkpoint, _ = train(
        [*files, "--trainer.precision", "32-true"],  # in bfloat16 the outlier would drown all else
        folder,
        "--model.init_args.optimizer.init_args.lr" if method in ("adamw", "sgd") else LR,
    )

    assert_only_moved(checkpoint, folder, pattern)
    assert {".lora_" in name for name in checkpoint["state_dict"]} == {False} | {"lora_" in pattern}


def assert_only_moved(checkpoint: dict[str, Any], folder: Path, pattern: str) -> None:
    assert checkpoint["global_step"] == 2
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, after in checkpoint["state_dict"].items():
        initial = before.get(name.removeprefix("model.").replace(".base_layer", ""))
        if initial is not None:  # adapters have no values of their own before
            same = torch.equal(after.float(), initial.to(after.dtype).float())
            assert same == (re.search(pattern, name) is None), name


def test_blocks_below_are_all_files() -> None:
    assert set(BLOCKS) == set(names("blocks"))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_two_steps_of_blocks(
    blocks: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    method, model = BLOCKS[blocks]
    folder = write_tiny_model(write_rows("sst2") / "model", ARCHITECTURES[model])
    files = ["tasks/sst2", f"blocks/{blocks}", *([f"methods/{method}"] if method else []), f"models/{model}"]
    one_layer = ["--blocks.blocks_per_step", "1"] if blocks in ("lezo", "b_pdf") else []  # there are two
    checkpoint, _ = train([*compose(*files), *one_layer, "--trainer.precision", "32-true"], folder, LR)
    assert 0 < len(moved(checkpoint, folder)) < len(checkpoint["state_dict"])


def moved(checkpoint: dict[str, Any], folder: Path) -> list[str]:
    """Names of the weights that are not as they were."""
    before = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    after = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    return [name for name, weight in after.items() if not torch.equal(weight, before[name])]


ORDERS = ("Cyclic", "RandomPermutation", "Uniform", "WeightNorm", "GaussSouthwellSweep", "Bandit", "AdaLeZO")
ZEROTH_ORDER = [name for name in names("methods") if name not in ("adamw", "sgd")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ZEROTH_ORDER)
def test_any_order_under_any_method(
    method: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    order = ORDERS[ZEROTH_ORDER.index(method) % len(ORDERS)]
    folder = write_tiny_model(write_rows("sst2") / "model", "llama")
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
    files: tuple[str, ...], pattern: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    folder = write_tiny_model(write_rows("sst2") / "model", "llama")
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
    scope: str, method: str, write_tiny_model: Callable[..., Path], write_rows: Callable[..., Path]
) -> None:
    """Layers, adapters and slices of matrices in subspaces: what the scope names moves, and nothing else does."""
    pattern, _, _ = SCOPES[scope]
    folder = write_tiny_model(write_rows("sst2") / "model", "llama")
    plant_outlier(folder, layer=1)
    files = compose("tasks/sst2", f"scopes/{scope}", f"methods/{method}", "models/smollm2_135m")
    checkpoint, _ = train([*files, "--trainer.precision", "32-true"], folder, LR)
    assert_only_moved(checkpoint, folder, pattern)


def plant_outlier(folder: Path, layer: int) -> None:
    """Makes the MLP of a layer put out one enormous number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        mlp_of(find_layers(model).layers[layer]).down.weight[0, 0] = 1e3
    model.save_pretrained(folder)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str], Path]:
    def write(task: str) -> Path:
        definition, rows = load_task(task), [ROWS[task]] * 4
        if isinstance(definition, Classification):
            labels = [*definition.skip_labels, *definition.labels * 4]
            rows = [ROWS[task] | {definition.label: label} for label in labels]
        lines = [json.dumps(row) + "\n" for row in rows]
        for split in ("train", "validation", "test"):
            (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        return tmp_path

    return write


def train(arguments: list[str], model: Path, lr: str) -> tuple[dict[str, Any], Path]:
    """Two steps on the rows beside the model, large enough to be seen in bfloat16; the last checkpoint."""
    folder = model.parent
    overrides = {
        "--model.init_args.model_name": model,
        "--model.init_args.dtype": "float32",
        "--data.init_args.path": folder,
        "--data.init_args.batch_size": 2,
        "--data.init_args.num_train": 4,
        "--data.init_args.num_validation": 2,
        "--data.init_args.num_test": 2,
        "--trainer.max_steps": 2,
        "--trainer.val_check_interval": 2,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
        "--trainer.logger": "false",
        "--trainer.default_root_dir": folder / "logs",
        "--checkpoint.dirpath": folder / "checkpoints",
        lr: 0.1,
        "--validate_first": "false",
    }
    if any(f"configs/methods/{method}.yaml" in arguments for method in SUBSPACE_METHODS):
        overrides[VECTOR_LR] = 0.1
    main([*arguments, *(str(part) for option in overrides.items() for part in option)])
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True), folder


def changed(checkpoint: dict[str, Any], model: Path) -> bool:
    """Whether the checkpoint has other matrices than the model had, after two steps.

    Not so its norms: near 1 bfloat16 shows no move below 0.004.
    """
    assert checkpoint["global_step"] == 2
    before = load_file(model / "model.safetensors")
    trained = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    matrices = {name: weight for name, weight in before.items() if weight.ndim == 2}
    return all(not torch.equal(trained[name].float(), weight.float()) for name, weight in matrices.items())
