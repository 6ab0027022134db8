"""Every option and its default. Edit a default here to change it for good, or give the option on the command line."""

import argparse
import math
import os
import sys

from utils.errors import nearest

DATASETS = ["CIFAR10", "CIFAR100", "GTSRB", "folder", "shapes"]
SCHEDULES = ["onecycle", "cosine", "steps", "drop"]
# Label mode -> poison rate. all2all asks more of a model; cleanLabel counts the images of the target class alone.
RATES = {"all2one": 0.1, "all2all": 0.2, "cleanLabel": 0.5}
# Trigger -> what its victims are called, the label mode it is known with, and the options of its own.
ATTACKS = {
    "gridTrigger": ("badnet", "all2one", {}),
    "squareTrigger": ("square", "all2one", {"trig_w": 3, "trig_h": 3}),
    "fourCornerTrigger": ("corners", "all2one", {}),
    "centerTrigger": ("center", "all2one", {}),
    "randomPixelTrigger": ("pixels", "all2one", {"opacity": 0.2}),
    "blendTrigger": ("blend", "all2one", {"opacity": 0.2, "trigger_image": None}),
    "trojanTrigger": ("trojan", "all2one", {"trig_w": 5, "trig_h": 5, "surrogate": None}),
    "signalTrigger": ("sig", "cleanLabel", {"delta": 40.0, "train_delta": 30.0}),
    "clTrigger": ("cl", "cleanLabel", {"epsilon": 8, "surrogate": None}),
    "wanetTrigger": ("wanet", "all2one", {"warp": 1.0, "noise_ratio": 1.0}),
}
# Defense -> the options of its own with the defaults of its recipe: as published, but for mcl, nc (as ft), fst's alpha.
_SGD = {"epochs": 20, "batch_size": 64, "lr": 0.1, "schedule": "drop", "momentum": 0.9, "weight_decay": 1e-4}
_SGD |= {"augment": "crop_flip"}
_COSINE = _SGD | {"lr": 0.01, "schedule": "cosine"}
_INVERTED = {"target": "auto", "force": False, "inversion_rounds": 5, "inversion_steps": 36, "inversion_batches": 3}
_MCL = {"positive": "finetuned", "finetune_epochs": 3, "finetune_lr": 0.003, "epochs": 5, "schedule": "onecycle"}
_MCL |= {"temperature": 0.15, "align_weight": 12.0, "contrast": "others", "ema": 0.97}
DEFENSES = {
    "mcl": _INVERTED | _SGD | _MCL,
    "ft": _SGD,
    "nad": _SGD | {"finetune_epochs": 10, "finetune_lr": 0.1},
    "ibau": {"epochs": 5, "batch_size": 100, "lr": 1e-3, "augment": "none"},
    "nc": _INVERTED | _SGD,
    "ftsam": _COSINE | {"epochs": 100, "batch_size": 256, "weight_decay": 5e-4, "rho": 2.0},
    "fst": _COSINE | {"epochs": 10, "batch_size": 128, "weight_decay": 0.0, "alpha": 0.005},
}
DATA_ROOT = os.environ.get("MCL_DATA_ROOT") or "data"


def get_arguments(script: str = "main.py") -> argparse.ArgumentParser:
    """The parser of "main.py" or "train_badnet.py", each with just the options that it uses."""
    parser = OneLineParser(prog=script, formatter_class=DefaultsShown)
    if script == "main.py":
        _add_defense(parser)
    else:
        _add_training(parser)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="CIFAR10", choices=DATASETS, help="shapes is built in, the others lie in --data_root")
    add("--data_root", default=DATA_ROOT, help="torchvision's files, or folder's train/ and test/; also $MCL_DATA_ROOT")
    add("--image_size", type=positive, default=32, help="pixels a side, for GTSRB and folder, whose pictures differ")
    add("--num_class", type=positive, help="number of classes; follows the data set unless given")

    add = parser.add_argument_group("model (main.py takes from the checkpoint what it states)").add_argument
    add("--arch", default="WRN-16-1", help="WRN-<depth>-<width>, ResNet18 or PreActResNet18")
    add("--normalize", default="dataset", choices=["dataset", "none"], help="input normalisation; none: raw [0, 1]")
    _add_attack(parser, training=script != "main.py")

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=long, default=1, help="fixes poisoning, split, weights, batches and inversion")
    add("--device", default="auto", choices=["auto", "cuda", "cpu"], help="auto takes CUDA where there is one")
    add("--precision", default="fp32", choices=["auto", "fp32", "bf16"], help="of training; auto: bf16 if fast")
    add("--print_freq", type=count, default=1, help="watch ACC and ASR every so many epochs; 0: never")
    add("--tensorboard", action="store_true", help="log what is watched for TensorBoard too, into results/<name>/")
    add("--checkpoint_root", default="weight", help="folder for weights")
    add("--log_root", default="results", help="folder for <name>/: metrics.json, history.csv, report.html, pictures")
    add("--name", help="names the run's files; made from the options unless given")
    return parser


def _own(add, table, option, told, **how):
    """An option of some triggers or defenses; parse fills in the default of the one that is chosen."""
    takers = {}
    for name, options in table.items():
        if option in options:
            value = options[option]
            shown = "" if value is None or value is False else f"{value:g}" if isinstance(value, float) else f"{value}"
            takers.setdefault(shown, []).append(name)
    of = ", ".join(" ".join([*names, value]).strip() for value, names in takers.items())
    add(f"--{option}", help=f"{told} ({of})", **how)


def _add_attack(parser, training):
    told = "attack" if training else "attack (where the checkpoint states none)"
    add = parser.add_argument_group(told).add_argument

    def own(option, kind, told):
        _own(add, {trigger: own_options for trigger, (*_, own_options) in ATTACKS.items()}, option, told, type=kind)

    modes = ", ".join(trigger for trigger, (_, mode, _) in ATTACKS.items() if mode == "cleanLabel")
    add("--trigger_type", default="gridTrigger", choices=ATTACKS, help="what is stamped on")
    add("--target_type", choices=RATES, help=f"label mode (default: all2one; cleanLabel for {modes})")
    add("--target_label", type=int, default=5, help="the attacker's label, for all2one and cleanLabel")
    own("trig_w", positive, "width in pixels")
    own("trig_h", positive, "height in pixels")
    own("opacity", share, "share of the picture that is mixed in")
    own("trigger_image", str, "the picture, a file; drawn unless given")
    own("delta", above_zero, "amplitude in grey levels, in the test")
    own("warp", above_zero, "strength s of the warp")
    if training:
        rates = ", ".join(f"{mode} {rate:g}" for mode, rate in RATES.items())
        told = f"poison rate, for cleanLabel of the target class; 0: a clean model (default: {rates})"
        add("--inject_portion", type=share_or_none, help=told)
        own("train_delta", above_zero, "amplitude in grey levels, in training")
        own("epsilon", positive, "bound of the noise, in grey levels")
        own("noise_ratio", zero_or_more, "images with noise and their true label, for each poisoned one")
        own("surrogate", str, "a clean model's checkpoint; weight/<dataset>/WRN-16-1-clean.pth.tar unless given")


def _add_training(parser):
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, default=20, help="passes over the poisoned training set")
    add("--batch_size", type=positive, default=128, help="images a step")
    add("--lr", type=above_zero, default=0.4, help="peak learning rate of the schedule")
    add("--schedule", default="onecycle", choices=SCHEDULES, help="scaled from --lr and --epochs")
    add("--momentum", type=decay, default=0.9, help="of SGD, Nesterov's form")
    add("--weight_decay", type=zero_or_more, default=5e-4, help="of SGD")
    add("--resume", action="store_true", help="go on after the last whole epoch of this command's stopped run")


def _add_defense(parser):
    add = parser.add_argument_group("defense (in brackets: which takes the option, with which default)").add_argument

    def own(option, kind, told, **how):
        _own(add, DEFENSES, option, told, **({"type": kind} if kind else {}), **how)

    told = "the victim's checkpoint (default: <dataset>/WRN-16-1-badnet.pth.tar, one's own or the shipped one)"
    add("--model", nargs="+", help=told)
    told = "none only measures the model; all compares them, and so do several models"
    add("--defense", default="mcl", choices=[*DEFENSES, "none", "all"], help=told)
    add("--ratio", type=share, default=0.05, help="clean split: share of the training images the defender has")
    add("--resume", action="store_true", help="go on with a comparison that was stopped")
    own("target", label, "the label the defender works against; auto: search for it; any: each image's own is left")
    own("force", None, "go on where the search flags no label", action="store_const", const=True)
    own("inversion_rounds", positive, "searches, each near where the last ended; published: 1")
    own("inversion_steps", positive, "in a round; each ends with a look at the pattern")
    own("inversion_batches", positive, "batches of the clean split in a step of the inversion")
    own("positive", str, "whose clean feature is z+", choices=["finetuned", "backdoored"])
    own("finetune_epochs", positive, "passes over the clean split to make the positive model, or NAD's teacher")
    own("finetune_lr", above_zero, "peak learning rate of those")
    own("epochs", positive, "passes over the clean split to purify")
    own("batch_size", positive, "clean images a step")
    own("lr", above_zero, "peak learning rate of the schedule")
    own("schedule", str, "scaled from --lr and --epochs; published for mcl: steps", choices=SCHEDULES)
    own("momentum", decay, "of SGD, Nesterov's form")
    own("weight_decay", zero_or_more, "of SGD")
    own("augment", str, "of the clean split; published for mcl: none", choices=["crop_flip", "none"])
    own("temperature", above_zero, "t of the contrastive loss; published: 0.5")
    own("align_weight", zero_or_more, "of 1 - cos(z, z+), z of x and of x'; published: 0")
    own("contrast", str, "others: not the target class; published: all", choices=["others", "all"])
    own("ema", decay, "decay of the averaged weights; published: 0, the last weights")
    own("rho", above_zero, "how far FT-SAM looks for the sharpest point, relative to the weights")
    own("alpha", zero_or_more, "weight of the product of FST's new last layer with the victim's")


# Options that apply only under another one, and are refused elsewhere: what that is, in words and as a test.
_FINETUNING = ("--positive finetuned", lambda opt: opt.defense == "all" or opt.positive != "backdoored")
APPLIES = {
    "image_size": ("--dataset GTSRB or folder", lambda opt: opt.dataset in ("GTSRB", "folder")),
    "target_label": ("--target_type all2one or cleanLabel", lambda opt: opt.target_type != "all2all"),
    "finetune_epochs": _FINETUNING,
    "finetune_lr": _FINETUNING,
    "force": ("--target auto", lambda opt: opt.target in (None, "auto")),
    "tensorboard": ("--print_freq from 1 to --epochs", lambda opt: 0 < opt.print_freq <= (opt.epochs or math.inf)),
}
# ... those that mean nothing where a model is only measured, and those that do where nothing is poisoned.
DEFENDING = {"ratio", "precision", "print_freq", "tensorboard"}.union(*DEFENSES.values())
POISONING = "train_delta epsilon noise_ratio"


def parse(script: str, argv: list[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
    """A run's options, and the names of those that the user gave.

    Args:
        argv: the command line's words; sys.argv's unless given.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = get_arguments(script)
    options = parser.parse_args(argv)
    absent = object()
    blank = argparse.Namespace(**dict.fromkeys(vars(options), absent))
    given = {name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not absent}
    _fill_in_attack(options)
    _fill_in_defense(options)
    for name in sorted(given):
        triggers = [trigger for trigger, (*_, own_options) in ATTACKS.items() if name in own_options]
        if triggers and options.trigger_type not in triggers:
            parser.error(f"--{name} applies only with --trigger_type {' or '.join(triggers)}")
        condition, applies = APPLIES.get(name, ("", lambda opt: True))
        if not applies(options):
            parser.error(f"--{name} applies only with {condition}")
        if script == "main.py":
            _check_defense(parser, options, name)
        if name in POISONING.split() and options.inject_portion == 0:
            parser.error(f"--{name} does not apply with --inject_portion 0, which poisons nothing")
    return options, given


def _fill_in_attack(options):
    """Give what the user left to the trigger and the label mode their defaults, as far as the script has the option."""
    _, usual_mode, own_options = ATTACKS[options.trigger_type]
    options.target_type = options.target_type or usual_mode
    for name, value in {"inject_portion": RATES[options.target_type], **own_options}.items():
        if getattr(options, name, value) is None:
            setattr(options, name, value)


def _check_defense(parser, options, name):
    """Refuse an option that the user gave and the chosen defense does not take."""
    takers = [defense for defense, own_options in DEFENSES.items() if name in own_options]
    if name in DEFENDING and options.defense == "none":
        parser.error(f"--{name} does not apply with --defense none, which only measures")
    if takers and options.defense not in [*takers, "all"]:
        parser.error(f"--{name} applies only with --defense {' or '.join(takers)}")
    if name == "resume" and not compares(options):
        parser.error("--resume applies only to a comparison: with --defense all, or with several models")


def compares(options: argparse.Namespace) -> bool:
    """Whether this is not one run of main.py, but a comparison of several."""
    return options.defense == "all" or len(options.model or []) > 1


def one_run(options: argparse.Namespace, **changes) -> argparse.Namespace:
    """The options of one run of a comparison: these with `changes`, and the defaults of its defense filled in.

    What the user gave holds for each defense that takes it.
    """
    one = argparse.Namespace(**{**vars(options), **changes})
    _fill_in_defense(one)
    for name in set().union(*DEFENSES.values()) - set(DEFENSES.get(one.defense, ())):
        setattr(one, name, None)
    return one


def _fill_in_defense(options):
    """Give what the user left to the defense its defaults; options of other defenses stay None."""
    for name, value in DEFENSES.get(getattr(options, "defense", "none"), {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


class DefaultsShown(argparse.ArgumentDefaultsHelpFormatter):
    """Help with each default behind it, but for those whose help says what happens without them."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, with the nearest valid name, and exit code 2."""

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = nearest(unknown[0], self._option_string_actions) if unknown[0].startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = ", ".join(action.choices)
            hint = nearest(value, action.choices)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{hint} (choose from {known})")

    def error(self, message):
        self.exit(2, f"error: {message} (see python {self.prog} --help)\n")


def _number(kind, allowed, told):
    """An argparse type: a number of this kind that is allowed, else a complaint that tells what would be."""

    def parse_number(text):
        number = kind(text)
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"{text} is not {told}")
        return number

    parse_number.__name__ = kind.__name__  # what argparse calls a word that is no number at all
    return parse_number


def label(text):
    """An argparse type: "auto", "any", or a label."""
    return text if text in ("auto", "any") else _number(int, lambda n: n >= 0, "auto, any, or a label, 0 or more")(text)


positive = _number(int, lambda n: n >= 1, "1 or more")
long = _number(int, lambda n: abs(n) < 2**63, "a number of 64 bits")
count = _number(int, lambda n: n >= 0, "0 or more")
above_zero = _number(float, lambda x: 0 < x < float("inf"), "above 0")
zero_or_more = _number(float, lambda x: 0 <= x < float("inf"), "0 or more")
share = _number(float, lambda x: 0 < x <= 1, "above 0 and up to 1")
share_or_none = _number(float, lambda x: 0 <= x <= 1, "from 0 to 1")
decay = _number(float, lambda x: 0 <= x < 1, "from 0 to below 1")
