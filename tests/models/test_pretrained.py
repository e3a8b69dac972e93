"""Loading models from folders and from the hub, and what a wrong name or setting says."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, BloomConfig

from zolightning.models import load_pretrained

VOCABULARY = 37


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    """No hub, and an empty cache; returns the cache's folder."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def assert_one_line(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert error.value.__suppress_context__ or error.value.__context__ is None
    for part in parts:
        assert part in text


def test_a_folder_loads_in_eval_mode_with_a_tokenizer_that_pads_on_the_left(tiny_folder, make_model):
    model, tokenizer = load_pretrained(str(tiny_folder))
    assert not model.training
    for name, weight in make_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert tokenizer(["good", "a plain story"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_a_token_for_padding_stays(tiny_folder, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.pad_token = "<unk>"
    tiny_tokenizer.save_pretrained(tiny_folder)
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert load_pretrained(f"~/{tiny_folder.name}")[1].pad_token == "<unk>"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_loaded_in_the_dtype_asked_for(tiny_folder, dtype):
    model, _ = load_pretrained(str(tiny_folder), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_weights_stored_in_bfloat16_load_as_float32_by_default(tiny_folder, make_model):
    make_model().bfloat16().save_pretrained(tiny_folder)
    model, _ = load_pretrained(str(tiny_folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_attention_is_passed_on(tiny_folder):
    assert load_pretrained(str(tiny_folder))[0].config._attn_implementation == "sdpa"
    model, _ = load_pretrained(str(tiny_folder), attention="eager")
    assert model.config._attn_implementation == "eager"


def test_an_architecture_without_sdpa_loads_by_default(tiny_folder):
    AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    ).save_pretrained(tiny_folder)
    assert load_pretrained(str(tiny_folder))[0].config._attn_implementation == "eager"
    with pytest.raises(ValueError) as error:
        load_pretrained(str(tiny_folder), attention="sdpa")
    assert_one_line(error, "`attention` 'sdpa'", "does not support")


def test_a_model_in_the_hubs_cache_loads_without_the_hub(offline_hub, tiny_folder):
    repository = offline_hub / "models--some-lab--tiny-llama"
    shutil.copytree(tiny_folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    model, tokenizer = load_pretrained("some-lab/tiny-llama")
    assert model.config.hidden_size == 32
    assert tokenizer("good")["input_ids"] == [8]


def test_a_hub_out_of_reach_is_said_at_once(offline_hub):
    with pytest.raises(ValueError) as error:
        load_pretrained("some-lab/tiny-llama")
    assert_one_line(error, "'some-lab/tiny-llama'", "the hub does not answer", "pypi://", "GGUF")


def test_a_name_of_no_form_is_refused(offline_hub):
    with pytest.raises(ValueError) as error:
        load_pretrained("some lab/tiny/llama")
    assert_one_line(error, "'some lab/tiny/llama'", "not a valid hub id", "pypi://")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere/at/all", "nowhere.gguf"])
def test_a_path_to_nothing_is_refused(name):
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(name)
    assert_one_line(error, repr(name), "nothing is there")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        load_pretrained(str(tmp_path))
    assert_one_line(error, repr(str(tmp_path)), "config.json")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"network_class": "AutoModelForMaskedLM"}, "a file holds a causal language model"),
        ({"device_map": "auto"}, "with `device_map` 'auto': a GGUF file is loaded on one device"),
    ],
)
def test_what_a_file_cannot_be_loaded_as_is_refused(tmp_path, options, reason):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ValueError) as error:
        load_pretrained(str(tmp_path / "model.gguf"), **options)
    assert_one_line(error, reason)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError) as error:
        load_pretrained("some-lab/tiny-llama", dtype="bf16")
    assert_one_line(error, "`dtype`", "'bf16'", "bfloat16")


def test_an_unknown_attention_is_refused(tiny_folder):
    with pytest.raises(ValueError) as error:
        load_pretrained(str(tiny_folder), attention="quadratic")
    assert_one_line(error, "`attention` 'quadratic'", "eager")


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_refused(folder, *parts):
    with pytest.raises(ValueError) as error:
        load_pretrained(str(folder))
    assert_one_line(error, repr(str(folder)), *parts)


UP = "model.layers.1.mlp.up_proj.weight"


def test_names_with_the_prefix_of_a_compiled_model_are_refused(tiny_folder, capfd):
    change_weights(tiny_folder, lambda weights: {f"_orig_mod.{name}": weight for name, weight in weights.items()})
    assert_refused(tiny_folder, "lacks 21 weights of LlamaForCausalLM", "'_orig_mod.'")
    assert len(capfd.readouterr().err.splitlines()) < 5


def test_a_missing_weight_is_refused(tiny_folder):
    change_weights(tiny_folder, lambda weights: {name: weight for name, weight in weights.items() if name != UP})
    assert_refused(tiny_folder, f"lacks 1 weights of LlamaForCausalLM ({UP})", "config.json")


def test_a_config_with_more_layers_than_the_file_is_refused(tiny_folder):
    change_config(tiny_folder, num_hidden_layers=3)
    assert_refused(tiny_folder, "lacks 9 weights", "model.layers.2.")


def test_a_weight_of_another_shape_is_refused(tiny_folder, capfd):
    change_weights(tiny_folder, lambda weights: weights | {UP: torch.zeros(3, 5)})
    assert_refused(tiny_folder, UP, "(3, 5)", "(48, 32)")
    assert len(capfd.readouterr().err.splitlines()) < 5


def test_a_model_without_a_language_modelling_head_is_refused(tiny_folder, make_model):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tiny_folder)
    assert_refused(tiny_folder, "BertLMHeadModel", "cls.predictions", "head")
    AutoModel.from_config(make_model("qwen3").config).save_pretrained(tiny_folder)
    assert_refused(tiny_folder, "Qwen3ForCausalLM (lm_head.weight)", "head")


def test_a_base_model_with_tied_embeddings_is_complete(tiny_folder, make_model):
    make_model().model.save_pretrained(tiny_folder)
    model, _ = load_pretrained(str(tiny_folder))
    assert all(map(torch.equal, model.state_dict().values(), make_model().state_dict().values()))


def test_weights_without_a_place_are_named(tiny_folder):
    change_weights(tiny_folder, lambda weights: weights | {"score.weight": torch.zeros(2, 32)})
    with pytest.warns(UserWarning, match=r"1 weights that LlamaForCausalLM does not use: score\.weight"):
        load_pretrained(str(tiny_folder))


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_damaged_file_is_refused(tiny_folder, keep):
    path = tiny_folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert_refused(tiny_folder, "safetensors file is damaged")


def test_an_adapter_is_refused_with_what_to_do_instead(tiny_folder):
    (tiny_folder / "adapter_config.json").write_text("{}")
    assert_refused(tiny_folder, "it is an adapter, not a model. Name its base model here, and the adapter as `adapter`")


def test_a_model_without_a_tokenizer_is_refused(tiny_folder):
    for path in tiny_folder.glob("tokenizer*"):
        path.unlink()
    assert_refused(tiny_folder, "it has no tokenizer.json")


def test_no_code_of_a_folder_is_run_and_nobody_is_asked(tiny_folder, monkeypatch):
    (tiny_folder / "code.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    change_config(tiny_folder, model_type="my-own", auto_map=auto_map)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert_refused(tiny_folder, "its own code", "`auto_map`")
