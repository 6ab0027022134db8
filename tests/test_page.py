"""report.html: what is on it, that it holds everything itself, and that a browser shows it and asks no one."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from utils import plots
from utils.page import POLICY, write_page
from utils.report import versions

CLASSES = ['"><img src=http://example.org/x.png>', "<script>alert(1)</script>", "$x & y;"]
BEFORE = {"acc": 81.25, "acc_published": 82.5, "asr": 99.75, "ra": 0.25, "floor": 3.0, "per_class": [70.0, 80.5, 90.0]}
AFTER = {**BEFORE, "acc": 80.0, "asr": 1.5, "ra": 80.25, "per_class": [71.0, float("nan"), 89.0]}
METRICS = {
    "dataset": "folder",
    "model": "<model>.tar",
    "device": "cpu",
    "seed": 1,
    "before": BEFORE,
    "after": AFTER,
    "target_label": 0,
    "trigger": {"pattern": "11 px, L1 23.5", "hit_rate": 97.456},
    "seconds": {"total": 12.3},
    "config": {"lr": 0.003, "name": "<i>"},
    "versions": versions(),
}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, its tables as rows of text, its pictures."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.tables, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"}.intersection(self.open):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a report of two pictures and one that is missed."""
    folder = tmp_path_factory.mktemp("page")
    plots.draw_curves(folder / "curves.png", [{"epoch": i, **BEFORE} for i in range(3)])
    plots.draw_per_class(folder / "per_class.png", CLASSES, {"before": BEFORE, "after": AFTER}, 0)
    pictures = [("curves.png", "a < b"), ("per_class.png", "classes"), (None, "nothing <was> watched")]
    write_page(str(folder / "report.html"), "run <1>", METRICS, CLASSES, pictures)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text())


def test_every_tag_is_closed_and_the_texts_of_strangers_are_text(page):
    assert page.open == []
    assert {"script", "link", "iframe", "a", "form", "object", "base", "svg"}.isdisjoint(tag for tag, _ in page.tags)
    for text in ("run <1>", "<model>.tar", "nothing <was> watched", "a < b", "<i>", *CLASSES):
        assert text in page.text


def test_the_tables_hold_the_figures(page):
    published, figures, classes, *facts = page.tables
    assert published[1] == ["folder", "82.50", "99.75", "82.50", "1.50", "80.00", "80.25"]
    assert figures[0][1:4] == ["before", "after", "change"]
    assert [row[1:4] for row in figures[1:4]] == [
        ["81.25", "80.00", "-1.25"],
        ["82.50", "82.50", "+0.00"],
        ["99.75", "1.50", "-98.25"],
    ]
    assert [row[1] for row in classes[1:]] == ["70.00", "80.50", "90.00"]
    assert classes[1][0] == f"0 {CLASSES[0]} (target)"
    assert classes[2][2:] == ["–", "–"]  # a class without a test image has no accuracy
    rows = dict(row for table in facts for row in table)
    assert (rows["pattern"], rows["hit_rate"]) == ("11 px, L1 23.5", "97.46")
    assert (rows["total"], rows["lr"]) == ("12.3", "0.003")
    assert rows["torch"] == versions()["torch"]


def test_a_model_that_was_only_measured_has_one_column(tmp_path):
    metrics = {**METRICS, "after": None, "trigger": None, "target_label": None}
    write_page(str(tmp_path / "report.html"), "x", metrics, CLASSES, [])
    page = Page((tmp_path / "report.html").read_text())
    assert page.tables[2] == [
        ["class", "measured"],
        *([f"{i} {CLASSES[i]}", f"{BEFORE['per_class'][i]:.2f}"] for i in range(3)),
    ]
    assert "before" not in page.text and "(target)" not in page.text


def test_everything_is_inside_the_page(folder, page):
    text = (folder / "report.html").read_text()
    inside = [attributes for tag, attributes in page.tags if tag == "img"]
    for attributes, name in zip(inside, ("curves.png", "per_class.png"), strict=True):
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / name).read_bytes()
    policies = [attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv")]
    assert policies == [POLICY]
    assert POLICY.startswith("default-src 'none';") and "http" not in POLICY and "*" not in POLICY
    asking = {"src", "href", "srcset", "action", "data", "poster", "background", "style"}
    assert all(not (asking & set(attributes)) for tag, attributes in page.tags if tag != "img")
    assert not re.search(r"url\(|@import", text[text.index("<style>") : text.index("</style>")])


# Put into a copy of the page before anything else: what the browser was kept from loading, what it loaded, and what
# came of the pictures.
PROBE = """<script>
const refused = [];
document.addEventListener("securitypolicyviolation", event => refused.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const pictures = [...document.images].map(picture => [picture.naturalWidth, picture.getBoundingClientRect().width]);
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:"));
  const rows = [...document.querySelectorAll("table")].map(table => table.rows.length);
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.body.textContent = JSON.stringify({refused, pictures, loaded, rows, wide});
}, 100));
</script>"""


def look(path, text):
    """What PROBE says of a page that the browser opened from disk."""
    allowed = POLICY + "; script-src 'unsafe-inline'"
    head = f'content="{POLICY}">'
    assert head in text
    path.write_text(text.replace(head, f'content="{allowed}">{PROBE}'))
    words = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900", "--virtual-time-budget=5000")
    command = [BROWSER, *words, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<body>(\{.*\})</body>", done.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_it_and_no_request_leaves_the_page(folder, tmp_path):
    text = (folder / "report.html").read_text()
    seen = look(tmp_path / "page.html", text)
    assert (seen["refused"], seen["loaded"]) == ([], [])
    assert len(seen["pictures"]) == 2
    assert all(natural > shown > 300 for natural, shown in seen["pictures"])
    assert seen["rows"] == [2, 6, 4, 2, 1, 4, 2]
    assert seen["wide"] <= 0
    # The same look does find a request, where there is one.
    caught = look(tmp_path / "page.html", text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'))
    assert caught["refused"] == ["http://127.0.0.1:9/x.png"]
