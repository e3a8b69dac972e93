"""The prompts of the package's tasks, letter by letter, on invented rows."""

from typing import Any

import pytest

from zolightning.data.classification import CandidatesTask, Classification
from zolightning.data.task_files import load_task
from zolightning.packaged import configs

YES_NO = ["Yes", "No"]
NO_YES = ["No", "Yes"]

CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "sst2": (
        {"sentence": " slow but warm-hearted ", "label": 1},
        "slow but warm-hearted It was",
        [" terrible", " great"],
    ),
    "rte": (
        {"premise": "The ferry left at noon.", "hypothesis": "A boat left.", "label": 0},
        'The ferry left at noon.\nDoes this mean that "A boat left." is true? Yes or No?\n',
        YES_NO,
    ),
    "cb": (
        {"premise": "B: I doubt it rained.", "hypothesis": "it rained", "label": 1},
        'Suppose B: I doubt it rained. Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
    ),
    "boolq": (
        {"passage": "Otters -- Otters swim.", "question": "do otters swim", "label": 1},
        "Otters -- Otters swim. Do otters swim?\n",
        NO_YES,
    ),
    "wsc": (
        {"text": "Ann told Eve that She won.", "span1_text": "Ann", "span2_text": "She", "label": 1},
        'Ann told Eve that She won.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
        NO_YES,
    ),
    "wic": (
        {"word": "bank", "sentence1": "The bank closed.", "sentence2": "They sat on the bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank closed.\nThey sat on the bank.\n",
        NO_YES,
    ),
    "multirc": (
        {"paragraph": "Ivo baked bread.", "question": "Who baked?", "answer": "Ivo", "label": 1},
        'Ivo baked bread.\nQuestion: Who baked?\nI found this answer "Ivo". Is that correct? Yes or No?\n',
        NO_YES,
    ),
    "copa": (
        {
            "premise": "The pond froze. ",
            "choice1": "TV crews came to film.",
            "choice2": "I went skating.",
            "question": "effect",
            "label": 1,
        },
        "The pond froze so",
        [" tv crews came to film.", " I went skating."],
    ),
    "snli": (
        {"premise": "Two dogs run.", "hypothesis": "Animals move.", "label": 0},
        'Two dogs run.\nDoes this mean that "Animals move." is true? Yes, No, or Maybe?\n',
        ["Yes", "Maybe", "No"],
    ),
    "mnli": (
        {"premise": "Two dogs run.", "hypothesis": "Animals move.", "label": 0},
        'Two dogs run.\nDoes this mean that "Animals move." is true? Yes, No, or Maybe?\n',
        ["Yes", "Maybe", "No"],
    ),
    "trec": (
        {"text": "Who built the mill ?", "coarse_label": 3},
        "Question: Who built the mill ?\nType:",
        [" Expression", " Entity", " Description", " Human", " Location", " Number"],
    ),
    "agnews": (
        {"text": "Mill reopens after storm. ", "label": 2},
        "Mill reopens after storm.\nTopic:",
        [" World", " Sports", " Business", " Technology"],
    ),
    "sst5": (
        {"text": " a mild surprise . ", "label": 2},
        "a mild surprise . It was",
        [" terrible", " bad", " okay", " good", " great"],
    ),
    "mr": ({"text": "it drags .", "label": 0}, "it drags . It was", [" terrible", " great"]),
    "imdb": (
        {"text": "Slow.<br /><br />But warm.", "label": 1},
        "Slow.  But warm. It was",
        [" terrible", " great"],
    ),
    "record": (
        {
            "passage": "Eve rowed to Ull.\n@highlight\nEve was late\n@highlight\nAnn was not",
            "query": "@placeholder waited for Eve",
            "entities": ["Ull", "Ann", "Ull"],
            "answers": ["Ann"],
        },
        "Eve rowed to Ull.\n- Eve was late\n- Ann was not\n-",
        [" Ull waited for Eve", " Ann waited for Eve"],
    ),
    "squad": (
        {
            "title": "Mills",
            "context": "The mill burned in 1903.",
            "question": " When did it burn? ",
            "answers": {"text": ["1903", "in 1903"], "answer_start": [19, 16]},
        },
        "Title: Mills\nContext: The mill burned in 1903.\nQuestion: When did it burn?\nAnswer:",
        [" 1903\n"],
    ),
    "drop": (
        {
            "passage": "Ann sold 3 boats, Eve 5.",
            "question": "How many were sold?",
            "answers_spans": {"spans": ["8"], "types": ["number"]},
        },
        "Passage: Ann sold 3 boats, Eve 5.\nQuestion: How many were sold?\nAnswer:",
        [" 8\n"],
    ),
    "sentiment": ({"sentence": "The soup was cold.", "label": 0}, "The soup was cold. It was", [" terrible", " great"]),
    "countdown": (
        {"numbers": "9 8 2", "target": 1, "solution": "8 + (2 - 9)"},
        "Write 1 as an equation of 9, 8, 2, with + - * and parentheses.\n1 =",
        [" 8 + (2 - 9)\n"],
    ),
}


# What is left of the prompts without their content, as in MeZO's templates; generated answers have none.
CONTENT_FREE = {
    **dict.fromkeys(("sst2", "sst5", "mr", "imdb", "sentiment"), "It was"),
    **dict.fromkeys(("rte", "cb", "boolq", "wsc", "wic", "multirc", "snli", "mnli"), ""),
    "copa": "so",
    "record": "-",
    "trec": "Type:",
    "agnews": "Topic:",
}


@pytest.mark.parametrize("name", CONTENT_FREE)
def test_content_free_prompt_and_answers(name: str) -> None:
    row, _, answers = CASES[name]
    task = load_task(name)
    assert isinstance(task, CandidatesTask)
    assert task.render_content_free(row) == (CONTENT_FREE[name], answers)


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_answers(name: str) -> None:
    row, prompt, answers = CASES[name]
    task = load_task(name)
    assert task.name == name
    assert task.fields <= set(row)
    assert task.render(row) == (prompt, answers)
    if isinstance(task, Classification):
        assert [task.right({task.label: label}) for label in task.labels] == [(index,) for index in range(len(answers))]


def test_every_file_of_the_package_has_a_case() -> None:
    assert {file.stem for file in (configs() / "tasks").glob("*.yaml")} == set(CASES)


def test_boolq_keeps_a_question_mark() -> None:
    prompt, _ = load_task("boolq").render({"passage": "P.", "question": "Is it?", "label": 0})
    assert prompt == "P. Is it?\n"


def test_calibration_of_copa_has_the_row_s_conjunction() -> None:
    row = {"premise": "I slept.", "choice1": "A", "choice2": "B", "question": "cause", "label": 0}
    task = load_task("copa")
    assert isinstance(task, CandidatesTask)
    assert task.render_content_free(row) == ("because", [" a", " b"])


def test_copa_asks_for_a_cause() -> None:
    row = {"premise": "I slept.", "choice1": "A", "choice2": "It was Late.", "question": "cause", "label": 0}
    assert load_task("copa").render(row) == ("I slept because", [" a", " it was Late."])


def test_tasks_that_train_on_the_right_answer_alone() -> None:
    trained = {name for name in CASES if load_task(name).objective == "language_modeling"}
    assert trained == {"copa", "record", "squad", "drop", "countdown"}


def test_record_counts_every_right_entity() -> None:
    row = {"entities": ["Ull", "Ann", "Ull", "Eve"], "answers": ["Eve", "Ann", "Eve", "Bo"]}
    assert load_task("record").right(row) == (2, 1)


def test_the_references_of_squad_and_drop() -> None:
    squad, _, _ = CASES["squad"]
    assert load_task("squad").reference_texts(squad) == ("1903", "in 1903")
    assert load_task("drop").reference_texts(CASES["drop"][0]) == ("8",)


def test_validation_sizes_that_differ() -> None:
    sizes = {name: load_task(name).num_validation for name in CASES}
    assert {name for name, size in sizes.items() if size != 500} == {"cb", "copa", "wsc", "sentiment", "countdown"}
    assert {sizes[name] for name in ("cb", "copa", "wsc")} == {100}


def test_snli_leaves_out_rows_without_a_majority() -> None:
    assert load_task("snli").right({"label": -1}) is None
