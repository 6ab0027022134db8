"""TrojanNN: a patch that excites chosen neurons of a clean model (Liu et al., NDSS 2018)."""

import torch

from attacks.triggers import check_room
from utils.report import progress_bar

NEURONS = 2
STARTS = 16  # random patches side by side: a neuron that a patch leaves at zero gives it no gradient
STEPS = 200
STEP_SIZE = 0.05  # of Adam, for pixels in [0, 1]


def trojan_patch(size: tuple[int, int], rng: torch.Generator, surrogate, trig_w: int, trig_h: int) -> dict:
    """Optimise a patch, where patch_trigger puts it on a grey image: {"patch": (trig_h, trig_w, 3) uint8}.

    The neurons are those of the last feature layer with the largest sum of absolute weights, as the paper picks them;
    needing no image, it attacks a model whose training data is not at hand.

    Args:
        size: height and width of the images.
        surrogate: a frozen clean model in eval mode, with `features((B, 3, H, W) in [0, 1]) -> (B, D)` and the linear
            layer `head` after them.

    Raises:
        UserError: the patch does not fit on images of this size.
    """
    check_room(size, trig_h + 1, trig_w + 1)
    weight = surrogate.head.weight.detach()
    neurons = weight.abs().sum(0).topk(NEURONS).indices
    patches = torch.rand(STARTS, 3, trig_h, trig_w, generator=rng).to(weight.device).requires_grad_()
    optimizer = torch.optim.Adam([patches], STEP_SIZE)

    def excitement(patches):
        pictures = torch.full((STARTS, 3, *size), 0.5, device=weight.device)
        pictures[:, :, -1 - trig_h : -1, -1 - trig_w : -1] = patches
        return surrogate.features(pictures)[:, neurons].sum(1)

    with progress_bar("trojan", STEPS, "step") as bar:
        for _ in range(STEPS):
            (gradient,) = torch.autograd.grad(-excitement(patches).sum(), patches)
            patches.grad = gradient
            optimizer.step()
            with torch.no_grad():
                patches.clamp_(0, 1)
            bar.update()
    with torch.no_grad():
        pixels = (patches * 255).round()
        best = pixels[excitement(pixels / 255).argmax()]
    return {"patch": best.permute(1, 2, 0).to("cpu", torch.uint8).contiguous()}
