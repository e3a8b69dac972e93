"""What a generated text is worth: functions of (text, references) -> number, to report or to train on."""

from zolightning.rewards.countdown import Countdown
from zolightning.rewards.pattern import Pattern
from zolightning.rewards.processes import InProcesses
from zolightning.rewards.reward import Reward
from zolightning.rewards.text import exact_match, token_f1
from zolightning.rewards.unit_tests import UnitTests

__all__ = ["Countdown", "InProcesses", "Pattern", "Reward", "UnitTests", "exact_match", "token_f1"]
