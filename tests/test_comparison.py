"""The rows, tables and files of a comparison, made from metrics.json of its runs."""

import csv
import json
from itertools import product

import pytest
import torch

import config
import main
from attacks import build_attack
from utils.files import sha256_of
from utils.reporting.comparison import comparison_row, comparison_tables, comparison_text, write_comparison
from utils.resume import finished_run

BEFORE = {"acc": 82.0, "acc_published": 83.0, "asr": 99.0, "ra": 1.0, "floor": 2.0, "per_class": []}


def make_row(victim, defense, after, seconds=10.0):
    metrics = {"before": BEFORE, "after": after, "seed": 1, "detected_label": 5, "purified": None}
    metrics["seconds"] = {"data": 100.0, "evaluate": 50.0, "purify": seconds, "detect": 2.5, "total": 999.0}
    return comparison_row(victim, defense, metrics)


def pairs_of(rows):
    """The runs of a comparison of which these are the rows: every defense on every victim."""
    pairs = [(row["victim"], row["defense"]) for row in rows]
    victims, defenses = (dict.fromkeys(names) for names in zip(*pairs, strict=True))
    return pairs + [pair for pair in product(victims, defenses) if pair not in pairs]


def tables_of(rows, mark=str):
    return comparison_tables(rows, pairs_of(rows), mark)


def make_metrics(acc, asr):
    return {**BEFORE, "acc": acc, "acc_published": acc, "asr": asr, "ra": acc}


ROWS = [
    make_row("one", "mcl", make_metrics(81.0, 2.0)),
    make_row("one", "nad", make_metrics(81.004, 3.0), seconds=5.0),
    make_row("one", "ft", make_metrics(85.0, 12.0), seconds=2.0),
    make_row("one", "nc", None, seconds=1.0),
]


def test_seconds_are_those_of_the_defense_alone():
    assert [row["seconds"] for row in ROWS] == [12.5, 7.5, 4.5, 3.5]
    assert [row["changed"] for row in ROWS] == [True, True, True, False]
    assert ROWS[3]["asr"] == ROWS[0]["before_asr"] == 99.0


def test_one_victim_has_one_table_with_a_row_for_each_defense():
    ((title, header, cells),) = tables_of(ROWS, "<{}>".format)
    assert (title, header) == ("one", ["defense", "ACC", "ACC*", "ASR", "RA", "seconds"])
    assert cells == [
        ["none", "82.00", "83.00", "99.00", "1.00", ""],
        ["mcl", "<81.00>", "<81.00>", "<2.00>", "<81.00>", "12.50"],
        ["nad", "<81.00>", "<81.00>", "3.00", "<81.00>", "<7.50>"],  # equal to two decimals
        ["ft", "85.00", "85.00", "12.00", "85.00", "4.50"],  # the backdoor is still there
        ["nc (found nothing)", "82.00", "83.00", "99.00", "1.00", "3.50"],
    ]
    text = comparison_text(ROWS, pairs_of(ROWS))
    assert ">2.00" in text
    assert text.splitlines()[-1].startswith("> best of its column, among the defenses after which the backdoor is gone")


def test_without_a_removed_backdoor_nothing_is_marked():
    rows = [ROWS[2], ROWS[3], make_row("one", "fst", {**make_metrics(90.0, 1.0), "asr": None})]
    ((_, _, cells),) = tables_of(rows, "<{}>".format)
    assert not any("<" in cell for line in cells for cell in line)
    assert cells[-1] == ["fst", "90.00", "90.00", "-", "90.00", "12.50"]
    assert "> " not in comparison_text(rows, pairs_of(rows))


def test_seeds_have_one_row_with_mean_and_spread():
    runs = {"mcl": (80.0, 82.0), "nad": (79.0, 80.2), "ft": (70.0, 71.0)}
    rows = [
        make_row("one", name, make_metrics(acc, 2.0)) | {"seed": s} for name in runs for s, acc in enumerate(runs[name])
    ]
    rows += [make_row("one", "nc", after) for after in (make_metrics(90.0, 2.0), None)]
    ((_, _, cells),) = tables_of(rows, "<{}>".format)
    assert cells[0][:2] == ["none", "82.00"]
    assert [line[:2] for line in cells[1:]] == [
        ["mcl", "<81.00 ± 1.41>"],
        ["nad", "<79.60 ± 0.85>"],  # 1.4 below the best, no more than the larger spread
        ["ft", "70.50 ± 0.71"],
        ["nc (found nothing in 1 of 2)", "86.00 ± 5.66"],  # the backdoor is still there in one seed
    ]
    assert "Mean ± standard deviation over the seeds 0, 1" in comparison_text(rows, pairs_of(rows))
    assert "seeds" not in comparison_text(ROWS, pairs_of(ROWS))


def test_several_victims_have_a_table_for_each_metric():
    rows = [*ROWS, make_row("two", "mcl", make_metrics(70.0, 1.0))]
    planned = [(victim, defense) for victim in ("one", "two", "three") for defense in ("mcl", "nad", "ft", "nc")]
    tables = comparison_tables(rows, planned, "<{}>".format)
    assert [title for title, *_ in tables] == ["ACC", "ACC*", "ASR", "RA", "seconds"]
    assert tables[2][1] == ["victim", "none", "mcl", "nad", "ft", "nc"]
    assert tables[2][2] == [
        ["one", "99.00", "<2.00>", "3.00", "12.00", "99.00"],
        ["two", "99.00", "<1.00>", "-", "-", "-"],
        ["three", "-", "-", "-", "-", "-"],
    ]
    assert tables[4][2][1] == ["two", "<12.50>", "-", "-", "-"]
    text = comparison_text(rows, planned)
    assert all(f"{pair}: (no result)" in text for pair in ("two, ft", "three, mcl"))
    assert "one, ft" not in text


def test_models_that_are_only_measured_have_one_column_and_no_seconds():
    rows = [make_row("one", "none", None), make_row("two", "none", None)]
    tables = tables_of(rows)
    assert [title for title, *_ in tables] == ["ACC", "ACC*", "ASR", "RA"]
    assert tables[0][1:] == (["victim", "none"], [["one", "82.00"], ["two", "82.00"]])
    assert "found nothing" not in comparison_text(rows, pairs_of(rows))  # nothing was searched for
    tables = tables_of([{**row, "retuned_50": 98.0} for row in rows])
    assert tables[-1] == ("ASR re-tuned, 50", ["victim", "none"], [["one", "98.00"], ["two", "98.00"]])
    ((_, _, cells),) = tables_of([{**rows[0], "retuned_50": 98.0}, {**ROWS[0], "retuned_50": 3.0}])
    assert [row[-2:] for row in cells] == [["", "98.00"], ["12.50", "3.00"]]


def test_a_retuning_attack_that_failed_is_a_gap_in_its_column():
    retuned = [{**ROWS[0], "retuned_50": 3.0}, ROWS[1]]
    for rows in (retuned, retuned[::-1]):
        ((_, header, cells),) = tables_of(rows, "<{}>".format)
        assert header[-1] == "ASR re-tuned, 50"
        assert sorted((row[0], row[-1]) for row in cells[1:]) == [("mcl", "<3.00>"), ("nad", "-")]


UNKNOWN = {**BEFORE, "asr": None, "ra": None, "floor": None}


@pytest.mark.parametrize("rows", [ROWS, [*ROWS, make_row("t|wo", "mcl", None)], [*ROWS, make_row("x", "ft", UNKNOWN)]])
def test_a_comparison_has_two_files(tmp_path, rows):
    write_comparison(str(tmp_path), rows, pairs_of(rows))
    with open(tmp_path / "comparison.csv") as file:
        stored = list(csv.DictReader(file))
    assert [(row["victim"], row["defense"], row["asr"]) for row in stored] == [
        (row["victim"], row["defense"], "" if row["asr"] is None else str(row["asr"])) for row in rows
    ]
    text = (tmp_path / "comparison.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert any("**2.00**" in line for line in table)
    assert "Bold: best of its " in text
    assert len({line.replace("\\|", "").count("|") for line in table if "seconds" not in line}) <= 2


def test_no_rows_write_no_files(tmp_path):
    write_comparison(str(tmp_path / "x"), [], [("one", "mcl")])
    assert not (tmp_path / "x").exists()


def test_a_run_is_finished_only_with_the_same_options_and_model(tmp_path):
    model = tmp_path / "model.tar"
    model.write_bytes(b"weights")
    options = {"lr": 0.1, "model": str(model), "data_root": "a", "resume": True, "target": "auto"}
    assert finished_run(str(tmp_path), options, str(model)) is None
    stored = {"model_sha256": sha256_of(str(model)), "before": BEFORE, "config": {**options, "data_root": "b"}}
    (tmp_path / "metrics.json").write_text(json.dumps(stored))
    assert finished_run(str(tmp_path), options, str(model)) == stored
    assert finished_run(str(tmp_path), {**options, "lr": 0.2}, str(model)) is None
    assert finished_run(str(tmp_path), {**options, "new": 1}, str(model)) is None
    folders = {"dataset": "folder", "data_root": "a"}  # here the root selects the images
    (tmp_path / "metrics.json").write_text(json.dumps({**stored, "config": {**options, **folders}}))
    assert finished_run(str(tmp_path), {**options, **folders}, str(model)) is not None
    assert finished_run(str(tmp_path), {**options, **folders, "data_root": "b"}, str(model)) is None
    (tmp_path / "metrics.json").write_text(json.dumps(stored))
    model.write_bytes(b"others")
    assert finished_run(str(tmp_path), options, str(model)) is None
    (tmp_path / "metrics.json").write_text("[1, 2")
    assert finished_run(str(tmp_path), options, str(model)) is None


def test_asr_after_retuning_is_a_column_of_its_own():
    def retuned(row, asr):
        return {**row, "retuned_50": asr}

    rows = [retuned(ROWS[0], 3.0), retuned(ROWS[1], 99.0)]
    ((_, header, cells),) = tables_of(rows, "<{}>".format)
    assert (header[-1], [row[-1] for row in cells]) == ("ASR re-tuned, 50", ["", "<3.00>", "99.00"])
    tables = tables_of([*rows, *({**row, "victim": "two"} for row in rows)])
    assert tables[-1][:2] == ("ASR re-tuned, 50", ["victim", "mcl", "nad"])
    metrics = {"before": BEFORE, "after": None, "seed": 1, "detected_label": 5, "purified": None, "seconds": {}}
    assert comparison_row("one", "mcl", {**metrics, "retuned": {"50": {"asr": 4.0}}})["retuned_50"] == 4.0


def test_a_defense_whose_inverted_trigger_still_works_is_never_best():
    rows = [make_row("one", "mcl", make_metrics(86.0, 1.5)) | {"purified": False}, ROWS[1]]
    ((_, _, table),) = tables_of(rows, "**{}**".format)
    assert not any("**" in cell for cell in table[1])
    assert any("**" in cell for cell in table[2])


def test_every_run_of_a_comparison_measures_the_same_trigger():
    words = ["--model", "a.tar", "--trigger_type", "randomPixelTrigger", "--seeds", "1", "2"]
    opt, _ = config.parse("main.py", words)
    runs = [options for _, options in main.planned_runs(opt, "x").values()]
    assert [options.seed for options in runs] == [1, 2]
    first, second = (build_attack(options, 10, (8, 8)).tensors for options in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_a_comparison_lacks_is_said():
    def row(victim, name, seed, purified=True):
        return make_row(victim, name, make_metrics(86.0, 1.0)) | {"seed": seed, "purified": purified}

    rows = [row("one", "mcl", 1), row("one", "nc", 1, purified=False), row("one", "nc", 2), row("one", "ft", 1)]
    rows += [row("one", "ft", 2)]
    planned = [("one", name) for name in ("mcl", "nc", "ft", "nad") for _ in range(2)]
    ((_, _, cells),) = comparison_tables(rows, planned, "<{}>".format)
    names = ["none", "mcl (no result in 1 of 2)", "nc (inverted trigger still works in 1 of 2)", "ft"]
    names += ["nad (no result in 2 of 2)"]
    assert [line[0] for line in cells] == names
    assert [line[1].startswith("<") for line in cells] == [False, False, False, True, False]
    text = comparison_text([*rows, row("two", "ft", 1)], [*planned, ("two", "ft"), ("two", "ft")])
    assert "one, mcl: (no result in 1 of 2)" in text
    assert "two, ft: (no result in 1 of 2)" in text
