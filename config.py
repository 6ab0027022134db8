"""Every option and its default. Edit a default here to change it for good, or give the option on the command line."""

import argparse
import os
import sys

from utils.errors import nearest

DATASETS = ["CIFAR10", "CIFAR100", "GTSRB", "folder", "shapes"]
SCHEDULES = ["onecycle", "cosine", "steps"]
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
    "wanetTrigger": ("wanet", "all2one", {"warp": 0.5, "noise_ratio": 2.0}),
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
    add("--precision", default="fp32", choices=["fp32", "bf16"], help="of training; measuring is always in fp32")
    add("--print_freq", type=count, default=1, help="watch ACC and ASR every so many epochs; 0: never")
    add("--tensorboard", action="store_true", help="log what is watched for TensorBoard too, into results/<name>/")
    add("--checkpoint_root", default="weight", help="folder for weights")
    add("--log_root", default="results", help="folder for <name>/: metrics.json, history.csv, report.html, pictures")
    add("--name", help="names the run's files; made from the options unless given")
    return parser


def _add_attack(parser, training):
    told = "attack" if training else "attack (where the checkpoint states none)"
    add = parser.add_argument_group(told).add_argument

    def own(option, kind, told):
        """An option of some triggers; parse fills in the default of the one that is chosen."""
        values = {
            trigger: own_options[option] for trigger, (*_, own_options) in ATTACKS.items() if option in own_options
        }
        of = ", ".join(trigger if value is None else f"{trigger} {value:g}" for trigger, value in values.items())
        add(f"--{option}", type=kind, help=f"{told} ({of})")

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
    add = parser.add_argument_group("defense").add_argument
    add("--model", help="the victim's checkpoint (default: weight/<dataset>/WRN-16-1-badnet.pth.tar)")
    add("--defense", default="mcl", choices=["mcl", "none"], help="none only measures the model")
    add("--target", type=int, help="the label the defender works against (default: the attack's)")
    add("--ratio", type=share, default=0.05, help="clean split: share of the training images the defender has")
    add("--inversion_rounds", type=positive, default=5, help="searches, each near where the last ended; published: 1")
    add("--inversion_steps", type=positive, default=36, help="in a round; each ends with a look at the pattern")
    add("--inversion_batches", type=positive, default=3, help="batches of the clean split in a step of the inversion")
    add("--positive", default="finetuned", choices=["finetuned", "backdoored"], help="whose clean feature is z+")
    add("--finetune_epochs", type=positive, default=5, help="passes over the clean split to make the positive model")
    add("--finetune_lr", type=above_zero, default=0.003, help="peak learning rate of those")
    add("--epochs", type=positive, default=8, help="passes over the clean split to purify")
    add("--batch_size", type=positive, default=64, help="clean images a step")
    add("--lr", type=above_zero, default=0.1, help="peak learning rate of the schedule")
    add("--schedule", default="onecycle", choices=SCHEDULES, help="scaled from --lr and --epochs; published: steps")
    add("--momentum", type=decay, default=0.9, help="of SGD, Nesterov's form")
    add("--weight_decay", type=zero_or_more, default=1e-4, help="of SGD")
    add("--temperature", type=above_zero, default=0.15, help="t of the contrastive loss; published: 0.5")
    add("--align_weight", type=zero_or_more, default=12.0, help="of 1 - cos(z, z+), z of x and of x'; published: 0")
    add("--contrast", default="others", choices=["others", "all"], help="others: not the target class; published: all")
    add("--augment", default="crop_flip", choices=["crop_flip", "none"], help="of the clean split; published: none")
    add("--ema", type=decay, default=0.97, help="decay of the averaged weights; published: 0, the last weights")


# Options that apply only under another one, and are refused elsewhere: what that is, in words and as a test.
_FINETUNING = ("--positive finetuned", lambda opt: opt.positive == "finetuned")
APPLIES = {
    "image_size": ("--dataset GTSRB or folder", lambda opt: opt.dataset in ("GTSRB", "folder")),
    "target_label": ("--target_type all2one or cleanLabel", lambda opt: opt.target_type != "all2all"),
    "finetune_epochs": _FINETUNING,
    "finetune_lr": _FINETUNING,
    "tensorboard": ("--print_freq from 1 to --epochs", lambda opt: 0 < opt.print_freq <= opt.epochs),
}
# ... those that mean nothing where a model is only measured, and those that do where nothing is poisoned.
DEFENDING = (
    "target ratio inversion_rounds inversion_steps inversion_batches positive finetune_epochs finetune_lr epochs "
    "batch_size lr schedule momentum weight_decay temperature align_weight contrast augment ema precision print_freq "
    "tensorboard"
)
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
    for name in sorted(given):
        triggers = [trigger for trigger, (*_, own_options) in ATTACKS.items() if name in own_options]
        if triggers and options.trigger_type not in triggers:
            parser.error(f"--{name} applies only with --trigger_type {' or '.join(triggers)}")
        condition, applies = APPLIES.get(name, ("", lambda opt: True))
        if not applies(options):
            parser.error(f"--{name} applies only with {condition}")
        if name in DEFENDING.split() and getattr(options, "defense", None) == "none":
            parser.error(f"--{name} does not apply with --defense none, which only measures")
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


positive = _number(int, lambda n: n >= 1, "1 or more")
long = _number(int, lambda n: abs(n) < 2**63, "a number of 64 bits")
count = _number(int, lambda n: n >= 0, "0 or more")
above_zero = _number(float, lambda x: 0 < x < float("inf"), "above 0")
zero_or_more = _number(float, lambda x: 0 <= x < float("inf"), "0 or more")
share = _number(float, lambda x: 0 < x <= 1, "above 0 and up to 1")
share_or_none = _number(float, lambda x: 0 <= x <= 1, "from 0 to 1")
decay = _number(float, lambda x: 0 <= x < 1, "from 0 to below 1")
