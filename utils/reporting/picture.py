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
        warnings.filterwarnings("ignore", "Glyph")  # a letter that no font has is drawn as a box
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.06, w_pad=0.06)
        yield figure
        write_file(path, lambda file: figure.savefig(file, format="png"))


def find_fonts(text: str) -> tuple[list[str], set[str]]:
    """The default font and installed ones for the letters that it lacks, and the letters that no font has."""
    fonts, missing = [FONT], {letter for letter in text if not _has_glyph(font_manager.findfont(FONT), letter)}
    for font in font_manager.fontManager.ttflist:
        covered = {letter for letter in missing if _has_glyph(font.fname, letter)}
        if covered and not font.name.startswith("Last Resort"):  # has a box for every letter
            fonts.append(font.name)
            missing -= covered
    return fonts, missing


def _has_glyph(path, letter):
    try:
        return font_manager.get_font(path).get_char_index(ord(letter)) != 0
    except (OSError, RuntimeError):  # removed, or damaged
        return False
