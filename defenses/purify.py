"""purify, the Python entry point, and the steps that it shares with main.py."""

import copy
from numbers import Integral
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import config
from defenses import fst, ft, ftsam, ibau, mcl, nad, nc, pam
from defenses.base import DefenseContext, DefenseResult
from defenses.inversion import ANY_OTHER, InvertedTrigger, LabelScore, choose_label, invert_suspects, search_target
from models.selector import Classifier
from utils.batches import Batches, TensorImages, defender_batches
from utils.device import pick_device
from utils.errors import RunError, UserError, did_you_mean
from utils.metrics import percent, predict
from utils.progress import Stopwatch
from utils.seed import generator, seeded

# A new defense is a file in this folder, an entry here, and a recipe in config.DEFENSES.
DEFENSE_FUNCTIONS = {
    "mcl": mcl.defend,
    "ft": ft.defend,
    "nad": nad.defend,
    "ibau": ibau.defend,
    "nc": nc.defend,
    "ftsam": ftsam.defend,
    "fst": fst.defend,
    "pam": pam.defend,
}
# Options that are used before a defense starts: those of the target search and of the batches.
SETUP_OPTIONS = {"target", "force", "verify", "batch_size", "augment"}
# Least momentum of batch normalisation. A defense has some hundred steps: with the 0.01 of MobileNets, the statistics
# would need all of them.
MIN_MOMENTUM = 0.1


class PurifyResult(NamedTuple):
    """The result of purify.

    model: the purified copy of the model, in eval mode; None if the search found no backdoor or if the inverted
        trigger still works.
    target: the label that was defended against; None if there was none, -1 for any other label.
    search: the LabelScores of the target search, of at most ten labels and of -1; None without a search.
    trigger: the inverted trigger, or None.
    purified: whether the inverted trigger lost its hold on the clean images; None if none was inverted.
    accuracy: percentages of the clean images predicted as their labels, "before" and "after": the defense was trained
        on them, so that a fall is a bad sign; None if no backdoor was found.
    history: one dict per epoch.
    """

    model: nn.Module | None
    target: int | None
    search: list[LabelScore] | None
    trigger: InvertedTrigger | None
    purified: bool | None
    accuracy: dict[str, float] | None
    history: list[dict]


@torch.inference_mode(False)
@torch.enable_grad()
def purify(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    defense: str = "mcl",
    target: int | str = "auto",
    seed: int = 1,
    device: str = "auto",
    mirrored: bool = True,
    **options,
) -> PurifyResult:
    """Remove a backdoor from an image classifier, given some clean images.

    Args:
        model: (B, 3, H, W) images in [0, 1] -> (B, K) logits, with a last linear layer; it is not modified.
        images: (N, 3, H, W) float in [0, 1], or (N, H, W, 3) uint8.
        labels: (N,) integers, 0..K - 1.
        defense: a name in config.DEFENSES.
        target: the label to defend against, "any", or "auto" to search for it.
        seed: of every draw.
        device: "auto", "cpu" or "cuda". On a CPU, torch.set_flush_denormal stays on afterwards; on CUDA, TF32 is off.
        mirrored: whether mirror images have the labels of their originals.
        options: of the defense, as in config.DEFENSES.

    Raises:
        UserError: the model, the images, the labels or the options do not fit; nothing has been trained.
        RunError: the training failed, or no pattern turns the images into the target label.
    """
    recipe, device = _recipe(defense, target, seed, options), pick_device(device)
    try:
        data = _checked(torch.as_tensor(images), torch.as_tensor(labels))
    except (TypeError, ValueError) as error:
        raise UserError(f"images and labels must be tensors or arrays: {error}") from None
    try:
        victim = Classifier(copy.deepcopy(model)).to(device)
    except Exception as error:  # noqa: BLE001 - the code of others can raise anything
        raise UserError(f"the model cannot be copied: {error}; run it once under torch.no_grad() before") from None
    num_class = victim.find_head(type(model).__name__, None, tuple(data.images.shape[1:3]))
    victim.eval().requires_grad_(False)
    if num_class == 1:
        raise UserError("the model has one logit, but a classifier needs one for each of its labels")
    if int(data.labels.max()) >= num_class:
        raise UserError(f"label {int(data.labels.max())} is not one of the model's labels 0..{num_class - 1}")
    augment = recipe["augment"] == "crop_flip"
    train, plain, search = defender_batches(data, recipe["batch_size"], augment, mirrored, seed, device)
    scores, target = None, recipe.get("target")
    if not (target in (None, "auto", "any") or (isinstance(target, Integral) and ANY_OTHER <= target < num_class)):
        raise UserError(f"target must be 'auto', 'any' or a label from 0 to {num_class - 1}, not {target!r}")
    if target == "auto":
        target, scores, _ = find_target(victim, search, num_class, device, seed, recipe)
        if target is None:
            return PurifyResult(None, None, scores, None, None, None, [])
    target = ANY_OTHER if target == "any" else target
    if target is not None and (data.labels == target).all():
        raise UserError(f"all images are of label {target}, but only those of other labels can show its trigger")
    context = DefenseContext(
        victim, train, plain, augment, len(data), device, seed, Stopwatch(), target, mirrored=mirrored
    )
    student, history, triggers = remove_backdoors(defense, context, recipe, search, num_class)
    batches = Batches(data, 125, device)
    purified = is_purified(student, victim, triggers, batches)
    models = {"before": victim, "after": student}
    accuracy = {name: percent(predict(classifier, batches) == data.labels) for name, classifier in models.items()}
    model = getattr(model, "_orig_mod", model)  # a compiled one is a module around it
    for trained, own in zip(student.network.parameters(), model.parameters(), strict=True):
        trained.requires_grad_(own.requires_grad)
    for trained, own in zip(student.network.modules(), model.modules(), strict=True):
        if isinstance(own, _BatchNorm):
            trained.momentum = own.momentum
    model, trigger = None if purified is False else student.network, triggers.get(target)
    return PurifyResult(model, target, scores, trigger, purified, accuracy, history)


def is_purified(student, victim, triggers: dict, batches) -> bool | None:
    """Whether no inverted trigger (label -> trigger) works on clean images any more; None if there is none."""
    works = [trigger.still_works(student, victim, batches, label) for label, trigger in triggers.items()]
    return not any(works) if works else None


def find_target(victim, batches, num_class, device, seed, options: dict, precision="fp32"):
    """Search for the target label: the label or None, the scores, and the reason in a sentence.

    Args:
        options: of the defense: "force" and the budget of the inversion.
    """
    scores = search_target(victim, batches, num_class, device, generator(seed, "search"), precision=precision)
    if not any(score.flagged or score.weak_floor for score in scores):
        budget = (options[f"inversion_{name}"] for name in ("rounds", "steps", "batches"))
        scores = invert_suspects(victim, batches, scores, device, generator(seed, "suspects"), *budget, precision)
    label, reason = choose_label(scores, options["force"])
    return label, scores, reason


def remove_backdoors(name: str, context: DefenseContext, options: dict, search_batches, num_class, precision="fp32"):
    """Run a defense; with the option verify, search its student and run it again for each further label that it flags.

    Returns:
        the student, the history of all runs, and label -> inverted trigger, if the defense has one.
    """
    student, history, triggers = None, [], {}
    while True:
        try:
            student, rows, trigger = run_defense(name, context, options, precision)
        except RunError as error:
            if student is None:
                raise
            print(f"the further backdoor was not removed: {error}")
            return student, history, triggers
        history += [{**row, "epoch": row["epoch"] + len(history)} for row in rows]
        triggers |= {} if trigger is None else {context.target: trigger}
        if not options.get("verify"):
            return student, history, triggers
        victim = copy.deepcopy(student).requires_grad_(False)
        settings = num_class, context.device, context.seed, {**options, "force": False}, precision
        target, _, reason = context.clock("detect")(find_target)(victim, search_batches, *settings)
        print(f"the purified model: {reason}")
        if target is None or target in triggers:
            return student, history, triggers
        context = context._replace(victim=victim, target=target)


def run_defense(name: str, context: DefenseContext, options: dict, precision: str = "fp32") -> DefenseResult:
    """Run a defense with its options, after raising the victim's batch-norm momentum to MIN_MOMENTUM, in place."""
    settings = {option: options[option] for option in config.DEFENSES[name] if option not in SETUP_OPTIONS}
    for module in context.victim.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, MIN_MOMENTUM)
    with seeded(context.seed):
        return DEFENSE_FUNCTIONS[name](context, precision=precision, **settings)


def _recipe(defense, target, seed, options):
    if not isinstance(defense, str) or defense not in config.DEFENSES:
        raise UserError(f"no defense named {defense!r}{did_you_mean(str(defense), config.DEFENSES)}")
    recipe = dict(config.DEFENSES[defense])
    for name in options:
        if name not in recipe:
            raise UserError(f"{defense} has no option {name!r}{did_you_mean(name, recipe)}")
    recipe |= options | ({"target": target} if "target" in recipe else {})
    if "target" in recipe and target is None:
        raise UserError(f"{defense} needs a target: 'auto', 'any' or a label")
    if "target" not in recipe and target not in (None, "auto"):
        raise UserError(f"{defense} defends against every label, and takes no target")
    flags = {"force", "verify"} & {name for name, value in options.items() if isinstance(value, bool)}
    words = [f"--{name}={value}" for name, value in options.items() if name not in flags]
    parsed, _ = config.parse("main.py", ["--defense", defense, f"--seed={seed}", *words])  # checks choices and ranges
    return recipe | {name: getattr(parsed, name) for name in options if name not in flags}


def _checked(images, labels):
    """The images as (N, H, W, 3) uint8 and their labels, in a TensorImages."""
    if images.dim() != 4 or labels.dim() != 1 or len(images) != len(labels) or not len(images):
        shapes = f"{tuple(images.shape)} and {tuple(labels.shape)}"
        raise UserError(f"images and labels must have shapes (N, 3, H, W) or (N, H, W, 3), and (N,), not {shapes}")
    if labels.is_floating_point() or labels.is_complex() or int(labels.long().min()) < 0:
        raise UserError("labels must be integers from 0 on")
    if images.dtype != torch.uint8 or images.shape[3] != 3:
        is_float = images.is_floating_point() and images.shape[1] == 3 and images.numel() > 0
        if not (is_float and 0 <= images.min() and images.max() <= 1):  # nan is not
            raise UserError("images must be (N, 3, H, W) floats in [0, 1], not normalised, or (N, H, W, 3) uint8")
        images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return TensorImages(images.cpu(), labels.long().cpu())
