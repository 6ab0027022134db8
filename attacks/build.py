"""Build an attack from the options of a run."""

from attacks.attack import TRIGGERS, Attack
from utils.errors import UserError
from utils.seed import generator


def build_attack(opt, num_class: int, size: tuple[int, int], surrogate=None) -> Attack:
    """The attack that the options describe; its tensors follow from --seed and the image size.

    Args:
        opt: the parsed options of train_badnet.py, or of main.py, which has no options for training images.
        size: (H, W) of the images.
        surrogate: the frozen clean model that trojanTrigger's patch is optimised on; other triggers ignore it.

    Raises:
        UserError: the options describe no valid attack, or a trojan patch is to be built without a surrogate.
    """
    spec = TRIGGERS[opt.trigger_type]
    if "surrogate" in spec.build_options and surrogate is None:
        raise UserError(
            f"{opt.trigger_type} has another patch in every victim, and this checkpoint states none; use one that "
            f"train_badnet.py wrote, or another --trigger_type"
        )
    build_options = {name: surrogate if name == "surrogate" else getattr(opt, name) for name in spec.build_options}
    tensors = spec.build(size, generator(opt.trigger_seed, opt.trigger_type), **build_options) if spec.build else {}

    def values(names):
        return {name: getattr(opt, name) for name in names if hasattr(opt, name)}

    rate, options, training = getattr(opt, "inject_portion", 0.0), values(spec.options), values(spec.training)
    return Attack(opt.trigger_type, opt.target_type, opt.target_label, num_class, rate, options, tensors, training)
