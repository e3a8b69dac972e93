"""A page that compares several runs: one HTML file that needs no other."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from statistics import median_high
from string import ascii_uppercase
from typing import Any

from jinja2 import Environment

from zolightning.commands.event_log import Point
from zolightning.commands.report_curves import COLORS, Line, curves_svg
from zolightning.commands.run_folder import Run, max_steps

_PAGE = """
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
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
tbody th { overflow-wrap: anywhere; min-width: 9em; } .results td { white-space: nowrap; }
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
</style>
</head>
<body>
{% macro mark(letter, color) %}<span class="run" style="color: {{ color }}">{{ letter }}</span>{% endmacro %}
{% macro name(letter, color, run) %}
{{ mark(letter, color) }} {{ run.folder|string|replace("/", "/<wbr>"|safe) }}
{%- endmacro %}
{% macro plots(pictures) %}
<ul class="legend">{% for row in rows %}<li>{{ name(*row) }}</li>{% endfor %}</ul>
<div class="plots">{% for picture in pictures if picture %}<figure>{{ picture|safe }}</figure>{% endfor %}</div>
{% endmacro %}
<h1>{{ title }}</h1>
<p>{{ now.strftime("%d %B %Y, %H:%M") }}. Letters and colours are the same on the whole page.</p>
<h2>Results</h2>
<div class="wide"><table class="results"><thead><tr><th>run</th><th>state</th>
{% for monitor in monitors %}<th>{{ monitor }} before</th><th>best {{ monitor }}</th>{% endfor %}
{% if has_tests %}<th>test</th>{% endif %}
<th>forward passes</th><th>time</th><th>steps a second</th><th>peak memory</th></tr></thead><tbody>
{% for letter, color, run in rows %}
<tr><th>{{ name(letter, color, run) }}</th>
{% set most = max_steps(run.config) %}
<td>{{ run.state }}<small>step {{ run.step|count }}{% if most > 0 %} of {{ most|count }}{% endif %}</small></td>
{% for monitor in monitors %}
<td>{{ run.at(monitor, 0)|number }}</td>
{% set best = run.best if run.monitor == monitor else none %}
<td>{{ (best and best.value)|number }}{% if best %}<small>step {{ best.step|count }}</small>
{% for other in run.metrics[1:] if run.at(other, best.step) is not none %}
<small>{{ other }} {{ run.at(other, best.step)|number }}</small>
{% endfor %}{% endif %}</td>
{% endfor %}
{% if has_tests %}
<td>{% for metric, value in run.test|dictsort %}{{ metric.removeprefix("test/") }} {{ value|number }}<br>{% else %}-
{% endfor %}</td>
{% endif %}
<td>{{ run.spent.forward_passes|count }}</td><td>{{ run.spent.seconds|duration }}</td>
<td>{{ median(run, "run/steps_per_second")|number }}</td>
<td>{{ "-" if run.peak_memory_gib is none else "%.2f GiB"|format(run.peak_memory_gib) }}</td>
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">Time: training with its validations and what was measured before the first step, without pauses.
Memory: peak of the tensors on a GPU; without one, peak of the process.</p>
{% if validation %}<h2>Validation</h2>{% endif %}
{% for pictures in validation %}{{ plots(pictures) }}{% endfor %}
{% if some_by_backpropagation %}
<p class="note">Curves against forward passes leave out runs that train by backpropagation: a backward pass is no
forward pass.</p>
{% endif %}
<h2>Training</h2>
{{ plots(training) }}
<p class="note">Metrics of training batches are means of the last 10 values.</p>
<h2>Settings that differ</h2>
{% if differences %}
<div class="wide"><table class="settings"><thead><tr><th>setting</th>
{% for letter, color, _ in rows %}<th>{{ mark(letter, color) }}</th>{% endfor %}</tr></thead><tbody>
{% for setting, values in differences.items() %}
<tr><th>{{ setting }}</th>
{% for value in values %}
<td><code>{{ "-" if value is none else value if value is string else value|tojson|forceescape }}</code></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
<p class="note">From config.yaml, except folders that runs write to. A dash means null or no such setting.</p>
{% else %}
<p>{{ "None." if rows|length > 1 else "There is one run." }}</p>
{% endif %}
<h2>The runs</h2>
{% for letter, color, run in rows %}
<h3>{{ name(letter, color, run) }}</h3><dl>
{% for fact, text in run.overview.items() if fact not in ("folder", "curves") %}
<dt>{{ fact }}</dt><dd>{{ text }}</dd>
{% endfor %}
{% if run.best_checkpoint %}<dt>best checkpoint</dt><dd>{{ run.best_checkpoint }}</dd>{% endif %}
{% if run.commands %}
<dt>command</dt><dd>{% for command in run.commands %}<code>{{ command }}</code><br>{% endfor %}</dd>
{% endif %}</dl>
{% endfor %}
</body>
</html>
"""


def page(runs: Sequence[Run], differences: Mapping[str, Sequence[Any]], title: str) -> str:
    """The page.

    Args:
        runs: at most 26, which are called A, B, C and so on.
        differences: settings that are not the same in all runs, with the value of each; None where it has none.
        title: the heading of the page.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "count": _count, "duration": _duration}
    by_passes = [run for run in runs if run.spent.forward_passes is not None]
    longest = max(run.spent.seconds for run in runs)
    unit, unit_name = (3600, "hours") if longest > 3600 else (60, "minutes") if longest > 60 else (1, "seconds")
    axes: dict[str, Callable[[Point], float | None]] = {"steps": lambda point: point.step}
    if by_passes:
        axes["forward passes"] = lambda point: point.forward_passes
    axes[f"time in {unit_name}"] = lambda point: point.seconds / unit
    validated = dict.fromkeys(name for run in runs for name in run.metrics)
    trained = dict.fromkeys(name for run in runs for name in run.curves if name.startswith("train"))
    means = {**dict.fromkeys(trained, 10), "run/peak_memory_gib": 1, "run/steps_per_second": 1}
    return environment.from_string(_PAGE.lstrip()).render(
        title=title,
        now=datetime.now(),
        rows=[
            (letter, COLORS[number % len(COLORS)], run)
            for number, (letter, run) in enumerate(zip(ascii_uppercase, runs, strict=False))
        ],
        monitors=list(dict.fromkeys(run.monitor for run in runs if run.best is not None and run.monitor)),
        has_tests=any(run.test for run in runs),
        validation=[[_picture(runs, name, x, value) for x, value in axes.items()] for name in validated],
        some_by_backpropagation=by_passes and len(by_passes) < len(runs),
        training=[_picture(runs, name, "steps", axes["steps"], mean_of) for name, mean_of in means.items()],
        differences=differences,
        max_steps=max_steps,
        median=_median,
    )


def _picture(runs: Sequence[Run], metric: str, x: str, value: Callable[[Point], float | None], mean_of: int = 1) -> str:
    """The curves of a metric; empty where no run has it."""
    lines = []
    for number, run in enumerate(runs):
        pairs = [(at, point.value) for point in run.curves.get(metric, []) if (at := value(point)) is not None]
        if pairs:
            lines.append(Line(number, [x for x, _ in pairs], [y for _, y in pairs]))
    return curves_svg(lines, x, metric, mean_of, from_zero=metric.startswith("run/")) if lines else ""


def _median(run: Run, metric: str) -> float | None:
    values = [point.value for point in run.curves.get(metric, [])]
    return median_high(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
