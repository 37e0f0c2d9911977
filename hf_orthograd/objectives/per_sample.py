"""[`PerSampleLoss`]: the losses of a batch's samples under a model, found from the model's class or given by the user."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.utils import ModelOutput

from .answers import after_prompts, with_class, with_labels
from .families import IGNORED_LABEL, AlignedTokens, CausalTokens, ClassHead, Ctc, Family, Pixels, Spans, TokenClasses


# maps (model, inputs) to the losses of the batch's samples, shape (B,)
PerSampleLosses = Callable[[nn.Module, Mapping], Tensor]

RETAIN_LOSSES = ("nll", "kl")

_FAMILIES: list[tuple[Mapping, Family]] = [
    (auto.MODEL_FOR_CTC_MAPPING_NAMES, Ctc()),
    (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, AlignedTokens()),
    (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AlignedTokens()),
    (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AlignedTokens()),
    (auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, TokenClasses()),
    (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, CausalTokens()),
    (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, ClassHead()),
    (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, ClassHead()),
    (auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, ClassHead()),
    (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, ClassHead()),
    (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, Spans()),
    (auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, Pixels()),
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
        if name in _flatten(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()):
            return AlignedTokens() if model.config.is_encoder_decoder else CausalTokens()
    raise ValueError(
        f"The per-sample loss of {type(model).__name__} is not known. Pass `compute_loss_func(outputs, labels, "
        "num_items_in_batch=None)` that returns one loss for each sample, shape (batch size,). For a contrastive model there is "
        "`hf_orthograd.objectives.FixedNegatives`. A model without a head is to be loaded by the auto class of its task, as "
        "`AutoModelForCausalLM`."
    )


def _flatten(names) -> set[str]:
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}


def _answer(inputs: Mapping, *, way: Callable, answer: Tensor, names: tuple[str, ...]) -> dict:
    """A batch without labels stays as it is: what is said of it elsewhere names the collator."""
    return way(inputs, answer) if all(inputs.get(name) is not None for name in names) else dict(inputs)


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
        return self._family is not None and self._family.shifts_labels

    @property
    def label_names(self) -> tuple[str, ...]:
        """What batches must hold; nothing for a loss of the user's own, which may do without."""
        return () if self._family is None else self._family.label_names

    @property
    def has_counted_logits(self) -> bool:
        """Whether [`counted_logits`] are known, and alone say how far predictions have gone."""
        known = isinstance(self._family, (ClassHead, AlignedTokens, CausalTokens))
        return known and self._compute_divergence_func is None

    def counted(self, inputs: Mapping) -> Tensor | None:
        """At which of the last L positions of the logits a label counts, shape (B, L); None of a classifier of whole samples."""
        return None if self._family is None else self._family.counted(inputs)

    def counted_logits(self, outputs: ModelOutput, inputs: Mapping) -> tuple[Tensor, Tensor]:
        """Logits where labels count, shape (N, V), sample by sample; and how many each sample has, shape (B,).

        Their number depends on values: an accelerator waits.
        """
        counted = self.counted(inputs)
        if counted is None:
            return outputs.logits, torch.ones(len(outputs.logits), dtype=torch.long, device=outputs.logits.device)
        return outputs.logits[:, -counted.shape[1] :][counted], counted.sum(dim=1)

    @property
    def num_classes(self) -> int | None:
        """How many values a label may have, where the family and the model's configuration say."""
        return None if self._family is None else self._family.num_classes(self.model.config)

    @property
    def blank(self) -> int | None:
        """Of the labels of CTC the one that stands for no label; `None` elsewhere."""
        return self.model.config.pad_token_id if isinstance(self._family, Ctc) else None

    @property
    def ignored_label(self) -> int:
        """The label of what does not count."""
        return IGNORED_LABEL if self._family is None else self._family.ignored_label(self.model.config)

    @property
    def classifies(self) -> bool:
        """Whether each sample has one class, as far as the model's configuration says."""
        if not isinstance(self._family, ClassHead):
            return False
        return self.model.config.problem_type in (None, "single_label_classification") and self.num_classes != 1

    def problem(self, labels: Tensor) -> str | None:
        """Of a classifier of whole samples its `problem_type`, which the labels, shape (B,) or (B, classes), may decide; else None."""
        return self._family.problem(labels, self.model.config) if isinstance(self._family, ClassHead) else None

    def __call__(self, model: nn.Module, inputs: Mapping) -> Tensor:
        """Runs `model`, wrapped or not, on the inputs; returns losses of shape (B,), in nats for the built-in ones."""
        losses, _ = self.with_outputs(model, inputs)
        return losses

    def with_outputs(self, model: nn.Module, inputs: Mapping, own_loss: bool = False) -> tuple[Tensor, object]:
        """Losses, shape (B,), and the model's outputs, as [`outputs`]."""
        outputs = self.outputs(model, inputs, own_loss)
        if self._compute_loss_func is None:
            return self._family.losses(outputs, inputs, self.model), outputs
        return self._compute_loss_func(outputs, inputs.get("labels"), num_items_in_batch=None), outputs

    def outputs(self, model: nn.Module, inputs: Mapping, own_loss: bool = False) -> object:
        """What the model returns; with `own_loss` the loss that it computes itself is there, too, for the built-in ones.

        Where labels do nothing else they are left out: a second loss is a second softmax over the vocabulary, kept until the backward pass.
        """
        left_out = self._compute_loss_func is not None or (self._labels_are_for_the_loss and not own_loss)
        return model(**{name: value for name, value in inputs.items() if not left_out or name != "labels"})

    @property
    def _labels_are_for_the_loss(self) -> bool:
        """Of a decoder alone, as transformers has it; one beside an encoder of images, say, may place tokens by them."""
        # FSDP2 makes a subclass, of torch, of a model's class its class
        own = next(one for one in type(self.model).__mro__ if not one.__module__.startswith("torch."))
        is_known = own.__module__.startswith("transformers.")
        return is_known and isinstance(self._family, CausalTokens) and not self.model.config.sub_configs

    def positions(self, outputs: ModelOutput, inputs: Mapping) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) beside the labels (B, T) that they predict; -100 where none counts. A class is one position.

        Raises:
            ValueError: Labels belong to no positions, as under CTC, or the loss is the user's own.
        """
        family = Family() if self._family is None else self._family
        return family.positions(outputs, inputs, self.model)

    def answering(self, answer: list[int]) -> Callable[[Mapping], dict]:
        """What puts another answer, by its labels, in the place of the own ones of a batch on the host.

        A sequence's prompt, an image or an utterance stays; a class is an answer of one label.

        Raises:
            ValueError: The loss is the user's own, `answer` is none of this model's, or its samples have none; and when it is
                called, a sample has no prompt.
        """
        config, family, count = self.model.config, self._family, self.num_classes
        if family is None:
            raise ValueError(
                "forget_loss='refusal' is not known for a `compute_loss_func` of your own. Leave that or forget_loss='refusal' out."
            )
        if count is not None and max(answer) >= count:
            raise ValueError(
                f"`refusal_labels` must be labels of the model, 0 to {count - 1}, but holds {max(answer)}. They are those of "
                "the answer to give, as a collator would make them."
            )
        if isinstance(family, Ctc) and config.pad_token_id in answer:
            raise ValueError(
                f"`refusal_labels` is {answer}, but {config.pad_token_id} is the blank of CTC, which is no label. Give tokens that "
                "are heard, the word delimiter for example."
            )
        if isinstance(family, ClassHead) and (len(answer) != 1 or not self.classifies):
            raise ValueError(
                f"forget_loss='refusal' gives samples another class: `refusal_labels` must hold one, and the model have one for each "
                f"sample, but it holds {len(answer)} and `problem_type` is {config.problem_type!r}."
            )
        ways: dict[type[Family], Callable[..., dict]] = {
            ClassHead: with_class,
            Ctc: with_labels,
            CausalTokens: after_prompts,
        }
        if config.is_encoder_decoder:  # else each label is of a token that is read
            ways[AlignedTokens] = with_labels
        if type(family) not in ways:
            raise ValueError(
                f"forget_loss='refusal' needs samples with an answer, which those of {type(self.model).__name__} have not. Use another "
                "`forget_loss`."
            )
        return partial(_answer, way=ways[type(family)], answer=torch.tensor(answer), names=self.label_names)

    def divergences(self, outputs: ModelOutput, start_outputs: ModelOutput, inputs: Mapping) -> Tensor:
        """How far each sample's predictions have gone from those of the starting model, shape (B,).

        KL(start || model) in nats: of the classes, or the mean over the tokens or frames that count; of a regression the mean
        square of the difference. With a divergence of the user's own, what that returns.
        """
        if self._compute_divergence_func is not None:
            return self._compute_divergence_func(outputs, start_outputs, inputs.get("labels"))
        return self._family.divergences(outputs, start_outputs, inputs, self.model)
