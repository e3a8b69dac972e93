"""Checkpoints and ledgers: how a run is saved, resumed and replayed.

In the order of reading:

* Files that are whole or absent: ``checkpoint_io``.
* The ledger: ``ledger``, ``ledger_header``, ``ledger_entry``, ``given_bases``; who writes it: ``keep_ledger``; who
  reads it: ``replay``, ``follow``, ``find_ledger``.
* The last step of a run: ``save_last``, with ``stop_signal``, ``before_others``, ``other_checkpoints`` and
  ``unfinished_batch``.
* A run that goes on from there: ``resume``, ``same_run``, ``resumed_epoch``, ``running_metrics``, ``generators``,
  ``run_logs``.
"""
