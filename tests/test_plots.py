"""The pictures of a run: what is computed for them, by hand, and what ends up in the PNG; the files beside them."""

import csv
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from attacks import Attack
from data_loader import get_eval_set, sample_positions
from defenses.inversion import InvertedTrigger
from models import select_model
from utils.errors import RunError
from utils.progress import Stopwatch
from utils.reporting import feature_map, picture, plots, save

METRICS = {"acc": 80.0, "acc_published": 82.0, "asr": 99.0, "ra": 1.0}


def read_pixels(path):
    """(H, W, 3) of a PNG; nothing may be cut off at its edge: the outermost pixels are white."""
    with Image.open(path) as file:
        pixels = pil_to_tensor(file.convert("RGB")).permute(1, 2, 0)
    assert all((edge == 255).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]))
    return pixels


def positions_of(pixels, colour):
    """(n, 2) rows and columns of a colour, given as three bytes or as #RRGGBB, up to rounding."""
    colour = tuple(bytes.fromhex(colour[1:])) if isinstance(colour, str) else colour
    return ((pixels.int() - torch.tensor(colour)).abs() <= 1).all(2).nonzero()


def test_a_plane_keeps_the_distances_of_flat_data():
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 2, generator=rng, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(16, 2, generator=rng, dtype=torch.float64))
    points = flat @ basis.T + 7
    plane = feature_map.Plane.of(points)
    assert torch.allclose(torch.pdist(plane.project(points)), torch.pdist(flat))
    assert sum(plane.explained_variance(points)) == pytest.approx(1)


def test_the_first_direction_of_a_plane_has_the_most_variance():
    points = torch.tensor([[0.0, 3, 0], [0, -3, 0], [1, 0, 0], [-1, 0, 0]])
    plane = feature_map.Plane.of(points)
    assert plane.project(points)[0].tolist() == pytest.approx([3, 0])  # and the sign is fixed: 3, not -3
    assert plane.project(points)[2].tolist() == pytest.approx([0, 1])
    assert plane.explained_variance(points) == pytest.approx([0.9, 0.1])  # 2 * 3^2 and 2 * 1^2 of 20


def test_features_have_length_one_and_keep_the_order():
    model = SimpleNamespace(eval=lambda: None, features=lambda x: x)
    batches = [(torch.tensor([[3.0, 4.0]]), None), (torch.tensor([[0.0, -2.0], [5.0, 0.0]]), None)]
    batches += [(torch.tensor([[float("nan"), 2.0], [float("inf"), 0.0]]), None)]
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(feature_map.features_of(model, batches), expected)
    single = feature_map.features_of(model, [(torch.tensor([[3.0], [-2.0], [0.0]]), None)])
    assert single.tolist() == [[1, 0], [-1, 0], [0, 0]]
    assert feature_map.Plane.of(single).project(single).shape == (3, 2)


def test_a_change_is_mid_grey_where_it_is_zero_and_states_its_amplification():
    title, pixels = plots.change("d", torch.tensor([0.0, 1.0, -1.0, 0.5]))
    assert (title, pixels.tolist()) == ("d", [0.5, 1.0, 0.0, 0.75])
    title, pixels = plots.change("d", torch.tensor([0.0, 0.24, -0.12]))
    assert title == "d, x4"
    assert pixels.tolist() == pytest.approx([0.5, 0.98, 0.26])
    assert plots.change("d", torch.zeros(3)) == ("d", pytest.approx(torch.full((3,), 0.5)))


def test_an_overwriting_patch_is_recognised_by_its_constant_pixels():
    clean = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    triggered = clean.clone()
    triggered[:, :, 3, 2:] = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.2]])
    patch = plots.stamped_patch(clean, triggered)
    assert torch.equal(patch[:, 3, 2:], triggered[0, :, 3, 2:])
    patch[:, 3, 2:] = 0.5
    assert (patch == 0.5).all()
    assert plots.stamped_patch(clean, 0.8 * clean + 0.2 * triggered) is None  # blended
    assert plots.stamped_patch(clean[:1], triggered[:1]) is None  # one image cannot tell
    assert plots.stamped_patch(clean, clean) is None


@pytest.mark.parametrize("count", [1, 4])
def test_a_trigger_is_enlarged_pixel_by_pixel(tmp_path, count):
    clean = torch.full((count, 3, 8, 8), 0.2)
    triggered, pattern = clean.clone(), torch.zeros(3, 8, 8)
    triggered[:, :, 7, 7] = torch.tensor([1.0, 1.0, 0.0])
    pattern[:, 2, 5] = torch.tensor([0.6, -0.6, 0.2])
    inverted = InvertedTrigger(pattern, 0.95)
    plots.draw_trigger(tmp_path / "t.png", clean, triggered, inverted)
    pixels = read_pixels(tmp_path / "t.png")
    corners = {}
    for name, colour in {"true": (255, 255, 0), "stamped": (204, 0, 102), "pattern": (204, 51, 153)}.items():
        positions = positions_of(pixels, colour)
        low, high = positions.amin(0), positions.amax(0) + 1
        if name == "true" and count > 1:  # shown as stamped on the image, under it on grey, and beside that as missed
            assert len(positions) > 3 * 40 * 40
            continue
        height, width = (high - low).tolist()
        assert len(positions) == height * width  # one solid block: in one panel, and nothing is blurred
        assert 40 <= height <= 45 and abs(height - width) <= 1  # an eighth of a panel
        corners[name] = low
    assert corners["stamped"][1] == pytest.approx(corners["pattern"][1], abs=1)  # one above the other
    if count == 1:
        assert corners["stamped"][0] < corners["true"][0] < corners["pattern"][0]


def test_without_an_inverted_trigger_there_is_one_row(tmp_path):
    plots.draw_trigger(tmp_path / "t.png", torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    height, width, _ = read_pixels(tmp_path / "t.png").shape
    assert width == pytest.approx(7 * picture.DPI, abs=1)
    assert height < width / 2


def curve(*epochs, **changes):
    return [{"epoch": epoch, **METRICS, **changes} for epoch in epochs]


def test_curves_have_the_colours_of_the_images_they_are_measured_on(tmp_path):
    plots.draw_curves(tmp_path / "c.png", curve(1, 2, 3))
    pixels = read_pixels(tmp_path / "c.png")
    rows = {}
    for colour in (picture.TRIGGERED, picture.CLEAN):  # the lines are level: a row of the picture is full of them
        counts = positions_of(pixels, colour)[:, 0].bincount()
        rows[colour] = (counts > 100).nonzero()
    asr, ra = rows[picture.TRIGGERED].min(), rows[picture.TRIGGERED].max()
    assert asr < rows[picture.CLEAN].min() < rows[picture.CLEAN].max() < ra  # 99 above 82 and 80, above 1


def test_curves_leave_out_what_was_not_measured(tmp_path):
    rows = [*curve(0, asr=float("nan"), ra=float("nan")), *curve(1, 2, asr=float("nan"), ra=float("nan"))]
    plots.draw_curves(tmp_path / "c.png", rows)
    assert len(positions_of(read_pixels(tmp_path / "c.png"), picture.CLEAN)) > 100


AWKWARD = ["$\\frac{$", "a\nb\x00", "<b>&", "x" * 300, "\u732b", ""]


def test_any_class_name_can_be_drawn_without_a_warning(tmp_path, recwarn):
    accuracies = [float("nan"), 50.0, 60.0, 70.0, 80.0, 90.0]
    metrics = {name: {"acc": 70.0, "per_class": accuracies} for name in ("before", "after")}
    plots.draw_per_class(tmp_path / "p.png", AWKWARD, metrics, 0)
    assert not recwarn.list
    pixels = read_pixels(tmp_path / "p.png")
    assert 400 < pixels.shape[1] < 1000  # a name of 300 letters has not taken the space
    assert all(len(positions_of(pixels, colour)) > 100 for colour in picture.MODELS.values())
    names = plots.class_names(dict(enumerate(AWKWARD)))
    assert [names[label] for label in (0, 1, 2, 4, 5)] == ["$\\frac{$", "a?b?", "<b>&", "class 4", "class 5"]


def test_of_many_classes_those_that_changed_most_are_shown():
    before = torch.full((200,), 90.0)
    after = before - torch.arange(200) / 10
    labels = plots.classes_to_show(torch.stack([before, after]), target=3)
    assert labels == [3, *range(151, 200)]
    assert plots.classes_to_show(after[None], target=None) == [*range(150, 200)]  # of one model, the lowest
    assert plots.classes_to_show(torch.ones(2, 10), target=3) == [*range(10)]


def test_a_sample_has_all_classes_in_any_order_of_them_and_is_always_the_same():
    assert sample_positions(5, plots.SAMPLE_SIZE).tolist() == [0, 1, 2, 3, 4]
    index = sample_positions(10_000, plots.SAMPLE_SIZE)
    assert len(index.unique()) == plots.SAMPLE_SIZE
    assert torch.equal(index, index.sort().values)
    assert torch.equal(index, sample_positions(10_000, plots.SAMPLE_SIZE))
    for classes in (index % 10, index // 1_000):  # classes that take turns, and classes in order
        assert classes.bincount().min() > 0.7 * plots.SAMPLE_SIZE / 10


def lightness(colour):
    """CIE L*, 0..100, of #RRGGBB."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in bytes.fromhex(colour[1:])]
    return 116 * sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) ** (1 / 3) - 16


@pytest.mark.parametrize(
    "group",
    [list(picture.MODELS.values()), [picture.CLEAN, picture.TARGET, picture.TRIGGERED]],
    ids=["models", "images"],
)
def test_colours_of_a_group_differ_in_lightness(group):
    assert min(abs(lightness(a) - lightness(b)) for a, b in itertools.combinations(group, 2)) > 10


@pytest.fixture
def run():
    """Arguments of draw_run for a small untrained victim: classes, sample, attack, models, metrics."""
    attack = Attack("gridTrigger", "all2all", 0, 3, 0.1)
    images = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = get_eval_set(images, torch.arange(12) % 3, attack, CPU)
    metrics = {"before": {**METRICS, "per_class": [70.0, 80.0, 90.0]}}
    return ["a", "b", "c"], sample, attack, {"before": select_model("WRN-10-1", 3)}, metrics


def test_what_applies_is_drawn_and_curves_of_an_earlier_run_are_removed(tmp_path, run):
    pictures = plots.draw_run(tmp_path, *run, curve(0, 1))
    names = [name for name, *_ in pictures]
    assert names == ["trigger.png", "features.png", "curves.png", "per_class.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(min(read_pixels(tmp_path / name).shape[:2]) > 150 for name in names)
    alts = {name: alt for name, _, alt in pictures}
    assert all(len(alt) > 40 and ".png" not in alt for alt in alts.values())
    assert "ASR 99.00 percent" in alts["features.png"] and "70.00 to 90.00" in alts["per_class.png"]
    unmeasured = [{"epoch": 0}, {"epoch": 1, "loss": 1.0}]
    *_, missing = plots.draw_run(tmp_path, *run, unmeasured)
    assert missing.name is None and "--print_freq" in missing.caption
    assert not (tmp_path / "curves.png").exists()
    assert all(name for name, *_ in plots.draw_run(tmp_path, *run, []))  # nothing was trained: nothing is missing


def save_run(folder, run, history, **metrics):
    classes, sample, attack, models, by_model = run
    metrics = {"model": "m.tar", "defense": "none", "before": by_model["before"], "after": None} | metrics
    arguments = {"classes": classes, "sample": sample, "attack": attack, "models": models, "history": history}
    options = {"dataset": "shapes", "seed": 3, "lr": 0.1}
    return save.save_results(str(folder), "title", metrics, **arguments, options=options, device=CPU, clock=Stopwatch())


def test_a_run_is_saved_with_its_metadata(tmp_path, run):
    run[4]["before"]["floor"] = 2.0
    metrics = save_run(tmp_path, run, curve(0, 1, 2), extra="x")
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert (metrics["dataset"], metrics["seed"], metrics["device"], metrics["extra"]) == ("shapes", 3, "cpu", "x")
    assert (metrics["target_label"], metrics["config"]["lr"]) == (None, 0.1)
    assert metrics["seconds"]["report"] == metrics["seconds"]["total"] > 0
    with open(tmp_path / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert "The model is backdoored" in (tmp_path / "report.html").read_text()
    save_run(tmp_path, run, [])
    assert not (tmp_path / "history.csv").exists()


def test_metrics_json_is_written_last(tmp_path, run, monkeypatch):
    run[4]["before"]["floor"] = 2.0
    save_run(tmp_path, run, [])

    def fail(*_):
        raise RunError("disk full")

    monkeypatch.setattr(save, "write_page", fail)
    with pytest.raises(RunError):
        save_run(tmp_path, run, [])
    assert not (tmp_path / "metrics.json").exists()


def test_the_feature_map_has_more_panels_for_two_models(tmp_path):
    rng = torch.Generator().manual_seed(0)
    features = {name: (torch.randn(30, 4, generator=rng), torch.randn(20, 4, generator=rng)) for name in picture.MODELS}
    metrics = {name: METRICS for name in picture.MODELS}
    is_target = torch.arange(30) < 10
    feature_map.draw_features(tmp_path / "two.png", features, is_target, metrics)
    del features["after"]
    feature_map.draw_features(tmp_path / "one.png", features, is_target, metrics)
    two, one = read_pixels(tmp_path / "two.png"), read_pixels(tmp_path / "one.png")
    assert two.shape[1] > 2 * one.shape[1]
    assert len(positions_of(one, picture.TARGET)) > 0


def test_identical_features_have_a_map_too(tmp_path, recwarn):
    features = {"before": (torch.ones(9, 4), torch.ones(5, 4))}
    feature_map.draw_features(tmp_path / "f.png", features, torch.zeros(9, dtype=torch.bool), {"before": METRICS})
    assert not recwarn.list
    assert len(positions_of(read_pixels(tmp_path / "f.png"), picture.TRIGGERED)) > 0
