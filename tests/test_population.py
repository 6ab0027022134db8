"""docs/population.py: its members, and the summary of what was found."""

import config
from docs.population import CLEAN, population, print_summary, summary_row


def test_every_member_has_valid_options_and_both_halves_are_alike():
    members = population()
    assert len({member.name for member in members}) == len(members) >= 80
    for member in members:
        opt, _ = config.parse("train_badnet.py", member.options)
        assert (opt.inject_portion == 0) == (member.kind in CLEAN)
    halves = [sorted(m.name.split("-", 1)[1] for m in members if m.name.startswith(h)) for h in ("tune", "report")]
    assert halves[0] == halves[1]
    assert sum(member.kind in CLEAN for member in members) >= 30


def network(name, backdoors, found, *sizes, **after):
    scores = [{"form": "pixels", "hit_rate": rate, "of_range": size} for rate, size in sizes]
    row = {"name": name, "acc": 90.0, "backdoors": backdoors, "found": found, "scores": scores, "after": after}
    return summary_row(row)


def test_only_the_label_of_a_working_backdoor_counts_as_found(capsys):
    rows = [
        network("report-a", {3: 99.0}, 3, (95, 0.5), (50, 0.1), acc=89.0, asr=3.4, floor=2.5),
        network("report-b", {3: 99.0}, 4, (95, 4.0)),
        network("report-c", {-1: 95.0}, -1, (95, 0.4), acc=89.0, asr=3.4, floor=2.3),
        network("report-d", {3: 80.0}, 3, (95, 0.5), acc=89.0, asr=2.9, floor=0.0),
        network("report-e", {}, 2, (95, 1.0)),
        network("report-f", {}, None, (80, 0.1)),
        network("report-g", {3: 10.0}, None),
    ]
    assert [row["size"] for row in rows] == ["0.50", "4.00", "0.40", "0.50", "1.00", "100.00", ""]
    assert [rows[0][f"{name}_after"] for name in ("acc", "asr", "floor")] == ["89.00", "3.40", "2.50"]
    print_summary(rows)
    text = " ".join(capsys.readouterr().out.split())
    assert "report: label found in 2 of 3 victims with an ASR of 90.0 % or more (2 have less), 1 of 2 clean" in text
    assert "; ROC area of sizes 0.833; of 3 purified victims, 2 with an ASR of at most 3 %" in text
