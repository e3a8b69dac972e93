"""Tiny random networks that read both ways, with tokenizers of bytes and a few words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedTokenizerFast

_SIZES: dict[str, Any] = {
    # weights far larger than usual, so that a wrong position or mask shows in the scores
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3},
    **{"intermediate_size": 32, "max_position_embeddings": 300},
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "albert": _SIZES | {"embedding_size": 8},
    "bert": _SIZES,
    "deberta-v2": _SIZES,
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.3},
    "electra": _SIZES | {"embedding_size": 8},
    "modernbert": _SIZES | {"initializer_cutoff_factor": 2.0},
    "roberta": _SIZES,
}
WORDS = [" bad", " good"]


def tiny_tokenizer(architecture: str = "roberta", words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Of bytes and some words; as RoBERTa's, whose mask takes the spaces before it, and whose texts have no types.

    For BERT there is a separator less between two texts, and types of tokens.
    """
    spelled = [word.replace(" ", "Ġ") for word in words]
    starts = dict.fromkeys((word[:end], word[end]) for word in spelled for end in range(1, len(word)))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: id for id, token in enumerate([*tokens, *map("".join, starts)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(starts), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    around = [("<s>", 0), ("</s>", 2)]
    is_bert = architecture == "bert"
    pair = "<s> $A </s> $B:1 </s>:1" if is_bert else "<s> $A </s> </s> $B </s>"
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", pair, around)
    mask = AddedToken("<mask>", lstrip=True, special=True)
    special = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", *(["token_type_ids"] if is_bert else []), "attention_mask"],
        **{f"{kind}_token": token for kind, token in special.items()},
    )


def write_tiny(
    folder: Path,
    architecture: str = "roberta",
    kind: str = "AutoModelForMaskedLM",
    words: Sequence[str] = WORDS,
    **config: Any,
) -> Path:
    """Saves a network of random weights and its tokenizer in Hugging Face's format."""
    tokenizer = tiny_tokenizer(architecture, words)
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "cls", "eos", "sep", "pad")}
    settings = ARCHITECTURES[architecture] | ids | {"vocab_size": len(tokenizer)} | config
    with torch.random.fork_rng():
        torch.manual_seed(11)
        made = AutoConfig.for_model(architecture, **settings)
        getattr(transformers, kind).from_config(made).save_pretrained(folder)
    return folder
