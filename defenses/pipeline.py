"""From a run's options to a purified model: what the chosen defense takes is made, then the defense is called."""

import config
from defenses import DEFENSES
from defenses.inversion import HIT_RATE, invert_trigger
from utils.errors import RunError
from utils.report import search_table
from utils.seed import generator

# Options that are used up before a defense begins, or that tell it of its batches.
PREPARED = {"target", "force", "inversion_rounds", "inversion_steps", "inversion_batches"}
PREPARED |= {"positive", "finetune_epochs", "finetune_lr", "batch_size", "augment"}
# ... and those of a defense's training that its teacher's has as well.
SHARED = ("schedule", "momentum", "weight_decay", "precision", "ema")


def choose_target(searched, force) -> int | None:
    """Tell what the search says of every label; the flagged one with the smallest pattern, or None where none is."""
    print(search_table([found.facts() for found in searched]))
    flagged = sorted((found for found in searched if found.flagged), key=lambda found: found.index)
    if flagged:
        labels = ", ".join(str(found.label) for found in flagged)
        several = f"; {flagged[0].label} has the smallest pattern and is worked against" * (len(flagged) > 1)
        print(f"a backdoor to label {labels} is suspected{several}")
        return flagged[0].label
    lowest = min(searched, key=lambda found: found.index).label
    left = f"--force: label {lowest} is worked against" if force else "the model is left as it is"
    print(f"no backdoor was found: no label's pattern is far smaller than the others'; {left}")
    return lowest if force else None


def defend(opt, victim, split, target, watch, device, clock):
    """Make what the defense takes (its teacher, the inverted trigger), then the student.

    Returns:
        the student, its history, and the inverted trigger or None.
    """
    defense, taken = DEFENSES[opt.defense], DEFENSES[opt.defense].takes
    given = {"target": target, "plain": split.plain, "mirror": opt.augment == "crop_flip"}
    given["rng"] = generator(opt.seed, opt.defense)
    if "teacher" in taken and opt.positive == "backdoored":
        given["teacher"] = victim
    elif "teacher" in taken:
        with clock("finetune"):
            given["teacher"] = make_teacher(opt, victim, split, device)
    if "trigger" in taken:
        with clock("inversion"):
            given["trigger"] = make_trigger(opt, victim, split, target, device)
        print("inverted trigger: {0.pixels} pixels, L1 {0.l1:.1f}, hit rate {0.hit_rate:.1%}".format(given["trigger"]))
    with clock("purify"):
        given = {name: given[name] for name in taken}
        student, history = defense.defend(victim, split.training, device, watch=watch, **given, **settings_of(opt))
    return student, history, given.get("trigger")


def settings_of(opt):
    """The options of the chosen defense's own training."""
    return {name: getattr(opt, name) for name in (*config.DEFENSES[opt.defense], "precision") if name not in PREPARED}


def make_teacher(opt, victim, split, device):
    """The fine-tuned victim: f_F of MCL, which answers for mirror images too where the split is flipped, or NAD's."""
    defense = DEFENSES[opt.defense]
    shared = {name: value for name, value in settings_of(opt).items() if name in SHARED}
    if "mirror" in defense.takes:
        shared["mirror"] = opt.augment == "crop_flip"
    return defense.teach(victim, split.training, device, epochs=opt.finetune_epochs, lr=opt.finetune_lr, **shared)


def make_trigger(opt, victim, split, target, device):
    """The smallest pattern that makes the victim say `target`; where there is none, the run ends."""
    rng, budget = generator(opt.seed, "inversion"), (opt.inversion_rounds, opt.inversion_steps, opt.inversion_batches)
    trigger = invert_trigger(victim, split.plain, target, device, rng, *budget, opt.precision)
    if trigger is None:
        raise RunError(
            f"no pixel pattern turns {HIT_RATE:.0%} of the clean images into label {target}: it has no backdoor that a "
            f"pattern expresses, or --inversion_steps {opt.inversion_steps} is too few; nothing was purified"
        )
    return trigger
