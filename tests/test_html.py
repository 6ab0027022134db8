"""report.html: its content, that it holds everything itself, and that a browser shows it without any request."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from utils.reporting import plots
from utils.reporting.html import POLICY, write_page
from utils.reporting.save import versions
from utils.reporting.tables import METRICS as LABELS
from utils.reporting.tables import verdict

CLASSES = ['"><img src=http://example.org/x.png>', "<script>alert(1)</script>", "$x & y;"]
BEFORE = {"acc": 81.25, "acc_published": 82.5, "asr": 99.75, "ra": 0.25, "floor": 3.0, "per_class": [70.0, 80.5, 90.0]}
AFTER = {**BEFORE, "acc": 80.0, "asr": 1.5, "ra": 80.25, "per_class": [71.0, float("nan"), 89.0]}
METRICS = {
    "dataset": "folder",
    "model": "<model>.tar",
    "device": "cpu",
    "seed": 1,
    "defense": "mcl",
    "before": BEFORE,
    "after": AFTER,
    "target_label": 0,
    "trigger": {"pattern": "11 px, L1 23.5", "hit_rate": 97.456},
    "seconds": {"total": 12.3},
    "config": {"lr": 0.003, "name": "<i>", "rho": None},
    "versions": versions(),
}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, its tables as rows of text, all of its text."""

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


def write_and_parse(folder, metrics, pictures=()):
    write_page(str(folder / "report.html"), "run <1>", metrics, CLASSES, list(pictures))
    return Page((folder / "report.html").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two pictures."""
    folder = tmp_path_factory.mktemp("page")
    plots.draw_curves(folder / "curves.png", [{"epoch": i, **BEFORE} for i in range(3)])
    plots.draw_per_class(folder / "per_class.png", CLASSES, {"before": BEFORE, "after": AFTER}, 0)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """A report with two pictures and one that is missing."""
    pictures = [
        ("curves.png", "a < b", 'ASR "falls"'),
        ("per_class.png", "classes", "Dots"),
        (None, "not <measured>", ""),
    ]
    return write_and_parse(folder, METRICS, pictures)


def sentence_of(metrics):
    return verdict(metrics).replace(" -> ", "\xa0→ ").replace(" %", "\xa0%")


def test_a_trigger_that_still_works_is_never_shown_as_a_success(folder):
    gone = {"asr": 1.0, "floor": 1.0}
    for purified, state in ((True, "clean"), (False, "backdoored")):
        page = write_and_parse(folder, METRICS | {"after": AFTER | gone, "purified": purified})
        assert f"verdict {state}" in [attributes.get("class") for _, attributes in page.tags]


def test_tags_are_closed_and_names_are_escaped(page):
    assert page.open == []
    assert {"script", "link", "iframe", "a", "form", "object", "base", "svg"}.isdisjoint(tag for tag, _ in page.tags)
    for text in ("run <1>", "<model>.tar", "not <measured>", "a < b", "<i>", *CLASSES):
        assert text in page.text


def test_tables_hold_the_metrics(page):
    published, metrics, classes, *details = page.tables
    assert published[1] == ["folder", "82.50", "99.75", "82.50", "1.50", "80.00", "80.25"]
    assert metrics[0][1:4] == ["before", "after", "change"]
    assert [row[1:4] for row in metrics[1:4]] == [
        ["81.25", "80.00", "-1.25"],
        ["82.50", "82.50", "+0.00"],
        ["99.75", "1.50", "-98.25"],
    ]
    assert [row[0] for row in metrics[1:]] == [label + meaning for label, meaning in LABELS.values()]
    assert [row[1] for row in classes[1:]] == ["70.00", "80.50", "90.00"]
    assert classes[1][0] == f"0 {CLASSES[0]} (target)"
    assert classes[2][2:] == ["–", "–"]  # a class without a test image has no accuracy
    rows = dict(row for table in details for row in table)
    assert (rows["pattern"], rows["hit_rate"]) == ("11 px, L1 23.5", "97.46")
    assert (rows["total"], rows["lr"]) == ("12.3", "0.003")
    assert rows["torch"] == versions()["torch"]
    assert "rho" not in rows  # does not apply to this run


def test_every_header_has_a_scope(page):
    scopes = [attributes["scope"] for tag, attributes in page.tags if tag == "th"]
    rows = sum(map(len, page.tables))
    headers = sum(len(table[0]) for table in page.tables[:3])
    assert (scopes.count("col"), scopes.count("row")) == (headers, rows - 3)


def test_the_verdict_is_at_the_top_and_at_the_end(page):
    sentence = sentence_of(METRICS)
    assert sentence.startswith("The backdoor is gone: ASR 99.75\xa0→ 1.50\xa0%")
    assert page.text.count(sentence) == 2
    assert page.text.strip().endswith(sentence)


def test_the_search_highlights_the_label_worked_against(tmp_path):
    scores = [
        {
            "label": label,
            "form": "pixels",
            "size": 9.5,
            "hit_rate": 99.0,
            "index": -3.0,
            "of_median": 0.2,
            "of_range": 1.0,
        }
        | {"flagged": label == 1}
        for label in (0, 1, "any")
    ]
    page = write_and_parse(tmp_path, {**METRICS, "search": scores, "worked_against": 1})
    assert "a backdoor is suspected" in page.text
    search = page.tables[2]
    assert search[0] == ["label", "form", "L1 or px", "of range, %", "of median", "hit rate, %", "index", "flagged"]
    assert search[2] == ["1", "pixels", "9.50", "1.00", "0.20", "99.00", "-3.00", "yes"]
    rows = [attributes.get("class") for tag, attributes in page.tags if tag == "tr"]
    start = sum(map(len, page.tables[:2]))
    assert rows[start : start + 4] == [None, None, "marked", None]
    scores = [{**score, "flagged": False} for score in scores]
    page = write_and_parse(tmp_path, {**METRICS, "after": None, "search": scores, "worked_against": None})
    assert "no backdoor found" in page.text


def test_a_model_that_was_only_measured_has_one_column(tmp_path):
    metrics = {**METRICS, "defense": "none", "after": None, "trigger": None, "target_label": None}
    page = write_and_parse(tmp_path, metrics)
    assert page.tables[2] == [
        ["class", "measured"],
        *([f"{i} {CLASSES[i]}", f"{BEFORE['per_class'][i]:.2f}"] for i in range(3)),
    ]
    assert "before" not in page.text and "(target)" not in page.text
    assert sentence_of(metrics) in page.text


def test_a_training_has_a_page_too(tmp_path):
    metrics = {name: METRICS[name] for name in METRICS if name not in ("before", "after", "defense", "trigger")}
    page = write_and_parse(tmp_path, {**metrics, "victim": BEFORE})
    assert "The victim is backdoored" in page.text
    assert page.tables[0][0] == ["Dataset", "Baseline ACC*", "Baseline ASR", "ACC", "RA"]


def test_metrics_of_an_unknown_trigger_are_dashes(tmp_path):
    unknown = {**BEFORE, "asr": None, "ra": None, "floor": None}
    page = write_and_parse(tmp_path, {**METRICS, "before": unknown, "after": unknown})
    assert page.tables[1][3][1:] == ["–", "–", "–"]
    assert "ASR was not measured" in page.text


def test_everything_is_inside_the_page(folder, page):
    text = (folder / "report.html").read_text()
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    for attributes, name in zip(images, ("curves.png", "per_class.png"), strict=True):
        kind, data = attributes["src"].split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder / name).read_bytes()
    assert [attributes["alt"] for attributes in images] == ['ASR "falls"', "Dots"]
    policies = [attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv")]
    assert policies == [POLICY]
    assert POLICY.startswith("default-src 'none';") and "http" not in POLICY and "*" not in POLICY
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "style"}
    assert all(not (loading & set(attributes)) for tag, attributes in page.tags if tag != "img")
    assert not re.search(r"url\(|@import", text[text.index("<style>") : text.index("</style>")])


# Inserted first into a copy of the page: reports blocked and finished requests, the pictures, and the layout.
PROBE = """<script>
const refused = [];
document.addEventListener("securitypolicyviolation", event => refused.push(event.blockedURI));
addEventListener("load", () => setTimeout(() => {
  const pictures = [...document.images].map(picture => [picture.naturalWidth, picture.getBoundingClientRect().width]);
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:"));
  const rows = [...document.querySelectorAll("table")].map(table => table.rows.length);
  const wide = document.documentElement.scrollWidth - innerWidth;
  const heights = [...document.querySelectorAll(":not(.list) > table tr")].map(row => row.offsetHeight);
  const tallest = Math.max(...heights);
  const sideways = [...document.querySelectorAll(".card")].map(card => card.scrollWidth - card.clientWidth);
  document.body.textContent = JSON.stringify({refused, pictures, loaded, rows, wide, tallest, sideways});
}, 100));
</script>"""


def probe(path, text, width=1100):
    """The result of PROBE for a page that a browser opens from disk."""
    allowed = POLICY + "; script-src 'unsafe-inline'"
    head = f'content="{POLICY}">'
    assert head in text
    path.write_text(text.replace(head, f'content="{allowed}">{PROBE}'))
    words = ("--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--virtual-time-budget=5000")
    command = [BROWSER, *words, f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(html.unescape(re.search(r"<body>(\{.*\})</body>", done.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium found: apt-get install chromium")
def test_a_browser_shows_the_page_without_any_request(folder, page, tmp_path):
    text = (folder / "report.html").read_text()
    result = probe(tmp_path / "page.html", text)
    assert (result["refused"], result["loaded"]) == ([], [])
    assert len(result["pictures"]) == 2
    assert all(natural > displayed > 300 for natural, displayed in result["pictures"])
    assert result["rows"] == [2, 6, 4, 2, 1, 4, 2]
    assert result["wide"] <= 0
    # The same probe does see a request, if there is one.
    changed = probe(tmp_path / "page.html", text.replace("</main>", '<img src="http://127.0.0.1:9/x.png"></main>'))
    assert changed["refused"] == ["http://127.0.0.1:9/x.png"]


@pytest.mark.skipif(BROWSER is None, reason="no chromium found: apt-get install chromium")
def test_tables_are_readable_on_a_narrow_screen(folder, page, tmp_path):
    result = probe(tmp_path / "page.html", (folder / "report.html").read_text(), width=400)
    assert result["wide"] <= 0
    assert max(result["sideways"]) <= 0
    assert result["tallest"] < 100  # pixels: a name of three lines, no tower of one word a line
