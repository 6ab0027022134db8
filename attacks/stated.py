"""The options of a run on a checkpoint that states some of them itself."""

from argparse import Namespace

from attacks.attack import TRIGGERS, Attack
from utils.checkpoint import runs_a_file
from utils.errors import UserError

ATTACK_OPTIONS = {"trigger_type", "target_type", "target_label"}.union(
    *({*spec.options, *spec.build_options} - {"surrogate"} for spec in TRIGGERS.values())
)


def options_as_used(opt: Namespace, explicit: set[str], checkpoint: dict) -> Namespace:
    """The options, with those that the checkpoint states replaced by its statements.

    The options of the attack are None if neither the checkpoint nor the user states one. An architecture whose code
    lies in a file has to be named by the user, since it is run.

    Raises:
        UserError: the user gave an option that the checkpoint states, or did not name such an architecture.
    """
    attack = None if checkpoint.get("attack") is None else Attack.from_state(checkpoint["attack"])
    needs_file = runs_a_file(checkpoint.get("arch", ""))
    if needs_file and "arch" not in explicit:
        raise UserError(f"{opt.model} needs code that is only run if you name it: --arch {checkpoint['arch']}")
    for name, stated, options in (
        ("arch", None if needs_file else checkpoint.get("arch"), {"arch"}),
        ("num_class", checkpoint.get("num_class"), {"num_class"}),
        ("normalization", checkpoint.get("normalization"), {"normalize"}),
        ("attack", attack and attack.describe(), ATTACK_OPTIONS),
    ):
        given = sorted(explicit & options)
        if given and stated is not None:
            raise UserError(f"{opt.model} states its {name}, {stated}; leave out --{given[0]}")
    given = sorted(explicit & ATTACK_OPTIONS)
    if given and "trigger_type" not in explicit:
        raise UserError(f"--{given[0]} applies only with --trigger_type, since {opt.model} states no attack")

    used = Namespace(**vars(opt))
    if "arch" not in explicit:
        used.arch = checkpoint.get("arch", checkpoint.get("recognised", opt.arch))
    if "num_class" in checkpoint:
        used.num_class, used.normalize = checkpoint["num_class"], checkpoint["normalization"]
    if attack is not None:
        stated = {"trigger_type": attack.trigger_type, "target_type": attack.target_type, "target_label": attack.target}
        vars(used).update({name: {**stated, **attack.trigger_options}.get(name) for name in ATTACK_OPTIONS})
    elif not given:
        vars(used).update(dict.fromkeys(ATTACK_OPTIONS))
    return used
