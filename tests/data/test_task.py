"""The declaration of a task: its file, its templates, its labels."""

from datetime import date
from pathlib import Path

import pytest

from zolightning.data.classification import Classification
from zolightning.data.task_files import load_task
from zolightning.data.templates import MASK

GOOD = """
name: weather
prompt: "{{ report }} Will it rain?"
answers: [" No", " Yes"]
labels: [dry, wet]
"""


WRITTEN = "name: x\nprompt: y\nreferences: a.text\n"
CHOICES = 'name: x\nprompt: y\nchoices: a\nanswer: "{{ choice }}"\nright_choices: b\n'


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_users_own_file(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    task = load_task(write(tmp_path, GOOD + "label: outcome\nskip_labels: [unclear]\nfolder: rows\n"))
    assert task.name == "weather"
    assert task.fields == {"report", "outcome"}
    assert task.folder == rows
    assert task.render({"report": "Fog.", "outcome": "dry"}) == ("Fog. Will it rain?", [" No", " Yes"])
    assert [task.right({"outcome": label}) for label in ("dry", "wet", "unclear")] == [(0,), (1,), None]


def test_a_config_file_is_a_task_too(tmp_path: Path) -> None:
    plain = load_task(write(tmp_path, GOOD + "num_test: 7\n"))
    indented = "".join(f"    {line}\n" for line in [*GOOD.strip().splitlines(), "num_test: 7"])
    assert load_task(write(tmp_path, f"data:\n  batch_size: 3\n  task:\n{indented}")) == plain
    assert plain.num_test == 7 and plain.num_train == 1000


def test_a_label_outside_the_task(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label 'snow' in field `label` must be one of \['dry', 'wet'\]"):
        load_task(write(tmp_path, GOOD)).right({"label": "snow"})


def test_references_may_be_nested_numbers_and_several(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, WRITTEN))
    assert task.right({"a": {"text": "one"}}) == (0,)
    assert task.reference_texts({"a": {"text": ["one", 10**400, 0.5]}}) == ("one", "1" + "0" * 400, "0.5")
    assert task.answers_to({"a": {"text": ["one", 2]}}, {}) == [" one\n"]
    assert task.answers_to({"a": None}, {}) == ["\n"], "nothing to train on: a text will be written"


@pytest.mark.parametrize("found", [None, "one", {}, {"text": None}])
def test_a_row_without_references(tmp_path: Path, found: object) -> None:
    with pytest.raises(ValueError, match=r"field `a\.text` is missing or null"):
        load_task(write(tmp_path, WRITTEN)).right({"a": found})


@pytest.mark.parametrize("found", [[], " ", ["one", ""], {"one": 1}, True, float("nan"), float("inf")])
def test_references_that_are_no_texts(tmp_path: Path, found: object) -> None:
    """Among them truth values and NaN, of which a model would learn to write Python's notation."""
    with pytest.raises(ValueError, match=r"field `a\.text` must be a text or a list of texts, none empty, got "):
        load_task(write(tmp_path, WRITTEN)).right({"a": {"text": found}})


def test_truth_values_are_labels_of_their_own(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD.replace("[dry, wet]", "[no, yes]")))  # which YAML reads as truth values
    assert [task.right({"label": label}) for label in (False, True)] == [(0,), (1,)]
    with pytest.raises(ValueError, match=r"label 1 in field `label` must be one of \[False, True\]$"):
        task.right({"label": 1})
    with pytest.raises(ValueError, match=r"label 'no' in field `label` must be one of \[False, True\] \(quote them:"):
        task.right({"label": "no"})


def test_unknown_task() -> None:
    with pytest.raises(
        ValueError, match=r"`data.task` must be one of agnews, .*wsc, or the path of a YAML file, got 'x'"
    ):
        load_task("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name", "a task must be a mapping"),
        ("name: [", "while parsing"),
        (
            GOOD.replace("answers", "references"),
            "a task has no key `labels`; its keys are name, prompt, references, num",
        ),
        (
            "name: x\nprompt: y\nreference: z\n",
            r"no key `reference`; its keys .*\(unless one of `choices`, `references`",
        ),
        ("name: x\nmessages: turns\nprompt: y\n", "a task has no key `prompt`; its keys are name, num_train"),
        (GOOD + "lables: [0, 1]\n", "a task has no key `lables`; its keys are name, prompt, labels, answers"),
        (GOOD.replace("answers", "answrs"), "a task has no key `answrs`"),
        ("name: weather\nprompt: x\nlabels: [0, 1]\n", "a task needs the key `answers`"),
        (GOOD.replace("[dry, wet]", "[dry]"), r"`labels` must name one label for each of the 2 `answers`, got 1"),
        (GOOD.replace("[dry, wet]", "[dry, dry]"), "`labels` must all differ"),
        (GOOD.replace("[dry, wet]", "dry"), "`labels` must be a list, got 'dry'"),
        (
            GOOD.replace("[dry, wet]", "[0.5, 1]"),
            r"`labels` must be integers, strings or booleans, got \[0.5, 1\]",
        ),
        (GOOD.replace('[" No", " Yes"]', "[No, Yes]"), r"`answers` must be two strings.*got \[False, True\].*Quote"),
        (GOOD.replace('[" No", " Yes"]', '[" No"]'), "`answers` must be two strings"),
        (GOOD.replace("report }}", "report }"), "`prompt` is not a Jinja2 template: unexpected '}'"),
        (GOOD.replace("report }}", "report | shout }}"), "`prompt` is not a Jinja2 template: No filter named 'shout'"),
        (GOOD.replace('" No"', '"{{ no"'), "`answers` is not a Jinja2 template"),
        (GOOD + "objective: regression\n", "`objective` must be one of .*'classification'.* got 'regression'"),
        (WRITTEN + "stop: ''\n", "`stop` must be a text, such as a line break, got ''"),
        (WRITTEN + "max_new_tokens: 0\n", "`max_new_tokens` must be an integer, at least 1, got 0"),
        (WRITTEN + "max_new_tokens: 2.5\n", r"`max_new_tokens` must be an integer, at least 1, got 2\.5"),
        (CHOICES.replace("prompt: y", "prompt: '{{'"), "`prompt` is not a Jinja2 template"),
        (CHOICES.replace("choice }}", "choice"), "`answer` is not a Jinja2 template"),
        (CHOICES + "objective: classification\n", r"`objective` must be one of \('language_modeling', 'accuracy'\)"),
        (GOOD + "num_validation: 0\n", "`num_validation` must be an integer, at least 1, got 0"),
        (GOOD + "num_train: many\n", "`num_train` must be an integer, at least 1, got 'many'"),
        ("data:\n  batch_size: 3\n", "a task must be a mapping"),
        (GOOD + "label: 3\n", "`label` must be a string, got 3"),
        (GOOD + "hub: nyu-mll/glue\n", "`hub` must be a mapping"),
        (GOOD + "hub: {name: sst2}\n", "`hub` needs the key `path`"),
        (GOOD + "hub: {path: a/b, split: test}\n", "`hub` has no key `split`; its keys are path, name, train"),
        (GOOD + "hub: {path: 3}\n", "`hub.path` must be a string, got 3"),
        (GOOD + "hub: {path: a/b}\nfolder: rows\n", "`hub` and `folder` exclude each other"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        load_task(path)
    assert str(error.value).startswith(f"{path}: ")


def test_the_prompt_loses_its_outer_spaces_to_the_answers() -> None:
    task = Classification(name="t", prompt="  {{ text }}\nMood: ", answers=("good", "bad "), labels=(1, 0))
    assert task.render({"text": "Hi.", "label": 0}) == ("Hi.\nMood:", [" good", " bad"])


def test_where_a_mask_stands_for_the_answer_only_a_space_before_it_is_the_answers() -> None:
    task = Classification(name="t", prompt="{{ a }}? {{ mask }}, {{ b }}", answers=("Yes", "No"), labels=(1, 0))
    assert task.render({"a": "Hi", "b": "it rained ", "label": 0}) == (f"Hi?{MASK}, it rained", [" Yes", " No"])


def test_newlines_around_the_prompt_stay() -> None:
    task = Classification(name="t", prompt="\n{{ text }}\n", answers=("good", "bad"), labels=(1, 0))
    assert task.render({"text": "Hi.", "label": 0}) == ("\nHi.\n", ["good", "bad"])


@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        ("{{ text }}", {"label": 0}, "field `text` is missing or null; there are `label`"),
        ("{{ text }}", {"text": None, "label": 0}, "field `text` is missing or null"),
        ("{{ text.body }}", {"text": {"head": "a"}, "label": 0}, "do not fit this row: .*no attribute 'body'"),
        ("{{ 1 / (text | length - 1) }}", {"text": "a", "label": 0}, "do not fit this row: division by zero"),
        ("{{ text.upper }}", {"text": "a", "label": 0}, "they write <.*upper.*>, which is not text"),
        ("{{ text | map('upper') }}", {"text": "a", "label": 0}, "they write <generator .*>, which is not text"),
        ("{{ text + 1 }}", {"text": "a", "label": 0}, "do not fit this row: can only concatenate str"),
        ("{{ text.__class__.__mro__ }}", {"text": "a", "label": 0}, "do not fit this row: .*unsafe"),
    ],
)
def test_a_row_that_does_not_fit(prompt: str, row: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1)).render(row)


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, True, float("nan")])
@pytest.mark.parametrize("prompt", ["{{ sentence }} It was", "{{ sentence | trim }} It was"])
def test_values_that_are_no_text_are_not_written(value: object, prompt: str) -> None:
    task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
    with pytest.raises(ValueError, match=r"field `sentence` is .*which is no"):
        task.render({"sentence": value, "label": 0})


def test_templates_look_into_lists_and_decide_by_truth_values() -> None:
    prompt = "{{ words[1] }}{% if loud %}!{% endif %} {{ options.first }} {{ count }}"
    task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
    row = {"words": ["no", "yes"], "loud": True, "options": {"first": "left"}, "count": 3}
    assert task.render(row)[0] == "yes! left 3"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        *((None, "null"), (True, "true"), (["a"], r"\["), ({"a": 1}, r"\{"), (b"a", "b")),
        *((float("nan"), "nan"), (float("-inf"), "-inf")),
    ],
)
@pytest.mark.parametrize("prompt", ["{{ about.title }}", "{% for one in about.all %}{{ one }} {% endfor %}"])
def test_nor_are_those_inside_a_field(prompt: str, value: object, said: str) -> None:
    task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
    with pytest.raises(ValueError, match=f"(they write|is) {said}.*, which is not text"):
        task.render({"about": {"title": value, "all": ["one", value]}, "label": 0})


@pytest.mark.parametrize(
    "prompt", ["{{ 'so ' ~ about.all }}", "{{ about.all | join(' ') }}", "{{ about.all | replace('a', 'b') }}"]
)
def test_nor_by_joining_them(prompt: str) -> None:
    task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
    with pytest.raises(ValueError, match=r"of field `about` is \[.*, which is not text"):
        task.render({"about": {"all": [["one"]]}, "label": 0})


@pytest.mark.parametrize("prompt", ["{{ 'so ' ~ about.x }}", "{{ about.all | join(' ') }}", "{{ about.x | upper }}"])
def test_a_null_inside_a_field_is_not_written_either(prompt: str) -> None:
    task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
    with pytest.raises(ValueError, match="of field `about` is null, which is not text"):
        task.render({"about": {"x": None, "all": ["one", None]}, "label": 0})


def test_templates_decide_by_nulls_and_write_json() -> None:
    row = {"about": {"x": None, "all": ["one", None], "loud": True}, "label": 0}
    for prompt, written in {
        "{{ about.x or 'no' }} {{ about.all | reject('none') | join }}": "no one",
        "{% if about.x is none and about.x == none %}null{% endif %}": "null",
        "{{ about | tojson }}": '{"all": ["one", null], "loud": true, "x": null}',
    }.items():
        task = Classification(name="t", prompt=prompt, answers=("a", "b"), labels=(0, 1))
        assert task.render(row)[0] == written


def test_a_field_of_any_name_inside_a_field() -> None:
    task = Classification(name="t", prompt="{{ about.field }}", answers=("a", "b"), labels=(0, 1))
    assert task.render({"about": {"field": "rain"}, "label": 0})[0] == "rain"


def test_fields_that_are_named_as_functions_of_templates() -> None:
    task = Classification(name="t", prompt="{{ range }} {{ dict.a }}", answers=("a", "b"), labels=(0, 1))
    assert task.fields == {"range", "dict", "label"}
    assert task.render({"range": "1-2", "dict": {"a": date(2026, 1, 2)}, "label": 0})[0] == "1-2 2026-01-02"
    called = Classification(
        name="t", prompt="{% for i in range(2) %}{{ i }}{% endfor %}", answers=("a", "b"), labels=(0, 1)
    )
    assert called.fields == {"label"} and called.render({"label": 0})[0] == "01"
