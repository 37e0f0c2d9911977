"""What the study of recognisers that fail on speakers compares, and on whom."""

from dataclasses import dataclass, field

from speech_data import GROUPS, SPEAKERS


@dataclass(frozen=True)
class Kind:
    """What requests of a kind are like.

    Attributes:
        speakers (`int`): Named by each.
        seconds (`int`): Of the longest utterances.
        requests (`int`): How many there are, one for each seed.
        steps (`int`): The most of a run.
        level (`float`): Nats per token, at which runs are compared by loss.
        why (`str`): When that level was set.
        watched (`int`): Utterances of the test set that are evaluated while unlearning; of short ones half of all.
    """

    speakers: int
    seconds: int
    requests: int
    steps: int
    level: float
    why: str
    watched: int


_AFTER = "that was set after the first two requests: no run reached the 4 of before"
KINDS = {
    "speakers": Kind(speakers=4, seconds=13, requests=GROUPS, steps=40, level=1.0, why=_AFTER, watched=12),
    "speaker": Kind(
        speakers=1,
        seconds=8,
        requests=len(SPEAKERS),
        steps=60,
        level=4.0,
        why="that was set before any run",
        watched=27,
    ),
}
WRONG = 0.9  # the share of the forgotten utterances' words at which a run ends
WATCHED = 12  # utterances of the forget set that are evaluated while unlearning
KL = {"retain_loss": "kl"}
WIDE = {"per_device_train_batch_size": 32}
MANY = KL | WIDE  # all rows of seven utterances, four of each

RATE = 3e-5
# at a third of the rate the steps between two evaluations, and the most steps, are three times as many
SLOW = {"max_steps": 120, "eval_steps": 6}


@dataclass(frozen=True)
class Variant:
    """A way to make the recogniser fail.

    Attributes:
        method, rate, extra: As [`unlearn`] takes them.
        varied (`bool`): Whether the retain utterances are varied.
        parts (`int`): Rows of each retain utterance, held to one part of its tokens each.
        encoder_alone (`bool`): Whether the decoder stays as it is.
        lower_alone (`bool`): Whether the upper half of the encoder's layers stays, too.
        refuses (`bool`): Whether another answer is taught in place of ascending.
    """

    method: str
    rate: float = RATE
    extra: dict = field(default_factory=dict)
    varied: bool = False
    parts: int = 1
    encoder_alone: bool = False
    lower_alone: bool = False
    refuses: bool = False


VARIANTS = {
    "NPO": Variant("npo"),
    "OrthoGrad + NPO": Variant("orthograd_npo"),
    "NPO, kl": Variant("npo", extra=KL),
    "OrthoGrad + NPO, kl": Variant("orthograd_npo", extra=KL),
    "NPO, kl, varied": Variant("npo", extra=KL, varied=True),
    "OrthoGrad + NPO, kl, varied": Variant("orthograd_npo", extra=KL, varied=True),
    "NPO, kl, rate 1e-5": Variant("npo", 1e-5, KL | SLOW),
    "OrthoGrad + NPO, kl, rate 1e-5": Variant("orthograd_npo", 1e-5, KL | SLOW),
    "NPO, kl, encoder alone": Variant("npo", extra=KL, encoder_alone=True),
    "OrthoGrad + NPO, kl, encoder alone": Variant("orthograd_npo", extra=KL, encoder_alone=True),
    "refusal, kl": Variant("npo", extra=KL, refuses=True),
    "OrthoGrad, refusal, kl": Variant("orthograd_npo", extra=KL, refuses=True),
    "refusal, kl, encoder alone": Variant("npo", extra=KL, encoder_alone=True, refuses=True),
    "OrthoGrad, refusal, kl, encoder alone": Variant("orthograd_npo", extra=KL, encoder_alone=True, refuses=True),
    "NPO, kl, lower encoder": Variant("npo", extra=KL, lower_alone=True),
    "OrthoGrad + NPO, kl, lower encoder": Variant("orthograd_npo", extra=KL, lower_alone=True),
    "refusal, kl, lower encoder": Variant("npo", extra=KL, lower_alone=True, refuses=True),
    "OrthoGrad, refusal, kl, lower encoder": Variant("orthograd_npo", extra=KL, lower_alone=True, refuses=True),
    "OrthoGrad, refusal, kl, lower encoder, four parts": Variant(
        "orthograd_npo", extra=MANY, parts=4, lower_alone=True, refuses=True
    ),
}
DEFAULT, REFUSING = "OrthoGrad + NPO, kl", "OrthoGrad, refusal, kl, lower encoder"
SHARES = {"0.05": {}, "1": WIDE}
