"""The loss of each sample of a batch, and what is ascended on the forget set.

Models of transformers return one loss, the mean over all unmasked tokens of the batch. Here each sample has its own: the
mean over its tokens. The retain mean is the mean over samples, which differs from the mean over tokens where lengths
differ: every sample counts the same, however long.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto


# maps (model, inputs) to the losses of the batch's samples, shape (B,)
PerSampleLosses = Callable[[nn.Module, Mapping], Tensor]

FORGET_LOSSES = ("ascent", "npo", "simnpo")
RETAIN_LOSSES = ("nll", "kl")
IGNORED_LABEL = -100


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, the mean over its tokens, in nats.

    Args:
        logits (`torch.Tensor`): Shape (B, T, V).
        labels (`torch.Tensor`): Shape (B, T); positions at -100 do not count.

    Returns:
        `torch.Tensor` of shape (B,), float32.
    """
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels.to(logits.device), reduction="none", ignore_index=IGNORED_LABEL
    )
    return losses.sum(dim=1) / (labels != IGNORED_LABEL).sum(dim=1)


def causal_token_losses(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """Position t predicts label t + 1, as in the causal language models of transformers."""
    return token_losses(outputs.logits[:, :-1], inputs["labels"][:, 1:])


def aligned_token_losses(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """Encoder-decoder models and token classifiers: position t predicts label t."""
    return token_losses(outputs.logits, inputs["labels"])


def class_losses(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """Cross-entropy of one class for each sample; shape (B,)."""
    return F.cross_entropy(outputs.logits.float(), inputs["labels"], reduction="none")


def ctc_losses(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """Connectionist temporal classification for each sample, shape (B,).

    Under `config.ctc_loss_reduction="mean"` each loss is divided by its number of labels, as torch does before it takes
    the mean; under "sum" it is the total, in nats.
    """
    config, labels = model.config, inputs["labels"]
    present = labels >= 0
    frames = _num_frames(outputs, inputs, model)
    target_lengths = present.sum(dim=-1)
    # summed over thousands of alignments, float32 would leave an error of 3e-5 in the gradient
    log_probabilities = F.log_softmax(outputs.logits.double(), dim=-1).transpose(0, 1)
    # CUDA's own kernel for CTC is not deterministic
    with torch.backends.cudnn.flags(enabled=False):
        losses = F.ctc_loss(
            log_probabilities,
            labels.masked_select(present),
            frames,
            target_lengths,
            blank=config.pad_token_id,
            reduction="none",
            zero_infinity=config.ctc_zero_infinity,
        )
    losses = losses.float()
    return losses / target_lengths if config.ctc_loss_reduction == "mean" else losses


def _num_frames(outputs, inputs: Mapping, model: nn.Module) -> Tensor:
    """How many frames of logits each sample has, shape (B,), by the model's own count."""
    attention_mask, logits = inputs.get("attention_mask"), outputs.logits
    if attention_mask is None:
        return torch.full((len(logits),), logits.shape[1], dtype=torch.long, device=logits.device)
    lengths = attention_mask.sum(dim=-1)
    if hasattr(model, "_get_feat_extract_output_lengths"):  # Wav2Vec2 and its kin
        return model._get_feat_extract_output_lengths(lengths).long()
    encoder = getattr(model, "encoder", None)
    if hasattr(encoder, "_get_subsampling_output_length"):  # Parakeet, LASR
        return encoder._get_subsampling_output_length(lengths).long()
    raise ValueError(
        f"{type(model).__name__} does not say how many frames an utterance has under its `attention_mask`. Pass a "
        "`compute_loss_func` that returns one CTC loss for each sample, shape (batch size,)."
    )


def kl_divergence(logits: Tensor, start_logits: Tensor, counted: Tensor) -> Tensor:
    """KL(start || model) of each sample, in nats, shape (B,): the mean over the positions that count.

    Args:
        logits, start_logits (`torch.Tensor`): Shape (B, T, V).
        counted (`torch.Tensor`): Shape (B, T), True where a position counts.
    """
    start = start_logits.float().log_softmax(-1)
    divergence = F.kl_div(logits.float().log_softmax(-1), start, reduction="none", log_target=True).sum(-1)
    return mean_where(divergence, counted)


def mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of each sample over the positions that count; both (B, T)."""
    return (values * counted).sum(1) / counted.sum(1)


Family = Callable[[object, Mapping, nn.Module], Tensor]

_FAMILIES: list[tuple[Mapping, Family]] = [
    (auto.MODEL_FOR_CTC_MAPPING_NAMES, ctc_losses),
    (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, aligned_token_losses),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, aligned_token_losses),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, aligned_token_losses),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, aligned_token_losses),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, causal_token_losses),
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, class_losses),
    (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, class_losses),
    (auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, class_losses),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, class_losses),
]


def find_family(model: nn.Module) -> Family:
    """Finds how this model's loss splits over samples, from the tables of its class in transformers.

    Raises:
        ValueError: Neither the class nor one that it inherits from stands in the tables.
    """
    # also by what it inherits from: FSDP2 makes a subclass of a model's class its class
    for name in (base.__name__ for base in type(model).__mro__):
        for class_names, family in _FAMILIES:
            if name in _flatten(class_names.values()):
                return family
    raise ValueError(
        f"The per-sample loss of {type(model).__name__} is not known. Pass `compute_loss_func(outputs, labels, "
        "num_items_in_batch=None)` that returns one loss for each sample, shape (batch size,)."
    )


def _flatten(names) -> set[str]:
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}


class PerSampleLoss:
    """The losses of a batch's samples under a model.

    Args:
        model (`torch.nn.Module`): The model, unwrapped, whose class (or that of an adapter's base) tells the family of its
            loss.
        compute_loss_func (`Callable`, *optional*): The user's own, with the signature that `Trainer` documents; it
            must return shape (B,) here.
        compute_divergence_func (`Callable`, *optional*): Maps outputs of the model, those of the starting model, and labels
            to shape (B,): what retain samples are held by under `retain_loss="kl"`, in place of KL.
    """

    def __init__(
        self,
        model: nn.Module,
        compute_loss_func: Callable | None = None,
        compute_divergence_func: Callable | None = None,
    ):
        self.model = model.get_base_model() if isinstance(model, PeftModel) else model
        self._compute_loss_func, self._compute_divergence_func = compute_loss_func, compute_divergence_func
        self._family = find_family(self.model) if compute_loss_func is None else None

    @property
    def has_divergence(self) -> bool:
        """Whether [`divergences`] is known: for a loss of the user's own, they bring that too."""
        return self._compute_loss_func is None or self._compute_divergence_func is not None

    @property
    def shifts_labels(self) -> bool:
        """Whether position t predicts label t + 1, so that the first label is never predicted."""
        return self._family is causal_token_losses

    @property
    def needs_labels(self) -> bool:
        """Whether batches must hold labels: a loss of the user's own may do without."""
        return self._compute_loss_func is None

    @property
    def num_classes(self) -> int | None:
        """How many values a label may have, where the family and the model's configuration say."""
        if self._family is None:
            return None
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "num_labels" if self._family is class_losses else "vocab_size", None)

    @property
    def classifies(self) -> bool:
        """Whether each sample has one class."""
        return self._family is class_losses

    def __call__(self, model: nn.Module, inputs: Mapping) -> Tensor:
        """Runs `model`, wrapped or not, on the inputs; returns losses of shape (B,), in nats for the built-in ones."""
        losses, _ = self.with_outputs(model, inputs)
        return losses

    def with_outputs(self, model: nn.Module, inputs: Mapping) -> tuple[Tensor, object]:
        """Also returns the model's outputs, which hold the loss that the model itself computed."""
        outputs = self.outputs(model, inputs)
        if self._compute_loss_func is None:
            return self._family(outputs, inputs, self.model), outputs
        return self._compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None), outputs

    def outputs(self, model: nn.Module, inputs: Mapping) -> object:
        """What the model returns; a loss of the user's own is taken from outputs that were made without labels."""
        own = self._compute_loss_func is not None
        return model(**{name: value for name, value in inputs.items() if not own or name != "labels"})

    def positions(self, outputs, inputs: Mapping) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) beside the labels (B, T) that they predict; -100 where none counts. A class is one position.

        Raises:
            ValueError: Labels belong to no positions, as under CTC, or the loss is the user's own.
        """
        logits, labels = outputs.logits, inputs.get("labels")
        if self._family is None or self._family is ctc_losses:
            raise ValueError(
                f"{type(self.model).__name__}'s loss here is not one of positions with a label each, which this method needs."
            )
        if self._family is class_losses:
            return logits[:, None], labels[:, None]
        return (logits[:, :-1], labels[:, 1:]) if self.shifts_labels else (logits, labels)

    def divergences(self, outputs, start_outputs, inputs: Mapping) -> Tensor:
        """How far each sample's predictions have gone from those of the starting model, shape (B,).

        KL(start || model) in nats: of the classes, or the mean over the tokens or frames that count. With a divergence of the
        user's own, what that returns.
        """
        if self._compute_divergence_func is not None:
            return self._compute_divergence_func(outputs, start_outputs, inputs.get("labels"))
        if self._family is ctc_losses:
            logits, frames = outputs.logits, _num_frames(outputs, inputs, self.model)
            counted = torch.arange(logits.shape[1], device=logits.device) < frames[:, None]
            return kl_divergence(logits, start_outputs.logits, counted)
        logits, labels = self.positions(outputs, inputs)
        return kl_divergence(logits, self.positions(start_outputs, inputs)[0], labels != IGNORED_LABEL)


class Ascent:
    """Gradient ascent on the loss itself. Unbounded."""

    def slopes(self, losses: Tensor) -> Tensor:
        """Ones, shape (m,)."""
        return torch.ones_like(losses)

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended: the mean loss, in nats."""
        return losses.mean()


class NegativePreference:
    """Negative preference optimisation (arXiv 2404.05868, equation 3), a bounded form of ascent.

    NPO minimises `(2 / beta) log(1 + (p / p_ref)^beta)`. The paper takes the log-likelihood of the whole sequence; here
    `log p` is minus the per-sample loss, a mean over tokens, so that `beta` means the same for short and long samples.

    Args:
        reference_losses (`torch.Tensor`): Shape (m,), the samples' losses under the starting model, in nats.
        beta (`float`): Inverse temperature, 1 / nats.
    """

    def __init__(self, reference_losses: Tensor, beta: float):
        self._reference_losses, self._beta = reference_losses, beta

    def slopes(self, losses: Tensor) -> Tensor:
        """`2 sigmoid(beta (reference - loss))`, shape (m,).

        1 at the start, as in ascent; 0 in the limit, as the loss rises above the reference.
        """
        return 2 * torch.sigmoid(self._beta * (self._reference_losses - losses))

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended: minus the mean of what NPO minimises."""
        return -(2 / self._beta * F.softplus(self._beta * (self._reference_losses - losses))).mean()


class SimpleNegativePreference:
    """SimNPO (arXiv 2410.07163, equation 4): NPO without a reference model.

    It minimises `-(2 / beta) log sigmoid(-(beta / |y|) log p - gamma)`; `-log p / |y|` is the per-sample loss, a mean over
    tokens.

    Args:
        beta (`float`): Inverse temperature, 1 / nats.
        gamma (`float`): Margin that beta times the loss is to reach; the higher, the longer a sample is pushed.
    """

    def __init__(self, beta: float, gamma: float):
        self._beta, self._gamma = beta, gamma

    def slopes(self, losses: Tensor) -> Tensor:
        """`2 sigmoid(gamma - beta loss)`, shape (m,); 0 in the limit, as the loss rises."""
        return 2 * torch.sigmoid(self._gamma - self._beta * losses)

    def value(self, losses: Tensor) -> Tensor:
        """What is ascended: minus the mean of what SimNPO minimises."""
        return -(2 / self._beta * F.softplus(self._gamma - self._beta * losses)).mean()


ForgetObjective = Ascent | NegativePreference | SimpleNegativePreference


def forget_objective(
    name: str, *, beta: float, gamma: float, reference_losses: Tensor | None = None
) -> ForgetObjective:
    """What is ascended on some forget samples: one of `FORGET_LOSSES`, for "npo" with their reference losses, (m,)."""
    if name == "ascent":
        return Ascent()
    if name == "simnpo":
        return SimpleNegativePreference(beta, gamma)
    return NegativePreference(reference_losses, beta)
