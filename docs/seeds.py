"""Mean and spread of comparisons that differ in nothing but the seed, as Markdown.

    python -m docs.seeds results/a results/b results/c

Reads the comparison.csv of each, which `main.py --defense all --seed S --name ...` wrote.
"""

import csv
import os
import statistics
import sys

FIGURES = {"acc_published": "ACC*", "asr": "ASR", "acc": "ACC", "ra": "RA", "seconds": "seconds"}


def read(folder):
    """(victim, defense) -> row of a comparison."""
    with open(os.path.join(folder, "comparison.csv")) as file:
        return {(row["victim"], row["defense"]): row for row in csv.DictReader(file)}


def cell(values):
    """Mean, and standard deviation where there is more than one value."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def tables(runs):
    """A Markdown table a victim: a row a defense, of those that every run has."""
    shared = [key for key in runs[0] if all(key in run for run in runs)]
    for victim in dict.fromkeys(victim for victim, _ in shared):
        yield f"\n{victim}, seeds {', '.join(next(iter(run.values()))['seed'] for run in runs)}\n"
        yield f"| defense | {' | '.join(FIGURES.values())} |"
        yield "|---" * (1 + len(FIGURES)) + "|"
        rows = [(defense, [run[name, defense] for run in runs]) for name, defense in shared if name == victim]
        before = [rows[0][1][0].get(f"before_{figure}") for figure in FIGURES]
        yield f"| none | {' | '.join('' if value is None else f'{float(value):.2f}' for value in before)} |"
        for defense, found in rows:
            cells = [cell([float(row[figure]) for row in found]) for figure in FIGURES]
            idle = sum(row["changed"] == "False" for row in found)
            yield f"| {defense}{f' (found nothing in {idle})' * bool(idle)} | {' | '.join(cells)} |"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    print("\n".join(tables([read(folder) for folder in sys.argv[1:]])))
