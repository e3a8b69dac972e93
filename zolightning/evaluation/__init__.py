"""Evaluation: how a loss sees moved weights."""
