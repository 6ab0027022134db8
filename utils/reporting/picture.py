"""The style that all pictures share, drawn with matplotlib and without a display.

A colour has one meaning in all of them: blues are models, light before and dark after the defense; grey, black and
vermillion are images: clean ones, clean ones of the target class, triggered ones. The colours of a group differ in
lightness too, for colour-blind readers and for prints in black and white.
"""

import contextlib
import warnings
from typing import NamedTuple

from matplotlib import font_manager, style
from matplotlib.figure import Figure

from utils.files import write_file

MODELS = {"before": "#56B4E9", "after": "#0072B2"}
CLEAN, TARGET, TRIGGERED = "#A0A0A0", "#000000", "#D55E00"
DPI = 150
FONT = "DejaVu Sans"  # comes with matplotlib
STYLE = {
    "font.family": FONT,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.4,
    "savefig.dpi": DPI,
    "text.parse_math": False,  # a dollar sign in a class name does not start a formula
}


class Picture(NamedTuple):
    """A picture of a report. `name` is its file, None if the caption says why there is none; `alt` describes it."""

    name: str | None
    caption: str
    alt: str = ""


@contextlib.contextmanager
def new_picture(path: str, width: float, height: float):
    """A figure of this size in inches, in the style above whatever matplotlibrc says; written to `path` on exit."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks is drawn as a box
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
        yield figure
        write_file(path, lambda file: figure.savefig(file, format="png"))


def missing_letters(text: str) -> set[str]:
    """The letters of a text that the pictures' font lacks."""
    font = font_manager.get_font(font_manager.findfont(FONT))
    return {letter for letter in text if font.get_char_index(ord(letter)) == 0}
