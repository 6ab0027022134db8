"""`purify` for programs with modules of their own that are called like this repository's (models, utils, config, ...).

purify = runpy.run_path("PATH/TO/mcl/defenses/isolated.py")["purify"]
"""

import importlib
import os
import sys

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMES = {"config", "defenses", "models", "utils"}  # of the modules that purify imports


def _take_modules():
    """Remove the modules of these names from sys.modules, and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in NAMES}


def _import_purify():
    """Import defenses.purify from this repository; afterwards the program's own modules are in their places again."""
    own_modules = _take_modules()
    sys.path.insert(0, REPOSITORY)
    try:
        return importlib.import_module("defenses").purify
    finally:
        sys.path.remove(REPOSITORY)
        _take_modules()
        sys.modules.update(own_modules)


purify = _import_purify()
