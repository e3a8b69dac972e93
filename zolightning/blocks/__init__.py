"""Block coordinate descent: which parameters form a block, and when each block moves."""

from zolightning.blocks.bandit import AdaLeZO, Bandit
from zolightning.blocks.orders import Cyclic, GaussSouthwellSweep, Order, RandomPermutation, Turn, Uniform, WeightNorm
from zolightning.blocks.partition import Blocks, find_blocks
from zolightning.blocks.schedule import BlockSchedule

__all__ = [
    "AdaLeZO",
    "Bandit",
    "BlockSchedule",
    "Blocks",
    "Cyclic",
    "GaussSouthwellSweep",
    "Order",
    "RandomPermutation",
    "Turn",
    "Uniform",
    "WeightNorm",
    "find_blocks",
]
