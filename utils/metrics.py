"""Predictions, and the metrics on top of them. Every figure states its denominator and is in percent, 0..100."""

import torch


@torch.inference_mode()
def predict(model, batches) -> torch.Tensor:
    """The predicted label of every image, (N,) int64 on the CPU, in the order of `batches` ((images, ...) tuples)."""
    model.eval()
    predicted = []
    for images, *_ in batches:
        predicted.append(model(images).argmax(1))
    return torch.cat(predicted).cpu()


def percent(mask: torch.Tensor) -> float:
    """The share of True in a (N,) mask, in percent; an empty mask has none (nan)."""
    return 100.0 * mask.double().mean().item()


def accuracy_figures(clean: torch.Tensor, triggered: torch.Tensor, labels: torch.Tensor, attack) -> dict:
    """The metrics of the backdoor literature (NAD, MCL) for one model.

    Args:
        clean: (N,) predictions on the clean test images.
        triggered: (M,) predictions on the triggered ones, in the same order, where `attack.counts(labels)`.
        labels: (N,) true labels.
        attack: says which images count and which label the attacker wants.

    Returns:
        acc: share of all N clean images that are right.
        acc_published: the same over the images whose label is not the target (MCL's table; all images for all2all).
        asr: share of the M triggered images predicted as the attacker wants.
        ra: share of the M triggered images predicted as their true label (recovery accuracy).
        floor: share of the same M images, clean, predicted as the attacker wants: the ASR of a model with no backdoor.
        per_class: accuracy of each class, list of K.
    """
    counted = attack.counts(labels)
    true, wanted = labels[counted], attack.wanted(labels)[counted]
    right = clean == labels
    return {
        "acc": percent(right),
        "acc_published": percent(right[counted]),
        "asr": percent(triggered == wanted),
        "ra": percent(triggered == true),
        "floor": percent(clean[counted] == wanted),
        "per_class": [percent(right[labels == label]) for label in range(attack.num_class)],
    }


def evaluate(model, test, attack) -> dict:
    """Predict `test` (its .clean and .triggered batches, its .labels) and return `accuracy_figures`."""
    clean = predict(model, test.clean)
    triggered = predict(model, test.triggered)
    return accuracy_figures(clean, triggered, test.labels, attack)


def watcher(test, attack, every, log=None):
    """A function of (model, epoch) that measures every so many epochs (0: never), for the history of a training.

    `log`, a function of (figures, epoch), is told each time.
    """

    def watch(model, epoch):
        if every == 0 or epoch % every:
            return {}
        figures = evaluate(model, test, attack)
        seen = {name: figures[name] for name in ("acc", "acc_published", "asr", "ra")}
        if log:
            log(seen, epoch)
        return seen

    return watch
