"""Predictions and the metrics computed from them, all in percent, 0..100."""

import torch


@torch.inference_mode()
def predict(model, batches) -> torch.Tensor:
    """Predicted labels, (N,) int64 on the CPU, for `batches` of (images, ...); leaves the model in eval mode."""
    model.eval()
    predicted = [model(images).argmax(1) for images, *_ in batches]
    return torch.cat(predicted).cpu() if predicted else torch.zeros(0, dtype=torch.int64)


def percent(mask: torch.Tensor) -> float:
    """The percentage of True in a (N,) mask; nan for an empty one."""
    return 100.0 * mask.double().mean().item()


def compute_metrics(clean: torch.Tensor, triggered: torch.Tensor, labels: torch.Tensor, attack) -> dict:
    """The metrics of the backdoor literature (NAD, MCL) for one model.

    Args:
        clean: (N,) predictions on the clean test images.
        triggered: (M,) predictions on the triggered images, in the same order: those with `attack.attackable(labels)`.
        labels: (N,) true labels.
        attack: gives the attackable images and their attack labels.

    Returns:
        acc: accuracy on all N clean images.
        acc_published: accuracy on the clean images outside the target class (MCL's table; all images for all2all).
        asr: percentage of the M triggered images predicted as their attack label.
        ra: percentage of the M triggered images predicted as their true label (recovery accuracy).
        floor: percentage of the same M images predicted as their attack label without the trigger: the ASR if the
            trigger had no effect.
        per_class: accuracy on the clean images of each class, list of K.
    """
    attackable = attack.attackable(labels)
    true_labels, attack_labels = labels[attackable], attack.attack_labels(labels)[attackable]
    correct = clean == labels
    return {
        "acc": percent(correct),
        "acc_published": percent(correct[attackable]),
        "asr": percent(triggered == attack_labels),
        "ra": percent(triggered == true_labels),
        "floor": percent(clean[attackable] == attack_labels),
        "per_class": [percent(correct[labels == label]) for label in range(attack.num_class)],
    }


def evaluate(model, eval_set, attack) -> dict:
    """`compute_metrics` on eval_set: its .clean and .triggered batches and its .labels."""
    clean = predict(model, eval_set.clean)
    triggered = predict(model, eval_set.triggered)
    return compute_metrics(clean, triggered, eval_set.labels, attack)


def make_monitor(eval_set, attack, every, log=None):
    """A function (model, epoch) -> metrics for a training's history, measured every `every` epochs (0: never).

    In other epochs the function returns {}. `log`, if given, is called with (metrics, epoch).
    """

    def monitor(model, epoch):
        if every == 0 or epoch % every:
            return {}
        metrics = evaluate(model, eval_set, attack)
        metrics = {name: metrics[name] for name in ("acc", "acc_published", "asr", "ra")}
        if log:
            log(metrics, epoch)
        return metrics

    return monitor
