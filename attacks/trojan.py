"""TrojanNN: a patch that excites chosen neurons of a clean model (Liu et al., NDSS 2018)."""

import torch

from attacks.triggers import check_patch_fits
from utils.progress import progress_bar

NEURONS = 2
CANDIDATES = 16  # random patches, optimised in parallel: one that leaves a neuron at zero gets no gradient from it
STEPS = 200
STEP_SIZE = 0.05  # of Adam, for pixels in [0, 1]


def trojan_patch(size: tuple[int, int], rng: torch.Generator, surrogate, trig_w: int, trig_h: int) -> dict:
    """Optimise a patch on a grey image, in patch_trigger's place: {"patch": (trig_h, trig_w, 3) uint8}.

    The neurons are those of the last feature layer with the largest sum of absolute weights to the logits (the paper's:
    from the layer before). No image of the training data is needed.

    Args:
        size: (H, W) of the images.
        surrogate: a frozen clean model in eval mode, with `features((B, 3, H, W) in [0, 1]) -> (B, D)` and the linear
            layer `head` after them.

    Raises:
        UserError: the patch does not fit images of this size.
    """
    check_patch_fits(size, trig_h + 1, trig_w + 1)
    weight = surrogate.head.weight.detach()
    neurons = weight.abs().sum(0).topk(NEURONS).indices
    patches = torch.rand(CANDIDATES, 3, trig_h, trig_w, generator=rng).to(weight.device).requires_grad_()
    optimizer = torch.optim.Adam([patches], STEP_SIZE)

    def activation(patches):
        images = torch.full((CANDIDATES, 3, *size), 0.5, device=weight.device)
        images[:, :, -1 - trig_h : -1, -1 - trig_w : -1] = patches
        return surrogate.features(images)[:, neurons].sum(1)

    with progress_bar("trojan", STEPS, "step") as bar:
        for _ in range(STEPS):
            (gradient,) = torch.autograd.grad(-activation(patches).sum(), patches)
            patches.grad = gradient
            optimizer.step()
            with torch.no_grad():
                patches.clamp_(0, 1)
            bar.update()
    with torch.no_grad():
        pixels = (patches * 255).round()
        best = pixels[activation(pixels / 255).argmax()]
    return {"patch": best.permute(1, 2, 0).to("cpu", torch.uint8).contiguous()}
