"""Prefix tuning."""

import lightning as L
from lightning.pytorch.plugins.precision import HalfPrecision

from zolightning.checks import require_integer
from zolightning.messages import counted
from zolightning.network.adapters import PREFIX, adapter_settings, add_adapter, differences
from zolightning.network.prefix import prefix_of
from zolightning.scopes.scope import Scope, Selection
from zolightning.scopes.train_head import require_pretrained_model


class PrefixTuning(Scope):
    """Trains a prefix of keys and values in every layer, before those of the text (Li & Liang 2021, arXiv 2101.00190).

    As in MeZO (arXiv 2305.17333) the keys and values are trained directly, without a network that generates them, and
    start as those that the model computes for random tokens. For decoders of transformers. Exports are in PEFT's
    format.

    Args:
        num_virtual_tokens: length of the prefix.
    """

    def __init__(self, num_virtual_tokens: int = 5) -> None:
        super().__init__()
        require_integer("num_virtual_tokens", num_virtual_tokens)
        self.num_virtual_tokens = num_virtual_tokens

    def check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_pretrained_model(self, pl_module)

    def select(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Selection:
        model = require_pretrained_model(self, pl_module)
        wanted = {"peft_type": PREFIX, "num_virtual_tokens": self.num_virtual_tokens}
        present = adapter_settings(model)
        if present is None:
            # The first values are those that the network computes as it will run.
            if isinstance(trainer.precision_plugin, HalfPrecision):
                trainer.precision_plugin.convert_module(pl_module)
            pl_module.to(trainer.strategy.root_device)
            add_adapter(model, wanted)
        elif differ := differences({name: present.get(name) for name in wanted}, wanted):
            raise ValueError(
                f"`scope` is PrefixTuning, but the model has another adapter already: {differ}. Load the model again, "
                "or train the adapter that it has, without a scope."
            )
        prefix = prefix_of(model)
        assert prefix is not None
        weight = prefix.embedding.weight.data
        weight.copy_(trainer.strategy.broadcast(weight.cpu()))  # processors of different kinds differ in the last bits
        name = next(name for name, parameter in pl_module.named_parameters() if parameter is prefix.embedding.weight)
        return Selection(
            {name: None},
            f"a prefix of {counted(prefix.num_tokens, 'token')} in all {counted(prefix.num_layers, 'layer')}",
        )
