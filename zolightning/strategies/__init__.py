"""Strategies of Lightning for training without gradients; importing them registers ``zo_ddp`` and ``zo_fsdp``."""

from zolightning.strategies.zo_ddp import ZerothOrderDDP
from zolightning.strategies.zo_fsdp import ZerothOrderFSDP

__all__ = ["ZerothOrderDDP", "ZerothOrderFSDP"]
