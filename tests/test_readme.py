"""README.md and docs/*.md: every link leads somewhere, and every command is one that the scripts accept."""

import importlib.util
import re
import shlex

import pytest
from conftest import ROOT

import config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {"S": "1", "X": "blendTrigger", "N": "2"}


def headings(path):
    """The anchors of a page, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def commands(path):
    """The commands of a page: in code blocks with continued lines joined, and between backticks over line ends."""
    text = path.read_text()
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        " ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]
    return [line.removeprefix("$ ").split("  #")[0] for line in lines if re.match(r"(\$ )?(python|torchrun) ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in headings(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_accepted(page):
    for command in commands(page):
        words = [
            word
            for word in shlex.split(command.replace("--defense X", "--defense ft"))
            if not word.startswith("[") and word != "..."
        ]
        script = next((i for i, word in enumerate(words) if word in ("main.py", "train_badnet.py")), None)
        if script is not None:
            arguments = [PLACEHOLDERS.get(word, word).replace("{", "").replace("}", "") for word in words[script + 1 :]]
            config.parse(words[script], [word for word in arguments if word != "--help"])
        elif words[1:2] == ["-m"]:
            assert importlib.util.find_spec(words[2]), command


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170
    assert len(commands(ROOT / "README.md")) >= 6
