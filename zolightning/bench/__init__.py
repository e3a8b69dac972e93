"""Benchmarks, ``python -m zolightning.bench``; ``logs/README.md`` says what they measure and what they found.

In the order of reading:

* The command: ``__main__``, ``options``.
* What a step costs: ``step``, ``rows``, ``published``, ``step_records``, ``step_parts``, ``floors``; on what:
  ``subject``, ``prompts``, ``lengths``, ``shapes``.
* On a GPU, in eight minutes: ``gpu``, ``bits``, ``loop_runs``, ``repetition``, ``kernel_cost``.
* What is learned: ``learn``, ``learn_entries``, ``learn_run``, ``learn_results``; what could be: ``signal``.
* Others: ``memory``, ``blocks``, ``scale``.
* What they share: ``measure``, ``figures``.
"""
