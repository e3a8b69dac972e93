"""Evaluations: how a loss sees moved weights while the stored ones stay as they are.

In the order of reading:

* A loss and the evaluations of a step: ``losses``, ``evaluator``, ``mode``.
* Weights are replaced while they are read: ``perturbed``, ``torch_functions``, ``replaced``; in memory that is reused:
  ``scratch``, ``buffer``, ``small_tensors``.
* Where they are read: ``known_reads``, ``find_reads``, ``gathered_weights``.
* Every evaluation of a step starts from the same state: ``randomness``, ``fresh_batches``, ``traces``, ``snapshot``,
  ``own_generators``, ``submodules``, ``forward_hooks``; ``nested`` finds the tensors of a batch.
* What evaluations share: the lower layers (``shared_prefix``); or one forward (``shared_forward``, ``row_groups``) for
  all weights (``stacked``) or for each example (``examples``).
* Forwards replayed from CUDA graphs: ``graphs``, ``graph_capture``, ``graph_inputs``, ``graph_validity``,
  ``outside_memory``.
"""
