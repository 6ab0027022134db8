"""The re-tuning attack: does a purified model relearn its backdoor from a few images? (Min et al., NeurIPS 2024)

The attacker fine-tunes the model on clean images and K poisoned ones. Any model learns some triggers that way, so the
result counts as the excess over a clean model that was re-tuned with the same images.
"""

import statistics

from utils.seed import seeded
from utils.training import finetune

CLEAN_IMAGES, BATCH_SIZE, DRAWS = 2_500, 64, 3
SGD = {"epochs": 5, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "schedule": "constant", "precision": "fp32"}


def retune(model, batches, device):
    """A copy of the model, fine-tuned on batches of clean and poisoned images; in eval mode.

    The generator of the batches is set back, so that every model is re-tuned on the same batches.
    """
    state = batches.rng.get_state()
    with seeded(batches.rng.initial_seed()):
        student, _ = finetune(model, batches, device, title="", **SGD)
    batches.rng.set_state(state)
    return student


def retuned_metrics(model, batches_by_count: dict[int, list], measure, device) -> dict[str, dict]:
    """Re-tune the model with each number of poisoned images, once per draw of the images.

    Args:
        batches_by_count: K -> the batches of each draw.
        measure: model -> its metrics in percent, "acc", "asr" and "ra" among them.

    Returns:
        K as a string -> the means of "acc", "asr" and "ra" over the draws, and "sd", their standard deviations.
    """
    result = {}
    for count, draws in batches_by_count.items():
        measured = [measure(retune(model, batches, device)) for batches in draws]
        values = {name: [metrics[name] for metrics in measured] for name in ("acc", "asr", "ra")}
        result[str(count)] = {name: statistics.mean(numbers) for name, numbers in values.items()}
        result[str(count)]["sd"] = {name: statistics.stdev(numbers) for name, numbers in values.items()}
    return result
