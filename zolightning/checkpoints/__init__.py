"""Checkpoints of a run: how they are written and read, when, and how a run goes on from one."""
