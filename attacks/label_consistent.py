"""The label-consistent attack: noise hides an image's class, so that the trigger is learned (Turner et al., 2019)."""

import torch
import torch.nn.functional as F

from utils.progress import progress_bar

STEPS = 100
STEP_SIZE = 1.5  # in grey levels of 0..255
BATCH_SIZE = 250


def adversarial_noise(images: torch.Tensor, labels: torch.Tensor, surrogate, epsilon: int) -> torch.Tensor:
    """Add untargeted PGD noise, which raises the loss of the true labels (Madry et al., ICLR 2018).

    Args:
        images: (B, H, W, 3) uint8.
        labels: (B,) true labels.
        surrogate: a frozen model in eval mode, (B, 3, H, W) in [0, 1] -> logits, on any device.
        epsilon: L-infinity bound in grey levels of 0..255.

    Returns:
        (B, H, W, 3) uint8 on the device of `images`.
    """
    device = next(surrogate.parameters()).device
    perturbed = torch.empty_like(images)
    with progress_bar("PGD", len(images), "image") as bar:
        for start in range(0, len(images), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            clean = images[batch].to(device).permute(0, 3, 1, 2).float()
            pixels = _pgd(clean, labels[batch].to(device), surrogate, epsilon)
            perturbed[batch] = pixels.round().permute(0, 2, 3, 1).to(images.device, torch.uint8)
            bar.update(len(clean))
    return perturbed


def _pgd(clean, labels, surrogate, epsilon):
    lowest, highest = (clean - epsilon).clamp_(min=0), (clean + epsilon).clamp_(max=255)
    pixels = clean.clone()
    for _ in range(STEPS):
        pixels.requires_grad_()
        loss = F.cross_entropy(surrogate(pixels / 255), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, pixels)
        pixels = (pixels.detach() + STEP_SIZE * gradient.sign()).clamp(lowest, highest)
    return pixels
