"""Mean and standard deviation of comparisons that differ only in their seed, as Markdown.

    python -m docs.seeds results/a results/b results/c

Reads the comparison.csv of each, which `main.py --defense all --seed S --name ...` writes.
"""

import csv
import os
import statistics
import sys

COLUMNS = {"acc_published": "ACC*", "asr": "ASR", "acc": "ACC", "ra": "RA", "seconds": "seconds"}


def read_comparison(folder):
    """(victim, defense) -> row of comparison.csv."""
    with open(os.path.join(folder, "comparison.csv")) as file:
        return {(row["victim"], row["defense"]): row for row in csv.DictReader(file)}


def mean_cell(values):
    """The mean and, of more than one value, the standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def markdown_lines(comparisons):
    """A table for each victim; a row for each defense that is in every comparison."""
    shared = [key for key in comparisons[0] if all(key in comparison for comparison in comparisons)]
    seeds = ", ".join(next(iter(comparison.values()))["seed"] for comparison in comparisons)
    for victim in dict.fromkeys(victim for victim, _ in shared):
        yield f"\n{victim}, seeds {seeds}\n"
        yield f"| defense | {' | '.join(COLUMNS.values())} |"
        yield "|---" * (1 + len(COLUMNS)) + "|"
        before = [
            comparisons[0][next(key for key in shared if key[0] == victim)].get(f"before_{key}") for key in COLUMNS
        ]
        yield f"| none | {' | '.join('' if value is None else f'{float(value):.2f}' for value in before)} |"
        for defense in [defense for name, defense in shared if name == victim]:
            rows = [comparison[victim, defense] for comparison in comparisons]
            cells = [mean_cell([float(row[key]) for row in rows]) for key in COLUMNS]
            unchanged = sum(row["changed"] == "False" for row in rows)
            note = f" (found nothing in {unchanged})" if unchanged else ""
            yield f"| {defense}{note} | {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n".join(markdown_lines([read_comparison(folder) for folder in sys.argv[1:]])))
