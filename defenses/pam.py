"""Path-Aware Minimization (PAM, Min et al., NeurIPS 2024, arXiv 2410.09838): unlearning that is made to last.

A purified model relearns its backdoor because it is still close to the victim. So each step takes the gradient of the
unlearning loss at a point between the student and the victim, until the backdoor is gone on the way there as well. The
paper reverses triggers with another method; here the inverted trigger is MCL's, as in defenses.nc.
"""

import torch
from torch.nn.utils import get_total_norm

from defenses.base import DefenseContext, DefenseResult
from defenses.ftsam import step_at_offsets
from defenses.nc import unlearn


def path_offsets(weights: list[torch.Tensor], victim_weights: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """rho D / ||D||, D = w_victim - w: the way to the victim, of length rho; all of it where the victim is nearer."""
    differences = [victim - weight for weight, victim in zip(weights, victim_weights, strict=True)]
    distance = get_total_norm(differences)
    return [difference * (rho / distance.clamp(min=rho)) for difference in differences]


def defend(context: DefenseContext, *, rho, **options) -> DefenseResult:
    """`defenses.nc.unlearn` with gradients taken at the distance rho from the student towards the victim.

    Args:
        rho: that distance, the L2 norm over all weights; above 0.
        options: of the inversion and of the training, as for defenses.nc, whose errors are the same.
    """

    def make_update(student):
        pairs = zip(student.parameters(), context.victim.parameters(), strict=True)
        weights, victim_weights = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)

        def update(optimizer, loss_of):
            with torch.no_grad():
                loss_of()  # batch norm's statistics are those of the student's own weights
                offsets = path_offsets(weights, victim_weights, rho)
            return step_at_offsets(student, offsets, optimizer, loss_of)

        return update

    return unlearn(context, title="pam", make_update=make_update, **options)
