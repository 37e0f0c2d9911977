"""What a model's losses give away: membership inference, by a threshold or by shadow models, and distance to a retrained model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from scipy import stats
from sklearn import metrics
from torch import nn
from torch.utils.data import Subset

from ..annotations import AnyDataset


@dataclass
class MembershipInference:
    """How well a threshold on the loss tells samples trained on from samples never seen (arXiv 1709.01604).

    0.5 is what a model gives that treats both alike. What counts is a model retrained without the forget set: its
    forget samples are as new to it as others, and still may be easier or harder. An AUC far *below* the retrained
    model's is a leak as well: such losses tell that these samples were unlearned.

    Attributes:
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
    scores = -_finite(np.concatenate([member_losses, nonmember_losses]))
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

    Losses have shapes (n,) and (m,). 0 if they are the same, 1 if they do not overlap. Two models retrained with different seeds are not at 0 either.
    """
    return float(stats.ks_2samp(_finite(losses), _finite(reference_losses)).statistic)


def _finite(losses: np.ndarray) -> np.ndarray:
    """What is not finite counts as the largest."""
    return np.nan_to_num(losses, nan=np.finfo(float).max)


# ---- U-LiRA: an attacker who knows how each sample looks after being unlearned, and after never being seen ----


@dataclass
class ShadowLosses:
    """Losses of each candidate under shadow models, in nats, shape (shadows, n); NaN where the other array has one.

    Attributes:
        unlearned (`numpy.ndarray`): Of shadows that were trained on the candidate and then made to forget it.
        unseen (`numpy.ndarray`): Of shadows that never saw it, and were made to forget others.
    """

    unlearned: np.ndarray
    unseen: np.ndarray


def shadow_losses(
    model: nn.Module,
    candidates: AnyDataset,
    *,
    train: Callable[[nn.Module, object], nn.Module],
    unlearn: Callable[[nn.Module, object], nn.Module],
    losses: Callable[[nn.Module], np.ndarray],
    num_shadows: int = 16,
    lora_config: LoraConfig | None = None,
    seed: int = 0,
) -> ShadowLosses:
    """Trains shadow models, each on a random half of the candidates, and has each unlearn that half again.

    Args:
        model (`torch.nn.Module`): What shadows start from: the model before it was trained on the forget set.
        candidates (`datasets.Dataset` or `torch.utils.data.Dataset`): The forget set and samples like it that were never
            trained on.
        train (`Callable`): `train(shadow, half)` trains on the half, and on the retain set, and returns the model.
        unlearn (`Callable`): `unlearn(shadow, half)` is the method under test.
        losses (`Callable`): `losses(shadow)` gives those of all candidates, shape (n,), as [`per_sample_losses`] does.
        num_shadows (`int`): An even number: half of them drawn, and the other half their complements, so that each
            candidate is unlearned by as many shadows as never see it.
        lora_config (`peft.LoraConfig`, *optional*): Shadows train such an adapter in place of all parameters, which is
            cheaper, and weaker as far as an adapter memorises less.
        seed (`int`): Of the halves.

    Raises:
        ValueError: Fewer than 4 shadows, of which no variance can be taken, or an odd number.
    """
    if num_shadows < 4 or num_shadows % 2:
        raise ValueError(f"`num_shadows` must be even and at least 4, but is {num_shadows}.")
    generator = np.random.default_rng(seed)
    count = len(candidates)
    found = ShadowLosses(*(np.full((num_shadows, count), np.nan) for _ in range(2)))
    for number in range(num_shadows):
        if number % 2 == 0:
            chosen = np.zeros(count, dtype=bool)
            chosen[generator.permutation(count)[: count // 2]] = True
        else:
            chosen = ~chosen
        rows = np.flatnonzero(chosen).tolist()
        half = candidates.select(rows) if isinstance(candidates, Dataset) else Subset(candidates, rows)
        shadow = copy.deepcopy(model)
        if lora_config is not None:
            shadow = get_peft_model(shadow, lora_config)
        values = losses(unlearn(train(shadow, half), half))
        found.unlearned[number, chosen] = values[chosen]
        found.unseen[number, ~chosen] = values[~chosen]
    return found


def unlearning_lira(losses: np.ndarray, is_member: np.ndarray, shadows: ShadowLosses) -> MembershipInference:
    """U-LiRA (arXiv 2403.01218, algorithm 1): can one tell which candidates a model has unlearned?

    Each candidate's score is the log-likelihood ratio of its confidence `log(p / (1 - p))`, p = exp(-loss), under two
    normal distributions, of shadows that unlearned it and of shadows that never saw it. Take it of the retrained model
    too: 0.5 is what a perfect method gives, and chance with few candidates.

    Args:
        losses (`numpy.ndarray`): Shape (n,), of all candidates under the model in question, in nats.
        is_member (`numpy.ndarray`): Shape (n,), true for those in its forget set.
        shadows ([`ShadowLosses`]): Of the same candidates.
    """
    is_member = np.asarray(is_member, dtype=bool)
    scores = _log_likelihood(losses, shadows.unlearned) - _log_likelihood(losses, shadows.unseen)
    return membership_inference(-scores[is_member], -scores[~is_member])


def attack_shadows(shadows: ShadowLosses) -> list[MembershipInference]:
    """U-LiRA (arXiv 2403.01218) on each shadow in turn, by one who knows the others: of the method, not of one model it made.

    What is told apart is the half that the shadow has unlearned from the half it never saw. Its complement is left out
    with it. Otherwise each candidate would be known from one shadow fewer on the side that it is on, and look as if it
    were on the other. A method that hides everything would come out below 0.5.

    Args:
        shadows ([`ShadowLosses`]): As [`shadow_losses`] returns them, each shadow beside its complement; at least 6.

    Returns:
        One for each shadow. They share shadows, so that an interval over them is too narrow.

    Raises:
        ValueError: Fewer than 6 shadows, as without a pair no variance could be taken of the others, or an odd number.
    """
    number = len(shadows.unlearned)
    if number < 6 or number % 2:
        raise ValueError(
            f"`shadows` must hold pairs of shadow models, at least 6 to attack each by the others, but holds {number}."
        )
    found = []
    for attacked in range(number):
        pair = [attacked, attacked ^ 1]
        others = ShadowLosses(*(np.delete(losses, pair, axis=0) for losses in (shadows.unlearned, shadows.unseen)))
        unlearned, unseen = shadows.unlearned[attacked], shadows.unseen[attacked]
        is_member = ~np.isnan(unlearned)
        found.append(unlearning_lira(np.where(is_member, unlearned, unseen), is_member, others))
    return found


def _log_likelihood(losses: np.ndarray, shadows: np.ndarray) -> np.ndarray:
    confidences = _confidence(shadows)
    # a floor for the spread: few shadows may agree by chance
    spread = np.nanstd(confidences, axis=0, ddof=1)
    return stats.norm.logpdf(_confidence(losses), np.nanmean(confidences, axis=0), np.maximum(spread, 1e-3))


def _confidence(losses: np.ndarray) -> np.ndarray:
    losses = np.maximum(losses, 1e-12)
    return -losses - np.log(-np.expm1(-losses))
