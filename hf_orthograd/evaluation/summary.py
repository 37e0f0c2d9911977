"""Numbers that sum up a run. Each hides something: read them beside what they are made of."""

from collections.abc import Mapping


def tug_of_war(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Tug of war (arXiv 2406.01257): `(1 - |gap_forget|) (1 - |gap_retain|) (1 - |gap_test|)`; 1 is best.

    A gap is the difference to the retrained model, in [0, 1]; rates above 1 count as 1.

    Args:
        unlearned, retrained (`Mapping[str, float]`): A rate in [0, 1], accuracy or error, on "forget", "retain", "test".
    """
    product = 1.0
    for name in ("forget", "retain", "test"):
        product *= 1 - abs(min(unlearned[name], 1.0) - min(retrained[name], 1.0))
    return product


def unlearning_impact_score(original_test: float, test: float, forget: float, *, erased: bool) -> float:
    """UIS (arXiv 2503.02312); lower is better.

    With O and T the test accuracy of the original and of the unlearned model, and F the accuracy on the forget set:
    `(|O - T| / O + |O - F| / O) / 2` where forgotten samples are to be as unseen ones are, and
    `(|O - T| / O + F / O) / 2` where they are to be got wrong.

    Args:
        original_test, test, forget (`float`): O, T and F; for an error rate, 1 minus the rate.
        erased (`bool`): Whether the second form is meant.

    Raises:
        ValueError: O is 0.
    """
    if original_test <= 0:
        raise ValueError(
            f"`original_test` must be positive, but is {original_test}: the original model knows nothing."
        )
    missed = forget if erased else abs(original_test - forget)
    return (abs(original_test - test) / original_test + missed / original_test) / 2


def average_gap(unlearned: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """The mean absolute difference to the retrained model over the quantities both have; 0 is best.

    As in the tables of SalUn (arXiv 2310.12508), which average it over accuracy on the forget set, the retain set, the
    test set and membership inference.

    Raises:
        ValueError: They have no quantity in common.
    """
    shared = [name for name in unlearned if name in retrained]
    if not shared:
        raise ValueError(
            f"`unlearned` has {sorted(unlearned)} and `retrained` {sorted(retrained)}: nothing in common."
        )
    return sum(abs(unlearned[name] - retrained[name]) for name in shared) / len(shared)
