"""What a model's losses give away: membership inference, and how far they are from a retrained model's."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn import metrics


@dataclass
class MembershipInference:
    """How well a threshold on the loss tells samples trained on from samples never seen (arXiv 1709.01604).

    0.5 is what a model gives that treats both alike, but what counts is a model retrained without the forget set: its
    forget samples are as new to it as others, and still may be easier or harder. An AUC far *below* the retrained
    model's is a leak as well: such losses tell that these samples were unlearned.

    Parameters:
        auc (`float`): Area under the ROC curve, of the score "minus the loss".
        tpr_at_1_percent_fpr (`float`): Members found where one in a hundred others is taken for one. Steps of
            1 / `num_nonmembers` cannot resolve a percent if that is below 100.
        num_members, num_nonmembers (`int`): Samples, or groups, that were told apart.
    """

    auc: float
    tpr_at_1_percent_fpr: float
    num_members: int
    num_nonmembers: int


def membership_inference(
    member_losses: np.ndarray,
    nonmember_losses: np.ndarray,
    *,
    member_groups: Sequence | None = None,
    nonmember_groups: Sequence | None = None,
) -> MembershipInference:
    """Loss-threshold membership inference.

    Args:
        member_losses, nonmember_losses (`numpy.ndarray`): Shapes (n,) and (m,), in nats: of samples that the original
            model was trained on, and of samples like them that it never saw.
        member_groups, nonmember_groups (`Sequence`, *optional*): The group of each sample, as its speaker: what is told
            apart is then groups, by their mean loss.

    Raises:
        ValueError: One side is empty, or only one side has groups.
    """
    if (member_groups is None) != (nonmember_groups is None):
        raise ValueError("Pass both `member_groups` and `nonmember_groups`, or neither.")
    if member_groups is not None:
        member_losses = _mean_by_group(member_losses, member_groups)
        nonmember_losses = _mean_by_group(nonmember_losses, nonmember_groups)
    if not len(member_losses) or not len(nonmember_losses):
        raise ValueError(
            f"Membership inference needs samples on both sides, but got {len(member_losses)} members and "
            f"{len(nonmember_losses)} others."
        )
    truth = np.repeat([1, 0], [len(member_losses), len(nonmember_losses)])
    scores = -np.concatenate([member_losses, nonmember_losses])
    false_positives, true_positives, _ = metrics.roc_curve(truth, scores, drop_intermediate=False)
    return MembershipInference(
        auc=float(metrics.roc_auc_score(truth, scores)),
        tpr_at_1_percent_fpr=float(true_positives[false_positives <= 0.01].max()),
        num_members=len(member_losses),
        num_nonmembers=len(nonmember_losses),
    )


def _mean_by_group(losses: np.ndarray, groups: Sequence) -> np.ndarray:
    keys = np.array([str(group) for group in groups])
    return np.array([losses[keys == key].mean() for key in np.unique(keys)])


def loss_distance(losses: np.ndarray, reference_losses: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of two models' per-sample losses: the largest difference of their distributions.

    0 if they are the same, 1 if they do not overlap. Two models retrained with different seeds are not at 0 either.
    """
    return float(stats.ks_2samp(losses, reference_losses).statistic)
