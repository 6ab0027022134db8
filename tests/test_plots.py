"""The pictures: what is computed for them, by hand, and what ends up in the PNG."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from attacks import Attack
from data_loader import get_eval_set, spread
from defenses.inversion import Trigger
from models import select_model
from utils import plots

FIGURES = {"acc": 80.0, "acc_published": 82.0, "asr": 99.0, "ra": 1.0}


def pixels_of(path):
    """(H, W, 3) of a PNG that decodes, and at whose edge nothing is cut off: its outermost pixels are white."""
    with Image.open(path) as file:
        picture = pil_to_tensor(file.convert("RGB")).permute(1, 2, 0)
    assert all((edge == 255).all() for edge in (picture[:2], picture[-2:], picture[:, :2], picture[:, -2:]))
    return picture


def places_of(picture, colour):
    """Where a picture has a colour, given as three bytes or as #RRGGBB, to a rounding: (n, 2) rows and columns."""
    colour = tuple(bytes.fromhex(colour[1:])) if isinstance(colour, str) else colour
    return ((picture.int() - torch.tensor(colour)).abs() <= 1).all(2).nonzero()


def test_a_plane_keeps_the_distances_of_flat_data():
    rng = torch.Generator().manual_seed(0)
    flat = torch.randn(40, 2, generator=rng, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(16, 2, generator=rng, dtype=torch.float64))
    points = flat @ basis.T + 7
    plane = plots.Plane.of(points)
    assert torch.allclose(torch.pdist(plane.map(points)), torch.pdist(flat))
    assert sum(plane.shares(points)) == pytest.approx(1)


def test_a_plane_puts_the_longest_direction_first():
    points = torch.tensor([[0.0, 3, 0], [0, -3, 0], [1, 0, 0], [-1, 0, 0]])
    plane = plots.Plane.of(points)
    assert plane.map(points)[0].tolist() == pytest.approx([3, 0])  # and the sign is fixed: 3, not -3
    assert plane.map(points)[2].tolist() == pytest.approx([0, 1])
    assert plane.shares(points) == pytest.approx([0.9, 0.1])  # 2 * 3^2 and 2 * 1^2 of 20


def test_features_have_length_one_and_come_in_order():
    model = SimpleNamespace(eval=lambda: None, features=lambda x: x)
    batches = [(torch.tensor([[3.0, 4.0]]), None), (torch.tensor([[0.0, -2.0], [5.0, 0.0]]), None)]
    batches += [(torch.tensor([[float("nan"), 2.0], [float("inf"), 0.0]]), None)]
    expected = torch.tensor([[0.6, 0.8], [0.0, -1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.allclose(plots.features_of(model, batches), expected)


def test_a_change_is_grey_where_there_is_none_and_told_when_it_is_made_stronger():
    title, picture = plots.change("d", torch.tensor([0.0, 1.0, -1.0, 0.5]))
    assert (title, picture.tolist()) == ("d", [0.5, 1.0, 0.0, 0.75])
    title, picture = plots.change("d", torch.tensor([0.0, 0.24, -0.12]))
    assert title == "d, x4"
    assert picture.tolist() == pytest.approx([0.5, 0.98, 0.26])
    assert plots.change("d", torch.zeros(3)) == ("d", pytest.approx(torch.full((3,), 0.5)))


def test_a_trigger_is_enlarged_pixel_by_pixel(tmp_path):
    clean = torch.full((3, 8, 8), 0.2)
    triggered, pattern = clean.clone(), torch.zeros(3, 8, 8)
    triggered[:, 7, 7] = torch.tensor([1.0, 1.0, 0.0])
    pattern[:, 2, 5] = torch.tensor([0.6, -0.6, 0.2])
    inverted = Trigger(pattern, 0.95)
    plots.draw_trigger(tmp_path / "t.png", clean, triggered, inverted)
    picture = pixels_of(tmp_path / "t.png")
    boxes = {}
    for name, colour in {"true": (255, 255, 0), "stamped": (204, 0, 102), "pattern": (204, 51, 153)}.items():
        places = places_of(picture, colour)
        low, high = places.amin(0), places.amax(0) + 1
        height, width = (high - low).tolist()
        assert len(places) == height * width  # one solid block: in one panel, and nothing blurred
        assert 40 <= height <= 45 and abs(height - width) <= 1  # an eighth of a panel
        boxes[name] = low
    assert boxes["stamped"][1] == pytest.approx(boxes["pattern"][1], abs=1)  # one above the other
    assert boxes["stamped"][0] < boxes["true"][0] < boxes["pattern"][0]


def test_without_an_inverted_trigger_there_is_one_row(tmp_path):
    plots.draw_trigger(tmp_path / "t.png", torch.zeros(3, 8, 8), torch.ones(3, 8, 8))
    height, width, _ = pixels_of(tmp_path / "t.png").shape
    assert width == pytest.approx(7 * plots.DPI, abs=1)
    assert height < width / 2


def curve(*epochs):
    return [{"epoch": epoch, **FIGURES} for epoch in epochs]


def test_curves_have_the_colours_of_the_images_they_are_measured_on(tmp_path):
    plots.draw_curves(tmp_path / "c.png", curve(1, 2, 3))
    picture = pixels_of(tmp_path / "c.png")
    rows = {}
    for colour in (plots.TRIGGERED, plots.CLEAN):  # the lines are level: a row of the picture is full of them
        counts = places_of(picture, colour)[:, 0].bincount()
        rows[colour] = (counts > 100).nonzero()
    asr, ra = rows[plots.TRIGGERED].min(), rows[plots.TRIGGERED].max()
    assert asr < rows[plots.CLEAN].min() < rows[plots.CLEAN].max() < ra  # 99 above 82 and 80, above 1
    plots.draw_curves(tmp_path / "with start.png", curve(0, 1, 2, 3))
    assert pixels_of(tmp_path / "with start.png").shape[1] > picture.shape[1]  # room for the panels that look closer


AWKWARD = ["$\\frac{$", "a\nb\x00", "<b>&", "x" * 300, "\u732b", ""]


def test_any_class_name_can_be_drawn_and_nothing_is_said_about_it(tmp_path, recwarn):
    accuracies = [float("nan"), 50.0, 60.0, 70.0, 80.0, 90.0]
    figures = {name: {"acc": 70.0, "per_class": accuracies} for name in ("before", "after")}
    plots.draw_per_class(tmp_path / "p.png", AWKWARD, figures, 0)
    assert not recwarn.list
    picture = pixels_of(tmp_path / "p.png")
    assert 400 < picture.shape[1] < 1000  # a name of 300 letters has not taken the place
    assert all(len(places_of(picture, colour)) > 100 for colour in plots.MODELS.values())
    assert [plots.class_name(name) for name in AWKWARD[:3]] == ["$\\frac{$", "a?b?", "<b>&"]


def test_of_many_classes_those_that_changed_most_are_shown():
    before = torch.full((200,), 90.0)
    after = before - torch.arange(200) / 10
    shown = plots.classes_to_show(torch.stack([before, after]), target=3)
    assert shown == [3, *range(151, 200)]
    assert plots.classes_to_show(after[None], target=None) == [*range(150, 200)]  # of one model, the lowest
    assert plots.classes_to_show(torch.ones(2, 10), target=3) == [*range(10)]


def test_a_sample_is_spread_over_the_set():
    assert spread(5, plots.SAMPLE).tolist() == [0, 1, 2, 3, 4]
    index = spread(10_000, plots.SAMPLE)
    assert len(index) == plots.SAMPLE
    assert set((index[1:] - index[:-1]).tolist()) == {14, 15}


def lightness(colour):
    """CIE L*, 0..100, of #RRGGBB."""
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in bytes.fromhex(colour[1:])]
    return 116 * sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True)) ** (1 / 3) - 16


@pytest.mark.parametrize(
    "group", [list(plots.MODELS.values()), [plots.CLEAN, plots.TARGET, plots.TRIGGERED]], ids=["models", "images"]
)
def test_colours_of_one_group_differ_in_lightness(group):
    assert min(abs(lightness(a) - lightness(b)) for a, b in itertools.combinations(group, 2)) > 10


@pytest.fixture
def run():
    """What draw_run takes, for a small untrained victim: (classes, sample, attack, models, figures)."""
    attack = Attack("gridTrigger", "all2all", 0, 3, 0.1)
    images = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = get_eval_set(images, torch.arange(12) % 3, attack, torch.device("cpu"))
    figures = {"before": {**FIGURES, "per_class": [70.0, 80.0, 90.0]}}
    return ["a", "b", "c"], sample, attack, {"before": select_model("WRN-10-1", 3)}, figures


def test_what_applies_is_drawn_and_an_earlier_curve_does_not_stay(tmp_path, run):
    names = [name for name, _ in plots.draw_run(tmp_path, *run, curve(0, 1))]
    assert names == ["trigger.png", "features.png", "curves.png", "per_class.png"]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(min(pixels_of(tmp_path / name).shape[:2]) > 150 for name in names)
    unwatched = [{"epoch": 0}, {"epoch": 1, "loss": 1.0}]
    *_, (missing, reason) = plots.draw_run(tmp_path, *run, unwatched)
    assert missing is None and "--print_freq" in reason
    assert not (tmp_path / "curves.png").exists()
    assert None not in dict(plots.draw_run(tmp_path, *run, []))  # nothing trained: nothing missed


def test_the_map_has_a_panel_more_for_the_second_model(tmp_path):
    rng = torch.Generator().manual_seed(0)
    features = {name: (torch.randn(30, 4, generator=rng), torch.randn(20, 4, generator=rng)) for name in plots.MODELS}
    figures = {name: FIGURES for name in plots.MODELS}
    of_target = torch.arange(30) < 10
    plots.draw_features(tmp_path / "two.png", features, of_target, figures)
    del features["after"]
    plots.draw_features(tmp_path / "one.png", features, of_target, figures)
    two, one = pixels_of(tmp_path / "two.png"), pixels_of(tmp_path / "one.png")
    assert two.shape[1] > 2 * one.shape[1]
    assert len(places_of(one, plots.TARGET)) > 0


def test_a_model_whose_features_are_all_alike_has_a_map_too(tmp_path, recwarn):
    features = {"before": (torch.ones(9, 4), torch.ones(5, 4))}
    plots.draw_features(tmp_path / "f.png", features, torch.zeros(9, dtype=torch.bool), {"before": FIGURES})
    assert not recwarn.list
    assert len(places_of(pixels_of(tmp_path / "f.png"), plots.TRIGGERED)) > 0
