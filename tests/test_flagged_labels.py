"""Which labels are flagged, which of them is chosen, and the reason that is given."""

import csv
from dataclasses import replace

import pytest

from defenses.inversion import ANY_OTHER, choose_label
from defenses.inversion.scores import CLEAN_SIZES, LabelScore
from docs.population import TABLE

SMALL = LabelScore(1, "pixels", 30.0, 0.95, -3.0, 0.3, 0.01)
EVIDENCE = f": so small a pattern was found in none of {len(CLEAN_SIZES)} clean networks"


@pytest.mark.parametrize("change", [{"hit_rate": 0.5}, {"index": -1.9}, {"of_median": 0.6}, {"of_range": 0.016}])
def test_a_label_is_flagged_by_a_small_pattern_that_works(change):
    assert SMALL.flagged and replace(SMALL, form="warp", of_range=0.02).flagged
    assert not replace(SMALL, **change).flagged
    assert SMALL.metadata() == {
        "label": 1, "form": "pixels", "size": 30.0, "hit_rate": 95.0, "index": -3.0, "of_median": 0.3, "of_range": 1.0,
        "weak_floor": None, "runner_up": None, "inverted_area": None, "few_images": False, "clean_networks": 0,
        "flagged": True,
    }  # fmt: skip


def test_the_flagged_label_with_the_smallest_pattern_is_chosen():
    ordinary = LabelScore(0, "pixels", 90.0, 1.0, -0.5, 1.0, 0.03)
    not_working = LabelScore(3, "pixels", 5.0, 0.2, -9.0, 0.05, 0.001)
    smaller = replace(SMALL, label=2, size=20.0)
    assert choose_label([ordinary, SMALL], False) == (1, f"a backdoor to label 1 is suspected{EVIDENCE}")
    label, message = choose_label([ordinary, SMALL, smaller, not_working], False)
    assert (label, message.split(";")[0]) == (2, f"a backdoor to label 2, 1 is suspected{EVIDENCE}")
    label, message = choose_label([ordinary], False)
    assert (label, message[:21]) == (None, "no backdoor was found")
    assert choose_label([ordinary], True)[0] == 0


def test_any_other_label_is_chosen_if_its_pattern_is_smaller_than_any_label_s():
    untargeted = replace(SMALL, label=ANY_OTHER, size=31.0)
    smaller = replace(untargeted, size=29.0)
    assert choose_label([SMALL, untargeted], False)[0] == 1
    assert choose_label([replace(SMALL, index=0.0), untargeted], False)[0] == ANY_OTHER
    assert choose_label([SMALL, smaller], False)[0] == ANY_OTHER
    assert choose_label([SMALL, replace(smaller, hit_rate=0.5)], False)[0] == 1
    assert untargeted.metadata()["label"] == "any"


@pytest.mark.parametrize(("of_range", "count"), [(0.0145, 0), (0.0146, 1), (0.0217, 9), (0.5, len(CLEAN_SIZES))])
def test_a_label_has_a_place_among_the_clean_networks(of_range, count):
    with open(TABLE) as file:
        sizes = sorted(float(row["size"]) for row in csv.DictReader(file) if not row["backdoors"])
    assert sizes == list(CLEAN_SIZES)
    score = LabelScore(3, "pixels", 9.0, 1.0, -9.0, 0.1, of_range)
    assert score.clean_networks == score.metadata()["clean_networks"] == count
    assert replace(score, form="wave").clean_networks is None


def test_the_reason_gives_the_place_of_patterns_that_were_not_inverted_in_full():
    score = LabelScore(3, "warp", 9.0, 1.0, -9.0, 0.1, 0.0146)
    place = f": so small a pattern was found in 1 of {len(CLEAN_SIZES)} clean networks"
    assert choose_label([score], False)[1] == f"a backdoor to label 3 is suspected{place}"
    assert choose_label([replace(score, label=-1)], False)[1].endswith(f"another one is suspected{place}")
    suspected = "a backdoor to label 3 is suspected"
    assert choose_label([replace(score, inverted_area=0.01)], False)[1] == suspected
    by_wave = replace(score, form="wave", runner_up=0.1)
    assert choose_label([by_wave], False)[1] == f"{suspected}: a wave leads to it, as in some clean models, too"


def test_force_defends_against_the_pixel_pattern_with_the_lowest_index():
    scores = [
        LabelScore(label, form, 90.0, 0.95, index, 1.0, 0.03)
        for label, form, index in (
            (0, "pixels", -0.5),
            (1, "pixels", -1.5),
            (2, "pixels", 0.5),
            (ANY_OTHER, "pixels", -1.9),
            (3, "warp", -1.8),
        )
    ]
    assert choose_label(scores, True)[0] == 1


@pytest.mark.parametrize(("form", "limit"), [("pixels", 0.015), ("warp", 0.02)])
def test_the_limit_of_each_form(form, limit):
    for of_range, flagged in ((limit, True), (limit + 0.001, False)):
        assert replace(SMALL, form=form, of_range=of_range).flagged is flagged


def test_a_label_of_which_few_other_images_are_left_is_not_flagged():
    too_few = replace(SMALL, few_images=True)
    assert not too_few.flagged
    assert not replace(too_few, inverted_area=0.001).flagged
    assert not replace(too_few, form="wave", runner_up=0.0).flagged
    any_other = replace(too_few, label=ANY_OTHER)
    reason = choose_label([too_few, replace(SMALL, label=2, index=-1.0), any_other], False)[1]
    assert "; not judged, for lack of images of 5 other labels: 1, any; the model" in reason
