"""The table of methods, and the small networks, modules and Trainers that several test files use."""

import gc
import logging
import os
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from zolightning.kernels.compiled import _Compiler
from zolightning.optim import (
    BSZO,
    EGGROLL,
    GRZO,
    LOZO,
    ZOMOPI,
    ConMeZO,
    HiZOO,
    MeZO,
    MeZOAdam,
    SparseMeZO,
    SubspaceMeZO,
    SubZero,
    ZerothOrderOptimizer,
    ZOAdaMM,
    ZOMuon,
)
from zolightning.optim.estimators import OneSided, Population, TwoSided

# Asserts of the helpers say as much as those of the tests
pytest.register_assert_rewrite(
    "checkpoint_runs", "cli_runs", "graph_runs", "networks", "optimizer_steps", "stacked_runs", "training"
)

# Lightning turns it off where nobody listens when it is imported, which depends on the release of pytest
logging.getLogger("lightning.pytorch").propagate = True

torch.set_num_threads(1)  # on tensors as small as these, threads only wait for each other

# The same examples every time, however slow the machine
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPU of this machine but for `-m gpu`.

    Elsewhere a Trainer would take it, or warn that it does not, and autograd would start a thread for it, after which
    no process may be forked.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Looks for garbage neither while files are imported nor, later on, in what they hold: a pass takes 0.3 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # extension modules complain of what is left at the end of a process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `-m gpu`"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips files of tests that need a package which images with CUDA come without, where it is not installed."""
    report = yield
    for package in ("datasets", "gguf", "jsonargparse", "tensorboard", "torchdata"):
        if report.failed and f"No module named '{package}'" in report.longreprtext:
            report.outcome, report.longrepr = "skipped", (report.nodeid, 0, f"needs the package {package}")
    return report


Method = Callable[..., ZerothOrderOptimizer]

# A row here puts a method through all tests of tests/optim/test_all_methods*.py and through those of resuming.
# The learning rates are made for `Problem` below, which has 29 parameters and a curvature of 1; of these the 12 of a
# 4 x 3 matrix are searched in a subspace, by the methods that do so.
METHODS: dict[str, Method] = {
    "mezo": partial(MeZO, lr=0.02),
    "mezo-rademacher": partial(MeZO, lr=0.02, noise="rademacher"),
    "mezo-one-sided": partial(MeZO, lr=0.04, num_queries=3, estimator=OneSided()),
    "mezo-population": partial(MeZO, lr=0.04, num_queries=4, estimator=Population()),
    "mezo-momentum": partial(MeZO, lr=0.02, momentum=0.9),
    "mezo-weight-decay": partial(MeZO, lr=0.02, weight_decay=0.1),
    "mezo-normalize": partial(MeZO, lr=0.05, normalize=True),
    "mezo-clip": partial(MeZO, lr=0.02, clip=1.5, num_queries=2),
    "mezo-all": partial(
        MeZO,
        lr=0.05,
        momentum=0.5,
        weight_decay=0.1,
        normalize=True,
        clip=2.0,
        rms_decay=0.9,
        num_queries=2,
        align_queries=True,
    ),
    "mezo-native": partial(MeZO, lr=0.02, update_precision="native"),
    "mezo-low-byte": partial(MeZO, lr=0.02, update_precision="low_byte"),
    "mezo-adam": partial(MeZOAdam, lr=0.05),
    "mezo-adam-weight-decay": partial(MeZOAdam, lr=0.05, weight_decay=0.1, num_queries=2),
    "zo-adamm": partial(ZOAdaMM, lr=0.02, weight_decay=0.1),
    "con-mezo": partial(ConMeZO, lr=0.02, momentum=0.5),
    "con-mezo-all": partial(
        ConMeZO, lr=0.05, momentum=0.8, angle=1.2, weight_decay=0.1, normalize=True, clip=2.0, num_queries=2
    ),
    "bszo": partial(BSZO, lr=0.05, prior_variance=1.0),
    "bszo-all": partial(
        BSZO,
        lr=0.05,
        prior_variance=5.0,
        noise_variance=1.0,
        smoothing=0.02,
        num_reused=2,
        weight_decay=0.1,
        num_queries=3,
        estimator=TwoSided(),
        align_queries=True,
    ),
    "hizoo": partial(HiZOO, lr=0.02, smoothing=1e-5),
    "hizoo-centered": partial(
        HiZOO, lr=0.02, smoothing={0: 1e-5, 2: 2e-5}, curvature_estimate="centered", weight_decay=0.1, num_queries=2
    ),
    "hizoo-l": partial(HiZOO, lr=0.02, smoothing=1e-5, curvature="row_column", update_precision="low_byte"),
    "sparse-mezo": partial(SparseMeZO, lr=0.02, sparsity=0.1),
    "sparse-mezo-fixed": partial(SparseMeZO, lr=0.02, sparsity=0.1, mask="fixed", update_precision="low_byte"),
    "lozo": partial(LOZO, lr=0.03, rank=3),
    "lozo-momentum": partial(LOZO, lr=0.03, rank=2, momentum=0.9, num_queries=2),
    "eggroll": partial(EGGROLL, lr=0.04, rank=2, num_queries=4),
    "eggroll-two-sided": partial(
        EGGROLL, lr=0.02, rank=1, num_queries=2, weight_decay=0.1, estimator=TwoSided(), update_precision="low_byte"
    ),
    "grzo": partial(GRZO, lr=0.1, rank=3, num_queries=6, estimator=TwoSided()),
    "subzero": partial(SubZero, lr=0.02, rank=3),
    "subzero-paper": partial(SubZero, lr=0.02, rank=3, scaling="paper", noise="rademacher"),
    "subzero-momentum": partial(SubZero, lr=0.02, rank=3, momentum=0.8),
    "subzero-adam": partial(
        SubZero, lr=0.05, rank=4, betas=(0.9, 0.95), vector_lr=0.02, num_queries=2, update_precision="low_byte"
    ),
    "subspace-mezo": partial(SubspaceMeZO, lr=0.02, rank=4),
    "subspace-mezo-momentum": partial(SubspaceMeZO, lr=0.02, rank=3, momentum=0.9),
    "subspace-mezo-adam": partial(
        SubspaceMeZO, lr=0.05, rank=4, betas=(0.9, 0.999), vector_lr=0.05, normalize_directions=True
    ),
    "zo-muon": partial(ZOMuon, lr=0.05, rank=4, vector_lr=0.04, estimator=OneSided()),
    "zo-muon-svd": partial(ZOMuon, lr=0.05, rank=3, vector_lr=0.02, orthogonalization="svd", num_queries=2),
    "zo-muon-momentum": partial(ZOMuon, lr=0.05, rank=4, vector_lr=0.02, momentum=0.9, num_queries=1),
    "zo-mopi": partial(ZOMOPI, lr=0.05, rank=4, power_rank=2, vector_lr=0.04),
    "zo-mopi-population": partial(
        ZOMOPI, lr=0.05, rank=3, power_rank=3, vector_lr=0.04, estimator=Population(), align_queries=True
    ),
    "zo-mopi-native": partial(
        ZOMOPI, lr=0.05, rank=4, power_rank=1, vector_lr=0.02, num_queries=2, momentum=0.5, update_precision="native"
    ),
}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process that may become the only rank of a group, and then leaves it."""
    environment = dict(os.environ)
    # Lightning gives ranks another number of threads than a single process has, and their sums round otherwise
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    """Makes an optimizer from parameters; keyword arguments replace those of the table."""
    return METHODS[request.param]


class Problem(nn.Module):
    """A quadratic over a matrix, images in channels-last layout and a vector of odd length."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(11))
        self.matrix = nn.Parameter(draw(4, 3).to(dtype))
        self.images = nn.Parameter(draw(1, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last))
        self.vector = nn.Parameter(draw(5).to(dtype))

    def forward(self) -> Tensor:
        """The loss; its gradient is the parameter plus 0.5."""
        return sum((parameter.double() + 0.5).square().sum() / 2 for parameter in self.parameters())


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    return Problem


@pytest.fixture(autouse=True)
def cold_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that compiles leaves the later ones to run their small tensors eagerly."""
    monkeypatch.setattr(_Compiler, "warm", False)
    monkeypatch.setattr(_Compiler, "enabled", True)
    monkeypatch.setattr(_Compiler, "warned", False)


@pytest.fixture(autouse=True, scope="session")
def signatures_read_once() -> Iterator[None]:
    """A command parses the sources of all classes that it has options for; in one process once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("jsonargparse"):
            from jsonargparse import _signatures

            read = cache(partial(_signatures.get_signature_parameters, logger=False))
            patch.setattr(_signatures, "get_signature_parameters", lambda of, method, logger: read(of, method))
        yield


@pytest.fixture(autouse=True, scope="session")
def no_callbacks_of_other_packages() -> Iterator[None]:
    """Each Trainer looks for some in all packages that are installed, which takes it most of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning.pytorch.trainer.connectors.callback_connector._load_external_callbacks", lambda _: [])
        yield


@pytest.fixture
def at_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs where ``configs/`` is, with a seed."""
    monkeypatch.chdir(Path(__file__).parent.parent)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., L.Trainer]:
    def make(**kwargs: Any) -> L.Trainer:
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**quiet | kwargs)

    return make


class Regression(L.LightningModule):
    """A plain module that knows nothing of zeroth-order training."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.5), nn.Linear(width, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(self.net(inputs).float(), targets.float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def make_regression() -> Callable[..., Regression]:
    return Regression


@pytest.fixture
def regression_data() -> Callable[..., DataLoader]:
    """Batches of a linear regression with a little noise, in a fixed order."""

    def make(num_batches: int = 7, batch_size: int = 4) -> DataLoader:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(num_batches * batch_size, 4, generator=generator)
        targets = inputs @ torch.tensor([[0.5], [-1.0], [0.25], [0.1]])
        return DataLoader(TensorDataset(inputs, targets), batch_size=batch_size)

    return make


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
_LLAMA_SIZES = _SIZES | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
_TINY: dict[str, dict[str, Any]] = {
    "opt": _SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "gpt2": _SIZES,
    "llama": _LLAMA_SIZES,
    "qwen3": _LLAMA_SIZES,
    "gemma3_text": _LLAMA_SIZES,
    "mistral": _LLAMA_SIZES,
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
}
_CLASSES = {"t5": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="session")
def write_tiny_model() -> Callable[..., Path]:
    """Saves a random model of an architecture, with a tokenizer of bytes, in Hugging Face's format."""

    def write(folder: Path, architecture: str = "llama") -> Path:
        alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if architecture == "t5":
            ends = [("</s>", alphabet.index("</s>"))]
            tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=ends)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        config = AutoConfig.for_model(architecture, vocab_size=len(alphabet), **special, **_TINY[architecture])
        with torch.random.fork_rng():
            torch.manual_seed(11)
            _CLASSES.get(architecture, AutoModelForCausalLM).from_config(config).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(autouse=True)
def no_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what an earlier test's ``seed_everything`` left: methods take their default seed from it."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test that draws without a seed of its own draws the same whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
