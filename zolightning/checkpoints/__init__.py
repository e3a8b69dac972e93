"""Checkpoints and ledgers: how a run is saved, resumed and replayed."""
