"""Callbacks: what is trained, when, and what is recorded."""

from zolightning.callbacks.prediction_writer import PredictionWriter
from zolightning.callbacks.run_monitor import RunMonitor
from zolightning.callbacks.zeroth_order import ZerothOrder

__all__ = ["PredictionWriter", "RunMonitor", "ZerothOrder"]
