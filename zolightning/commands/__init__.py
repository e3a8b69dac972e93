"""The subcommands of the command line, its options, and what they print and write.

In the order of reading:

* The words of a command become settings: ``arguments``, ``options``, ``slots``, ``loggers``; what the ``parser`` says:
  ``help``, ``explanations`` of errors.
* Settings become a run: ``checks``, ``trainer``, ``configured_trainer``, ``leave_as_found``; several: ``seeds``.
* What a run leaves behind, and what reads it: ``metrics_files``, ``next_commands``; ``event_log``, ``run_folder``.
* Before a run: ``doctor`` (with ``rounding``, ``findings``), ``profile`` (``sensitivity``, ``time_model``),
  ``sweep_layers`` (``sweep_results``).
* After it: ``export`` (``model_card``), ``replay``, ``report`` (``report_page``, ``report_curves``); beside all runs:
  ``configs``.
* What they share: ``output_folder``, ``quiet``, ``tables``, ``plots``, ``timing``.
"""
