"""The default of every option. Edit one here, or give the option of the same name on the command line."""

import os
from argparse import Namespace
from functools import partial

from utils import cli

RUN = {
    "dataset": "CIFAR10",
    "data_root": os.environ.get("MCL_DATA_ROOT") or "data",  # the folder that holds cifar-10-batches-py
    "image_size": 32,  # pixels a side, for GTSRB and folder
    "arch": "WRN-16-1",
    "normalize": "dataset",  # the data set's mean and standard deviation; none: raw [0, 1]
    "trigger_type": "gridTrigger",
    "target_label": 5,  # the attacker's label
    "seed": 1,  # fixes poisoning, clean split, weights, batches and inversion
    "device": "auto",  # CUDA if available
    "precision": "fp32",  # of training and inversion
    "print_freq": 1,  # epochs between two measurements of ACC and ASR during training; 0: none
    "checkpoint_root": "weight",
    "log_root": "results",
}

# Training of the victim (train_badnet.py)
TRAINING = {
    "epochs": 20,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.4,  # peak of the schedule
    "schedule": "onecycle",
    "momentum": 0.9,  # Nesterov
    "weight_decay": 5e-4,
}

# label mode -> poison rate: the fraction of the training images, for cleanLabel of the target class
POISON_RATES = {"all2one": 0.1, "all2all": 0.2, "cleanLabel": 0.5}

# trigger -> the name of its victims, its usual label mode, its options, and those for training images alone
# fmt: off
ATTACKS = {
    "gridTrigger": {"name": "badnet", "target_type": "all2one"},
    "squareTrigger": {"name": "square", "target_type": "all2one", "options": {"trig_w": 3, "trig_h": 3}},
    "fourCornerTrigger": {"name": "corners", "target_type": "all2one"},
    "centerTrigger": {"name": "center", "target_type": "all2one"},
    "randomPixelTrigger": {"name": "pixels", "target_type": "all2one", "options": {"opacity": 0.2}},
    "blendTrigger": {"name": "blend", "target_type": "all2one", "options": {"opacity": 0.2, "trigger_image": None}},
    "imageTrigger": {"name": "image", "target_type": "all2one", "options": {"trigger_image": None}},
    "trojanTrigger": {"name": "trojan", "target_type": "all2one",
                      "options": {"trig_w": 5, "trig_h": 5}, "training": {"surrogate": None}},
    "signalTrigger": {"name": "sig", "target_type": "cleanLabel",
                      "options": {"delta": 40.0}, "training": {"train_delta": 30.0}},
    "clTrigger": {"name": "cl", "target_type": "cleanLabel", "training": {"epsilon": 8, "surrogate": None}},
    "wanetTrigger": {"name": "wanet", "target_type": "all2one",
                     "options": {"warp": 1.0}, "training": {"noise_ratio": 1.0}},
}
# fmt: on

# The defender's clean images (main.py)
RATIO = 0.05  # clean split: fraction of the training images

# The target label and the inverted trigger, for the defenses that need them
INVERSION = {
    "target": "auto",  # search for the target label
    "force": False,  # defend even where the search flags no label
    "verify": False,  # search the purified model for a further backdoor, and remove that too
    "inversion_rounds": 5,  # published with mcl: 1
    "inversion_steps": 36,  # per round
    "inversion_batches": 1,  # of 64 images, per step
}

# defense -> its recipe
# fmt: off
DEFENSES = {
    "mcl": {
        **INVERSION,
        # the clean-finetuned model
        "positive": "auto",  # finetuned from 1,000 clean images on, else backdoored, as in the paper's own code
        "finetune_epochs": 3,
        "finetune_lr": 0.003,
        # the student
        "rounds": 3,  # students at most, if one still responds to a small pattern; published: 1
        "epochs": 5,  # published: 20
        "batch_size": 64,
        "lr": 0.3,  # peak of the schedule for 2,500 clean images or more; published: 0.1
        "schedule": "onecycle",  # published: steps
        "momentum": 0.9,  # Nesterov
        "weight_decay": 1e-4,
        "augment": "crop_flip",  # published: none
        "temperature": 0.15,  # published: 0.5
        "align_weight": 4.0,  # of 1 - cos(z, z+), doubled below 1,000 clean images; published: 0
        "contrast": "others",  # images in the contrast: not the target class's; published: all
        "ema": 0.97,  # decay of the averaged weights; published: 0, the last weights
        "calibration": "bias",  # fit the last layer's biases to the labels; published: none
    },
    "ft": {  # as NAD's authors fine-tune
        "epochs": 20, "batch_size": 64, "lr": 0.1, "schedule": "drop",
        "momentum": 0.9, "weight_decay": 1e-4, "augment": "crop_flip",
    },
    "nad": {  # Li et al., ICLR 2021; finetune: the teacher
        "finetune_epochs": 10, "finetune_lr": 0.1,
        "epochs": 20, "batch_size": 64, "lr": 0.1, "schedule": "drop",
        "momentum": 0.9, "weight_decay": 1e-4, "augment": "crop_flip",
    },
    "ibau": {  # Zeng et al., ICLR 2022; epochs: rounds; lr: of Adam
        "epochs": 5, "batch_size": 100, "lr": 1e-3, "augment": "none",
    },
    "nc": {  # Wang et al., S&P 2019: the inversion of mcl, the rate and schedule of BackdoorBench
        **INVERSION,
        "epochs": 20, "batch_size": 64, "lr": 0.01, "schedule": "cosine",
        "momentum": 0.9, "weight_decay": 1e-4, "augment": "crop_flip",
    },
    "ftsam": {  # Zhu et al., ICCV 2023
        "rho": 2.0,
        "epochs": 100, "batch_size": 256, "lr": 0.01, "schedule": "cosine",
        "momentum": 0.9, "weight_decay": 5e-4, "augment": "crop_flip",
    },
    "fst": {  # Min et al., NeurIPS 2023; alpha published: 0.1 to 0.2
        "alpha": 0.005,
        "epochs": 10, "batch_size": 128, "lr": 0.01, "schedule": "cosine",
        "momentum": 0.9, "weight_decay": 0.0, "augment": "crop_flip",
    },
    "pam": {  # Min et al., NeurIPS 2024; rho published: 0.3 to 0.9
        **INVERSION,
        "rho": 0.5,
        "epochs": 20, "batch_size": 64, "lr": 0.01, "schedule": "cosine",
        "momentum": 0.9, "weight_decay": 1e-4, "augment": "crop_flip",
    },
}
# fmt: on


# The options, a line each. Their defaults are the values above.

SCHEDULE_NAMES = ["onecycle", "cosine", "constant", "steps", "drop"]
SCHEDULE_HELP = "fall of the rate; steps: to 1/10 after 1/20 of the run, to 1/100 after half; drop: to 1/10 after 1/10"
CONTRASTS = ["others", "all", "none"]


def trigger_options(training: bool = False) -> dict[str, dict]:
    """trigger -> its options and their defaults, with those for training images alone if `training`."""
    kinds = ("options", "training") if training else ("options",)
    return {
        trigger: {name: value for kind in kinds for name, value in attack.get(kind, {}).items()}
        for trigger, attack in ATTACKS.items()
    }


def get_arguments(script: str = "main.py", description: str | None = None) -> cli.OneLineParser:
    """The parser of "main.py" or "train_badnet.py", each with its own options; the description opens its help."""
    parser = cli.OneLineParser(prog=script, description=description)
    training = script == "train_badnet.py"
    _add_training(parser) if training else _add_defense(parser)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["CIFAR10", "CIFAR100", "GTSRB", "folder", "shapes"], help="shapes needs no download")
    add("--data_root", help="folder of torchvision's files, or of train/ and test/; environment: MCL_DATA_ROOT")
    add("--image_size", type=cli.positive, help="pixels a side, for GTSRB and folder")
    add("--num_class", type=cli.positive, help="number of classes (default: the data set's)")

    add = parser.add_argument_group("model" if training else "model (if its file does not state them)").add_argument
    add("--arch", help="WRN-<depth>-<width>, ResNet18, PreActResNet18, torchvision:NAME, timm:NAME, FILE.py:NAME")
    add("--normalize", type=cli.normalization, help="dataset, none (raw [0, 1]), or MEAN,MEAN,MEAN/STD,STD,STD")
    _add_attack(parser, training)

    add = parser.add_argument_group("run").add_argument
    add("--seed", type=cli.int64, help="seed of poisoning, clean split, weights, batches and inversion")
    add("--device", choices=["auto", "cuda", "cpu"], help="auto: CUDA if available")
    add("--precision", choices=["auto", "fp32", "bf16"], help="of training and inversion; auto: bf16 where it is fast")
    add("--print_freq", type=cli.count, help="epochs between two measurements of ACC and ASR; 0: none in training")
    add("--tensorboard", action="store_true", help="also log these measurements for TensorBoard")
    if not training:
        add("--retune", type=cli.positive, nargs="+", metavar="K", help="also attack the result with K poisoned images")
        add("--retune_reference", help="clean model to compare with, or none (default: WRN-16-1-clean of the data set)")
    add("--checkpoint_root", help="folder for weights")
    add("--log_root", help="folder for results")
    add("--name", help="name of this run's files (default: of data set, model and attack or defense)")
    own = TRAINING if training else {"ratio": RATIO, "defense": "mcl", "trigger_type": None, "target_label": None}
    parser.set_defaults(**{**RUN, **own})
    return parser


def _add_attack(parser, training):
    group = "attack" if training else "attack to measure, if the model's file states none (else it is unknown)"
    add = parser.add_argument_group(group).add_argument
    methods = trigger_options(training)
    add_own = partial(cli.add_method_option, add, methods)
    add("--trigger_type", choices=ATTACKS, help="the trigger")
    add("--target_type", choices=POISON_RATES, help="label mode (default: the trigger's usual one)")
    add("--target_label", type=int, help="the attacker's label, for all2one and cleanLabel")
    add_own("trig_w", "width in pixels", type=cli.positive)
    add_own("trig_h", "height in pixels", type=cli.positive)
    add_own("opacity", "opacity of the picture", type=cli.fraction)
    add_own("trigger_image", "file of the picture; imageTrigger needs one, blendTrigger can draw one", type=str)
    add_own("delta", "amplitude in grey levels", type=cli.above_zero)
    add_own("warp", "strength s of the warp", type=cli.above_zero)
    if training:
        rates = ", ".join(f"{rate:g} for {mode}" for mode, rate in POISON_RATES.items())
        add("--inject_portion", type=cli.fraction_or_zero, help=f"poison rate; 0: a clean model (default: {rates})")
        add_own("train_delta", "amplitude in grey levels, in training images", type=cli.above_zero)
        add_own("epsilon", "bound of the adversarial noise, in grey levels", type=cli.positive)
        add_own("noise_ratio", "noisily warped images with true labels, for each poisoned one", type=cli.zero_or_more)
        add_own("surrogate", "checkpoint of a clean model (default: weight/<dataset>/WRN-16-1-clean.pth.tar)", type=str)
    cli.add_undeclared_options(parser, add, methods)


def _add_training(parser):
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=cli.positive, help="epochs over the poisoned training set")
    add("--batch_size", type=cli.positive, help="images per step")
    add("--optimizer", choices=["sgd", "adamw"], help="adamw: for transformers, with --lr 0.001 --weight_decay 0.05")
    add("--lr", type=cli.above_zero, help="peak learning rate")
    add("--schedule", choices=SCHEDULE_NAMES, help=SCHEDULE_HELP)
    add("--momentum", type=cli.decay, help="Nesterov momentum of SGD")
    add("--weight_decay", type=cli.zero_or_more, help="weight decay")
    add("--resume", action="store_true", help="continue this command's interrupted run")


def _add_defense(parser):
    add = parser.add_argument_group("defense (in brackets: the defenses that use the option: its default)").add_argument
    add_own = partial(cli.add_method_option, add, DEFENSES)
    add("--model", nargs="+", help="checkpoint of the victim (default: weight/<dataset>/WRN-16-1-badnet.pth.tar)")
    defenses = {"nargs": "+", "choices": [*DEFENSES, "none", "all"], "metavar": "DEFENSE"}
    add("--defense", **defenses, help=f"{', '.join(DEFENSES)}; several, or all: compare them; none: only measure")
    add("--ratio", type=cli.fraction, help="size of the clean split, as a fraction of the training images")
    add("--clean", type=cli.positive, help="number of clean images, equally many of each class, in place of --ratio")
    add("--seeds", type=cli.int64, nargs="+", metavar="SEED", help="repeat each run with these seeds: mean and spread")
    add("--resume", action="store_true", help="continue an interrupted comparison")
    add_own("target", "label to defend against; auto: search; any: any label but an image's own", type=cli.target)
    add_own("force", "defend even where the search flags no label")
    add_own("verify", "search the purified model for a further backdoor, and remove that too")
    add_own("inversion_rounds", "rounds at most, each from noise around the last pattern", type=cli.positive)
    add_own("inversion_steps", "steps per round", type=cli.positive)
    add_own("inversion_batches", "batches of 64 images per step", type=cli.positive)
    add_own("positive", "model of the positive feature z+", choices=["auto", "finetuned", "backdoored"])
    add_own("finetune_epochs", "epochs of the fine-tuning stage", type=cli.positive)
    add_own("finetune_lr", "peak learning rate of the fine-tuning stage", type=cli.above_zero)
    add_own("rounds", "students at most; a new one is trained with all patterns found so far", type=cli.positive)
    add_own("epochs", "epochs over the clean split", type=cli.positive)
    add_own("batch_size", "clean images per step", type=cli.positive)
    add_own("lr", "peak learning rate", type=cli.above_zero)
    add_own("schedule", SCHEDULE_HELP, choices=SCHEDULE_NAMES)
    add_own("momentum", "Nesterov momentum of SGD", type=cli.decay)
    add_own("weight_decay", "weight decay of SGD", type=cli.zero_or_more)
    add_own("augment", "augmentation of the clean split", choices=["crop_flip", "none"])
    add_own("temperature", "temperature t of the contrastive loss", type=cli.above_zero)
    add_own("align_weight", "weight of the alignment loss, 1 - cos(z, z+)", type=cli.zero_or_more)
    add_own("contrast", "images in the contrast; others: not the target's; none: alignment alone", choices=CONTRASTS)
    add_own("ema", "decay of the averaged weights; 0: no averaging", type=cli.decay)
    add_own("calibration", "what is fitted to the labels at the end", choices=["bias", "none"])
    add_own("rho", "distance from the weights at which the gradient is taken", type=cli.above_zero)
    add_own("alpha", "weight of the product of the new and the old last layer", type=cli.zero_or_more)
    cli.add_undeclared_options(parser, add, DEFENSES)


def parse(script: str, argv: list[str] | None = None, description: str | None = None) -> tuple[Namespace, set[str]]:
    """A run's options, and the names of the explicit ones, which the user gave.

    Args:
        argv: the words of the command line; sys.argv's by default.
        description: opens the help.
    """
    parser = get_arguments(script, description)
    options, explicit = cli.parse_once(parser, argv)
    methods = {"trigger_type": trigger_options(training=script == "train_badnet.py")}
    cli.fill_in_defaults(options, {name: RUN[name] for name in ("trigger_type", "target_label")})
    options.target_type = options.target_type or ATTACKS[options.trigger_type]["target_type"]
    if script == "train_badnet.py" and options.inject_portion is None:
        options.inject_portion = POISON_RATES[options.target_type]
    cli.fill_in_defaults(options, methods["trigger_type"][options.trigger_type])
    if script == "main.py":
        methods["defense"] = DEFENSES
        names = list(dict.fromkeys(cli.listed(options.defense)))
        names = list(DEFENSES) if "all" in names else names
        options.defense = names if len(names) > 1 else names[0]
        cli.fill_in_defaults(options, DEFENSES.get(names[0], {}) if len(names) == 1 else {})
    cli.check_options(parser, options, explicit, methods)
    options.trigger_seed = options.seed  # also with --seeds: all runs of a comparison measure the same trigger
    return options, explicit


def single_run_options(options: Namespace, **changes) -> Namespace:
    """The options of one run of a comparison: `options` with `changes` and the recipe of its defense.

    Explicit options hold for every defense that uses them; options of other defenses are None.
    """
    single = Namespace(**{**vars(options), **changes})
    recipe = DEFENSES.get(single.defense, {})
    cli.fill_in_defaults(single, recipe)
    for name in set().union(*DEFENSES.values()) - set(recipe):
        setattr(single, name, None)
    return single
