"""A page that compares several runs: one HTML file that needs no other."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape
from statistics import median_high
from string import ascii_uppercase
from typing import Any

from zolightning.commands.event_log import Point
from zolightning.commands.run_folder import Run, max_steps
from zolightning.commands.run_plots import COLORS, Line, curves_svg

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; color: #222; background: #fff;
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0.3em 0; } h2 { font-size: 1.15rem; margin: 2em 0 0.4em; }
h3 { font-size: 1rem; margin: 1.4em 0 0.2em; overflow-wrap: anywhere; }
p, .note { margin: 0.3em 0; color: #555; } .note { font-size: 0.9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid #e3e3e3;
  min-width: 4.5em; }
tbody th { overflow-wrap: anywhere; min-width: 9em; }
th { font-weight: 600; } thead th { color: #555; border-bottom-color: #999; }
.settings th:first-child { min-width: 15em; }
small { color: #555; font-size: 0.85em; } td small { display: block; }
.run { font-weight: 700; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 1.2em 0 0.3em; list-style: none;
  font-size: 0.9rem; }
.legend li { overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 350px), 1fr)); gap: 12px 20px; }
figure { margin: 0; } svg { display: block; width: 100%; max-width: 560px; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 0.92rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.9em/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
@media (max-width: 700px) {
  thead { display: none; }
  table, tbody, tr, th, td { display: block; }
  tr { padding: 8px 0; border-bottom: 1px solid #ccc; }
  th, td { border: 0; padding: 2px 0; min-width: 0; }
  td { display: grid; grid-template-columns: 8.5em 1fr; } td small { grid-column: 2; }
  td::before { content: attr(data-label); color: #555; grid-row: span 2; overflow-wrap: anywhere; padding-right: 8px; }
  .settings td { display: inline-flex; gap: 0.5em; align-items: baseline; margin-right: 1.2em; }
  .settings td::before { padding: 0; font-weight: 700; }
  dl { display: block; } dt { margin-top: 6px; }
}
"""

Column = tuple[str, Callable[[Run], str]]  # its head, and a run's cell in HTML


def page(runs: Sequence[Run], differences: Mapping[str, Sequence[Any]], title: str) -> str:
    """The page.

    Args:
        runs: at most 26, which are called A, B, C and so on.
        differences: settings that are not the same in all runs, with the value of each; None where it has none.
        title: the heading of the page.
    """
    when = f"{datetime.now():%d %B %Y, %H:%M}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{when}. Letters and colours are the same on the whole page.</p>",
        *_results(runs),
        *_curves(runs),
        *_settings(runs, differences),
        *(part for number, run in enumerate(runs) for part in _making(number, run)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n"
        "</html>\n"
    )


def _results(runs: Sequence[Run]) -> Iterator[str]:
    """The table: a row a run, which a narrow window shows as a block."""
    monitors = list(dict.fromkeys(run.monitor for run in runs if run.best is not None and run.monitor))
    columns: list[Column] = [("state", _state)]
    for monitor in monitors:
        columns.append((f"{monitor} before", lambda run, name=monitor: _number(run.at(name, 0))))  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
        columns.append((f"best {monitor}", lambda run, name=monitor: _best(run, name)))  # type: ignore[misc]
    if any(run.test for run in runs):
        columns.append(("test", lambda run: _several(run.test)))
    columns += [
        ("forward passes", lambda run: "-" if run.spent.forward_passes is None else f"{run.spent.forward_passes:,}"),
        ("time", lambda run: _duration(run.spent.seconds)),
        ("steps a second", lambda run: _number(_median(run, "run/steps_per_second"))),
        ("peak memory", lambda run: _gib(run.peak("run/peak_memory_gib"))),
    ]
    yield "<h2>Results</h2>"
    heads = "".join(f"<th>{escape(head)}</th>" for head, _ in columns)
    yield f'<div class="wide"><table><thead><tr><th>run</th>{heads}</tr></thead><tbody>'
    for number, run in enumerate(runs):
        cells = "".join(f'<td data-label="{escape(head)}"><span>{cell(run)}</span></td>' for head, cell in columns)
        yield f"<tr><th>{_name(number, run)}</th>{cells}</tr>"
    yield "</tbody></table></div>"
    yield (
        '<p class="note">Time is that of training with its validations and what was measured before the first '
        "step, without pauses. Memory is the most that tensors took on a GPU; without one, that the process took.</p>"
    )


def _curves(runs: Sequence[Run]) -> Iterator[str]:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    by_passes = [run for run in runs if run.spent.forward_passes is not None]
    longest = max(run.spent.seconds for run in runs)
    unit, name = (3600, "hours") if longest > 3600 else (60, "minutes") if longest > 60 else (1, "seconds")
    axes: dict[str, Callable[[Point], float | None]] = {"steps": lambda point: point.step}
    if by_passes:
        axes["forward passes"] = lambda point: point.forward_passes
    axes[f"time in {name}"] = lambda point: point.seconds / unit
    yield "<h2>Validation</h2>" if metrics else ""
    for metric in metrics:
        yield from _plots(runs, [(metric, x, value, 1) for x, value in axes.items()])
    if by_passes and len(by_passes) < len(runs):
        yield (
            '<p class="note">Runs that train by backpropagation are not among those against forward passes: a backward '
            "pass is none.</p>"
        )
    yield "<h2>Training</h2>"
    trained = dict.fromkeys(name for run in runs for name in run.curves if name.startswith("train"))
    shown = {**dict.fromkeys(trained, 10), "run/peak_memory_gib": 1, "run/steps_per_second": 1}
    yield from _plots(runs, [(name, "steps", axes["steps"], mean_of) for name, mean_of in shown.items()])
    yield '<p class="note">Metrics of training batches are means of the latest 10 values.</p>'


def _plots(
    runs: Sequence[Run], plots: Sequence[tuple[str, str, Callable[[Point], float | None], int]]
) -> Iterator[str]:
    """Pictures that are beside each other where there is room, and whose runs are named above them."""
    yield '<ul class="legend">' + "".join(f"<li>{_name(i, run)}</li>" for i, run in enumerate(runs)) + "</ul>"
    yield '<div class="plots">'
    for metric, x, value, mean_of in plots:
        lines = []
        for number, run in enumerate(runs):
            pairs = [(at, point.value) for point in run.curves.get(metric, []) if (at := value(point)) is not None]
            if pairs:
                lines.append(Line(number, ascii_uppercase[number], [x for x, _ in pairs], [y for _, y in pairs]))
        if lines:
            yield f"<figure>{curves_svg(lines, x, metric, mean_of, metric.startswith('run/'))}</figure>"
    yield "</div>"


def _settings(runs: Sequence[Run], differences: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    yield "<h2>Settings that differ</h2>"
    if not differences:
        yield "<p>None.</p>" if len(runs) > 1 else "<p>There is one run.</p>"
        return
    heads = "".join(f"<th>{_letter(number)}</th>" for number in range(len(runs)))
    yield f'<div class="wide"><table class="settings"><thead><tr><th>setting</th>{heads}</tr></thead><tbody>'
    for name, values in differences.items():
        cells = "".join(
            f'<td data-label="{ascii_uppercase[number]}"><code>{escape(_setting(value))}</code></td>'
            for number, value in enumerate(values)
        )
        yield f"<tr><th>{escape(name)}</th>{cells}</tr>"
    yield "</tbody></table></div>"
    yield '<p class="note">Of config.yaml, but for folders that runs write to. A dash: null, or no such setting.</p>'


def _making(number: int, run: Run) -> Iterator[str]:
    yield "<h2>The runs</h2>" if not number else ""
    yield f"<h3>{_name(number, run)}</h3><dl>"
    facts = {name: escape(text) for name, text in run.overview.items() if name not in ("goes to", "watch it")}
    if run.best_checkpoint is not None:
        facts["best checkpoint"] = escape(str(run.best_checkpoint))
    if run.commands:
        facts["command"] = "<br>".join(f"<code>{escape(command)}</code>" for command in run.commands)
    yield "".join(f"<dt>{escape(name)}</dt><dd>{text}</dd>" for name, text in facts.items()) + "</dl>"


def _letter(number: int) -> str:
    return f'<span class="run" style="color: {COLORS[number % len(COLORS)]}">{ascii_uppercase[number]}</span>'


def _name(number: int, run: Run) -> str:
    return f"{_letter(number)} {escape(str(run.folder)).replace('/', '/<wbr>')}"


def _state(run: Run) -> str:
    most = max_steps(run.config)
    return f"{run.state}<small>step {run.step:,}{f' of {most:,}' if most > 0 else ''}</small>"


def _best(run: Run, monitor: str) -> str:
    if run.monitor != monitor or run.best is None:
        return "-"
    others = {name: value for name in run.metrics[1:] if (value := run.at(name, run.best.step)) is not None}
    lines = [f"step {run.best.step:,}", *(f"{escape(name)} {_number(value)}" for name, value in others.items())]
    return _number(run.best.value) + "".join(f"<small>{line}</small>" for line in lines)


def _several(metrics: Mapping[str, float]) -> str:
    lines = [f"{name.removeprefix('test/')} {_number(value)}" for name, value in sorted(metrics.items())]
    return "<br>".join(_unbroken(escape(line)) for line in lines) or "-"


def _median(run: Run, metric: str) -> float | None:
    values = [point.value for point in run.curves.get(metric, [])]
    return median_high(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return _unbroken(words)


def _unbroken(text: str) -> str:
    return text.replace(" ", "&nbsp;")


def _setting(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)
