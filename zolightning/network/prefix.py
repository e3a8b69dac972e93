"""Prefix tuning: trained keys and values in every layer of a decoder, before those of the text.

Prefix tuning is Li & Liang 2021 (arXiv 2101.00190). As in MeZO (arXiv 2305.17333, appendix E.5), keys and values are
trained directly, without a network that generates them, and are initialised as those of random tokens.
"""

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from zolightning.evaluation.mode import evaluation_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "prompt_encoder"  # of the module in the model, as in PEFT's own
_CACHES = ("cache", "past_key_values")  # what transformers calls the cache, from 5.24 on and before


class Prefix(nn.Module):
    """The prefix of all layers, as the weight of one embedding: what PEFT calls ``prompt_embeddings``.

    Args:
        values: (layers, 2, heads, tokens, head size): keys, then values, of each layer.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.num_layers, _, self.num_heads, self.num_tokens, self.head_size = values.shape
        flat = values.permute(3, 0, 1, 2, 4).reshape(self.num_tokens, -1)  # (tokens, layers * 2 * heads * head size)
        self.embedding = nn.Embedding.from_pretrained(flat, freeze=False)
        self.hook: RemovableHandle | None = None  # by which a decoder reads it

    def forward(self, rows: int) -> Tensor:
        """Returns (layers, 2, rows, heads, tokens, head size)."""
        # One row of ids for all rows of a batch. Where evaluations are stacked, the embedding returns a row for each.
        ids = torch.arange(self.num_tokens, device=self.embedding.weight.device)[None]
        values: Tensor = self.embedding(ids)
        sizes = self.num_tokens, self.num_layers, 2, self.num_heads, self.head_size
        return values.expand(rows, -1, -1).view(rows, *sizes).permute(2, 3, 0, 4, 1, 5)

    def prepend(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A pre-hook of the decoder that puts the prefix at the beginning of its cache and shifts the text after it.

        Raises:
            ValueError: if prefix and text together are longer than the model's context.
        """
        from transformers import DynamicCache

        inputs = args[0] if args else kwargs.get("input_ids")
        rows, length = (kwargs["inputs_embeds"] if inputs is None else inputs).shape[:2]
        others = {name: value for name, value in kwargs.items() if name not in _CACHES}
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        if cache is None:
            cache = DynamicCache(config=decoder.config)
        if not cache.get_seq_length():  # else a text is being written, and the prefix is there
            for layer, (keys, values) in enumerate(self(rows)):
                cache.update(keys, values, layer)
        longest = getattr(decoder.config, "max_position_embeddings", None)
        if longest is not None and (needed := cache.get_seq_length() + length) > longest:
            raise ValueError(
                f"A text of {needed - self.num_tokens} tokens after a prefix of {self.num_tokens} is longer than the "
                f"model's context of {longest}: set `data.max_length` to {longest - self.num_tokens} at most."
            )
        takes = inspect.signature(type(decoder).forward).parameters
        changed = {next((name for name in _CACHES if name in takes), _CACHES[0]): cache}
        if (mask := kwargs.get("attention_mask")) is not None:  # (rows, length) or (rows, 1, length, length)
            changed["attention_mask"] = F.pad(mask, (self.num_tokens, 0), value=1)
        if (positions := kwargs.get("position_ids")) is not None:
            changed["position_ids"] = positions + self.num_tokens
        return args, others | changed


def prefix_of(model: nn.Module) -> Prefix | None:
    """The prefix that a model of transformers reads, if any."""
    found = getattr(model, _NAME, None)
    return found if isinstance(found, Prefix) else None


def add_prefix(model: "PreTrainedModel", num_tokens: int) -> Prefix:
    """Adds a prefix to a model, initialised as the keys and values of random tokens.

    The tokens depend on the seed of ``seed_everything`` (or 0); the state of torch's generators does not change.

    Raises:
        ValueError: if the network has no cache of keys and values, their shapes differ between layers, or layers are on
            several devices.
    """
    prefix = Prefix(_keys_and_values(model, num_tokens))
    setattr(model, _NAME, prefix)
    # The decoder, and not the model: evaluations that are stacked repeat the rows that the model is called with.
    prefix.hook = model.get_decoder().register_forward_pre_hook(prefix.prepend, with_kwargs=True)
    return prefix


def remove_prefix(model: "PreTrainedModel") -> None:
    """Removes the prefix from the model."""
    prefix = prefix_of(model)
    assert prefix is not None and prefix.hook is not None
    prefix.hook.remove()
    delattr(model, _NAME)


@torch.no_grad()
def _keys_and_values(model: "PreTrainedModel", num_tokens: int) -> Tensor:
    """(layers, 2, heads, tokens, head size) of some tokens, in the model's dtype and on its device."""
    name = type(model).__name__
    embeddings = model.get_input_embeddings()
    cache = None
    if isinstance(embeddings, nn.Embedding) and not model.config.is_encoder_decoder:
        generator = torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        ids = torch.randint(len(embeddings.weight), (1, num_tokens), generator=generator).to(embeddings.weight.device)
        with evaluation_mode(model):
            output = model(input_ids=ids, use_cache=True)
            cache = next((output[name] for name in _CACHES if name in output), None)
    layers: list[Any] = getattr(cache, "layers", [])
    found = [
        torch.cat([layer.keys, layer.values]) for layer in layers if isinstance(getattr(layer, "keys", None), Tensor)
    ]
    if not found or len(found) < len(layers):
        raise ValueError(f"A prefix is a cache that every layer of a decoder attends to, and {name} keeps none.")
    shapes = {tuple(pair.shape[1:]) for pair in found}  # of (2, heads, tokens, head size)
    if len(shapes) > 1 or any(shape[1] != num_tokens for shape in shapes):
        raise ValueError(
            f"A prefix of {num_tokens} tokens needs keys and values of one shape (heads, tokens, head size), but those "
            f"of {name} have {', '.join(map(str, sorted(shapes)))}."
        )
    if len({pair.device for pair in found}) > 1:
        raise ValueError(f"A prefix needs all layers of {name} on one device, but they are spread over several.")
    return torch.stack(found)
