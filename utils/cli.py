"""The command line: one-line errors, number types, and options that belong to one trigger or one defense."""

import argparse
import math
from collections.abc import Callable

from utils.errors import UserError, did_you_mean

# option that selects a method -> method -> the method's options and their defaults
Methods = dict[str, dict[str, dict]]


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose help opens with the description, and whose errors are UserErrors."""

    def __init__(self, **settings):
        super().__init__(usage=argparse.SUPPRESS, formatter_class=_HelpFormatter, **settings)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = did_you_mean(unknown[0], self._option_string_actions) if unknown[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            hint, choices = did_you_mean(value, action.choices), ", ".join(action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint} (choose from {choices})")

    def error(self, message):
        raise UserError(f"{message} (see python {self.prog} --help)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the description as written, N and X for whole and real numbers, each default that is not None or False."""

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", "")
        return {"int": "N", "float": "X"}.get(kind) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False
        return action.help if hidden else super()._get_help_string(action)


def add_method_option(add: Callable, methods: dict[str, dict], name: str, help_text: str, **settings) -> None:
    """Declare an option of some methods, with each method's default in its help.

    Args:
        add: the add_argument of a parser or an argument group.
        methods: method -> its options and their defaults.
        settings: further arguments of add_argument; the type follows from the defaults unless given.
    """
    defaults = {method: options[name] for method, options in methods.items() if name in options}
    methods_by_default = {}
    for method, default in defaults.items():
        methods_by_default.setdefault(_default_text(default), []).append(method)
    note = ", ".join(" ".join(names) + (text and f": {text}") for text, names in methods_by_default.items())
    settings = settings or _settings_for(next(iter(defaults.values())))
    add(f"--{name}", help=f"{help_text} [{note}]".strip(), **settings)


def add_undeclared_options(parser: argparse.ArgumentParser, add: Callable, methods: dict[str, dict]) -> None:
    """Declare every option of the methods that the parser does not know yet, without a help text."""
    for name in dict.fromkeys(name for options in methods.values() for name in options):
        if f"--{name}" not in parser._option_string_actions:
            add_method_option(add, methods, name, "")


def parse_once(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """Parse argv (sys.argv's words if None): the options with their defaults, and the names of the explicit ones."""
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    options = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    explicit = {name for name in names if getattr(options, name) is not unset}
    for name in set(names) - explicit:
        setattr(options, name, parser.get_default(name))
    return options, explicit


def fill_in_defaults(options: argparse.Namespace, defaults: dict) -> None:
    """Set each option that is still None to its default."""
    for name, default in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, default)


def check_options(parser, options, explicit: set[str], methods: Methods) -> None:
    """End with a usage error where an explicit option does not apply to this run."""
    for name in sorted(explicit):
        for selector, options_of in methods.items():
            users = [method for method, defaults in options_of.items() if name in defaults]
            if users and not set(users) & set(listed(getattr(options, selector))):
                parser.error(f"--{name} applies only with --{selector} {' or '.join(users)}")
        condition, applies = OPTION_CONDITIONS.get(name, ("", lambda _: True))
        if not applies(options):
            parser.error(f"--{name} applies only with {condition}")


def listed(value: str | list[str]) -> list[str]:
    """The values of an option that takes one or several."""
    return [value] if isinstance(value, str) else value


def is_comparison(options: argparse.Namespace) -> bool:
    """Whether main.py compares several defenses, models or seeds."""
    return len(listed(options.defense)) > 1 or len(options.model or []) > 1 or len(options.seeds or []) > 1


# Options valid only in combination with another: (condition in words, predicate).
_FINETUNED = ("--positive auto or finetuned", lambda opt: len(listed(opt.defense)) > 1 or opt.positive != "backdoored")
_DEFENDS = ("a --defense other than none", lambda opt: getattr(opt, "defense", None) != "none")
_POISONS = ("--inject_portion above 0", lambda opt: opt.inject_portion > 0)
OPTION_CONDITIONS = {
    "image_size": ("--dataset GTSRB or folder", lambda opt: opt.dataset in ("GTSRB", "folder")),
    "target_label": ("--target_type all2one or cleanLabel", lambda opt: opt.target_type != "all2all"),
    "momentum": ("--optimizer sgd", lambda opt: getattr(opt, "optimizer", "sgd") == "sgd"),
    "finetune_epochs": _FINETUNED,
    "finetune_lr": _FINETUNED,
    "retune_reference": ("--retune", lambda opt: opt.retune),
    "contrast": ("--align_weight above 0, if it is none", lambda opt: opt.contrast != "none" or opt.align_weight != 0),
    "temperature": ("--contrast others or all", lambda opt: opt.contrast != "none"),
    "force": ("--target auto", lambda opt: opt.target in (None, "auto")),
    "seed": ("one seed, without --seeds", lambda opt: not getattr(opt, "seeds", None)),
    "resume": ("several defenses, models or --seeds", lambda opt: not hasattr(opt, "defense") or is_comparison(opt)),
    "tensorboard": (
        "a training, and --print_freq from 1 to --epochs",
        lambda opt: _DEFENDS[1](opt) and 0 < opt.print_freq <= (opt.epochs or math.inf),
    ),
    "ratio": ("a --defense other than none, without --clean", lambda opt: _DEFENDS[1](opt) and not opt.clean),
    **dict.fromkeys(("clean", "precision", "print_freq"), _DEFENDS),
    **dict.fromkeys(("train_delta", "epsilon", "noise_ratio"), _POISONS),
    "surrogate": (_POISONS[0], lambda opt: opt.trigger_type == "trojanTrigger" or _POISONS[1](opt)),
}


def number_type(kind: type, is_allowed: Callable, expected: str) -> Callable:
    """An argparse type: a number of this kind that is_allowed; its error says what was expected."""

    def parse_number(text):
        number = kind(text)
        if not is_allowed(number):
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return number

    parse_number.__name__ = kind.__name__  # argparse names the type when the text is not a number
    return parse_number


positive = number_type(int, lambda n: n >= 1, "1 or more")
count = number_type(int, lambda n: n >= 0, "0 or more")
int64 = number_type(int, lambda n: abs(n) < 2**63, "a number of 64 bits")
above_zero = number_type(float, lambda x: 0 < x < float("inf"), "above 0")
zero_or_more = number_type(float, lambda x: 0 <= x < float("inf"), "0 or more")
fraction = number_type(float, lambda x: 0 < x <= 1, "above 0 and up to 1")
fraction_or_zero = number_type(float, lambda x: 0 <= x <= 1, "from 0 to 1")
decay = number_type(float, lambda x: 0 <= x < 1, "from 0 to below 1")
_label = number_type(int, lambda n: n >= 0, "auto, any, or a label, 0 or more")


def normalization(text: str) -> str | tuple:
    """An argparse type: "dataset", "none", or the means and the standard deviations of three channels."""
    if text in ("dataset", "none"):
        return text
    numbers = tuple(tuple(float(number) for number in part.split(",")) for part in text.split("/"))
    if [*map(len, numbers)] != [3, 3] or not all(map(math.isfinite, sum(numbers, ()))) or min(numbers[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not dataset, none, or MEAN,MEAN,MEAN/STD,STD,STD with STD above 0")
    return numbers


def target(text: str) -> str | int:
    """An argparse type: "auto", "any", or a label."""
    return text if text in ("auto", "any") else _label(text)


def _default_text(default):
    if default is None or default is False:
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _settings_for(default):
    """The arguments of add_argument that follow from an option's default."""
    if isinstance(default, bool):
        return {"action": "store_const", "const": True}
    return {"type": positive if isinstance(default, int) else zero_or_more if isinstance(default, float) else str}
