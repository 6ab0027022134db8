"""The comparison's rows, tables and files, from what runs wrote."""

import csv
import json

import pytest

from utils.comparison import comparison_row, comparison_tables, comparison_text, write_comparison
from utils.files import digest_file
from utils.resume import finished_run

BEFORE = {"acc": 82.0, "acc_published": 83.0, "asr": 99.0, "ra": 1.0, "floor": 2.0, "per_class": []}


def row(victim, defense, after, seconds=10.0):
    metrics = {"before": BEFORE, "after": after, "seed": 1, "detected_label": 5}
    metrics["seconds"] = {"data": 100.0, "evaluate": 50.0, "purify": seconds, "detect": 2.5, "total": 999.0}
    return comparison_row(victim, defense, metrics)


def figures(acc, asr):
    return {**BEFORE, "acc": acc, "acc_published": acc, "asr": asr, "ra": acc}


ROWS = [
    row("one", "mcl", figures(81.0, 2.0)),
    row("one", "ft", figures(81.004, 12.0), seconds=5.0),
    row("one", "nc", None, seconds=1.0),
]


def test_seconds_are_those_of_the_defense_alone():
    assert [found["seconds"] for found in ROWS] == [12.5, 7.5, 3.5]
    assert [found["changed"] for found in ROWS] == [True, True, False]
    assert ROWS[2]["asr"] == ROWS[0]["before_asr"] == 99.0


def test_of_one_victim_there_is_a_row_a_defense_and_the_best_are_marked():
    ((title, header, cells),) = comparison_tables(ROWS, "<{}>".format)
    assert (title, header) == ("one", ["defense", "ACC", "ACC*", "ASR", "RA", "seconds"])
    assert cells == [
        ["none", "82.00", "83.00", "99.00", "1.00", ""],
        ["mcl", "<81.00>", "<81.00>", "<2.00>", "<81.00>", "12.50"],
        ["ft", "<81.00>", "<81.00>", "12.00", "<81.00>", "<7.50>"],  # equal, as far as it is shown
        ["nc (found nothing)", "82.00", "83.00", "99.00", "1.00", "3.50"],
    ]
    assert ">2.00" in comparison_text(ROWS)


def test_of_several_victims_there_is_a_table_a_figure_with_a_row_a_victim():
    tables = comparison_tables([*ROWS, row("two", "mcl", figures(70.0, 1.0))], "<{}>".format)
    assert [title for title, *_ in tables] == ["ACC", "ACC*", "ASR", "RA", "seconds"]
    assert tables[2][1] == ["victim", "none", "mcl", "ft", "nc"]
    assert tables[2][2] == [
        ["one", "99.00", "<2.00>", "12.00", "99.00"],
        ["two", "99.00", "<1.00>", "failed", "failed"],
    ]
    assert tables[4][2][1] == ["two", "<12.50>", "failed", "failed"]


def test_models_that_are_only_measured_have_one_column_and_took_no_time():
    tables = comparison_tables([row("one", "none", None), row("two", "none", None)], str)
    assert [title for title, *_ in tables] == ["ACC", "ACC*", "ASR", "RA"]
    assert tables[0][1:] == (["victim", "none"], [["one", "82.00"], ["two", "82.00"]])


@pytest.mark.parametrize("rows", [ROWS, [*ROWS, row("t|wo", "mcl", None)]])
def test_three_files_are_written(tmp_path, rows):
    write_comparison(str(tmp_path), rows)
    with open(tmp_path / "comparison.csv") as file:
        read = list(csv.DictReader(file))
    assert [(found["victim"], found["defense"], float(found["asr"])) for found in read] == [
        (found["victim"], found["defense"], found["asr"]) for found in rows
    ]
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert any("**2.00**" in line for line in table)
    assert len({line.replace("\\|", "").count("|") for line in table if "seconds" not in line}) <= 2
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_of_nothing(tmp_path):
    write_comparison(str(tmp_path / "x"), [])
    assert not (tmp_path / "x").exists()


def test_a_run_is_finished_with_its_own_options_on_its_own_file_only(tmp_path):
    model = tmp_path / "model.tar"
    model.write_bytes(b"weights")
    options = {"lr": 0.1, "model": str(model), "data_root": "a", "resume": True, "target": "auto"}
    assert finished_run(str(tmp_path), options, str(model)) is None
    stored = {"model_sha256": digest_file(str(model)), "before": BEFORE, "config": {**options, "data_root": "b"}}
    (tmp_path / "metrics.json").write_text(json.dumps(stored))
    assert finished_run(str(tmp_path), options, str(model)) == stored
    assert finished_run(str(tmp_path), {**options, "lr": 0.2}, str(model)) is None
    assert finished_run(str(tmp_path), {**options, "new": 1}, str(model)) is None
    folders = {"dataset": "folder", "data_root": "a"}  # there the root says which pictures they are
    (tmp_path / "metrics.json").write_text(json.dumps({**stored, "config": {**options, **folders}}))
    assert finished_run(str(tmp_path), {**options, **folders}, str(model)) is not None
    assert finished_run(str(tmp_path), {**options, **folders, "data_root": "b"}, str(model)) is None
    (tmp_path / "metrics.json").write_text(json.dumps(stored))
    model.write_bytes(b"others")
    assert finished_run(str(tmp_path), options, str(model)) is None
    (tmp_path / "metrics.json").write_text("[1, 2")
    assert finished_run(str(tmp_path), options, str(model)) is None
