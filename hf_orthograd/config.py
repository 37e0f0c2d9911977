"""Every knob of the method, its unit, its default and why."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real

from transformers import Seq2SeqTrainingArguments

from .objectives import FORGET_LOSSES, RETAIN_LOSSES
from .projection import SOLVERS, check_solver


# the metric by which a `retain_budget` has the best model found: how far forgetting has come, if inside the budget
SCORE = "eval_forgotten_within_budget"

CHOICES = {
    "forget_loss": FORGET_LOSSES,
    "retain_loss": RETAIN_LOSSES,
    "projection": ("orthogonal", "mean", "none"),
    "projection_scope": ("global", "per_tensor"),
    "projection_parameters": ("trainable", "lora"),
    "projection_target": ("gradient", "update"),
    "projection_solver": SOLVERS,
    "gradient_engine": ("auto", "gram", "func", "loop"),
}

# smallest and largest value, and whether None is one too
_NUMBERS = {
    "alpha": (0.0, 1.0, False),
    "npo_beta": (0.0, math.inf, False),
    "simnpo_gamma": (-math.inf, math.inf, False),
    "retain_budget": (0.0, math.inf, True),
    "projection_rtol": (0.0, 1.0, True),
}
_INTEGERS = {
    "per_device_forget_batch_size": (1, False),
    "projection_iterations": (1, True),
    "func_chunk_size": (1, True),
    "retain_chunk_size": (1, True),
    "monitor_steps": (0, True),
    "stop_patience": (0, False),
}
_SWITCHES = (
    "precompute_ref_logits",
    "check_overlap",
    "freeze_batch_norm",
    "merge_adapter",
    "stop_greater_is_better",
    "squash_history",
)


@dataclass
class OrthoGradConfig(Seq2SeqTrainingArguments):
    """Configuration of [`OrthoGradTrainer`].

    Inherits every parameter from [`~transformers.Seq2SeqTrainingArguments`] and changes none of their defaults.
    `per_device_train_batch_size` is the number k of retain samples whose gradients one step protects.

    Parameters:
        alpha (`float`, *optional*, defaults to `0.5`):
            Weight of the retain mean in the update; the projected forget gradient has weight 1 - alpha. 0 is pure
            projection, 1 trains on the retain set alone (arXiv 2503.02312, equation 5).
        forget_loss (`str`, *optional*, defaults to `"npo"`):
            What is ascended on the forget set. "npo" is the bounded negative preference optimisation (arXiv
            2404.05868), "simnpo" the same without a reference (arXiv 2410.07163). "ascent" is the loss itself,
            unbounded, as in the paper. The first step of "npo" is that of "ascent". Bounded by default, because there
            is no stopping rule by default: `docs/choosing_settings.md` has the numbers. "refusal" descends the loss of
            the answer `refusal_labels` in place of the own one: the model answers so, and what it knows may stay in it.
        refusal_labels (`list[int]`, *optional*):
            The answer of "refusal", one for all samples: its labels as a collator makes them, tokens with their end, or a class.
        retain_loss (`str`, *optional*, defaults to `"nll"`):
            What is descended on the retain set. "nll" is the loss of its labels, as in the paper. "kl" is how far
            predictions have gone from those of the starting model, KL(start || model) per class, token or frame. Few
            samples whose labels are trained on are learned by heart, and the rest of the retained data pays. The
            projection is on the gradients of the loss in either case. "kl" takes a forward pass of the starting model
            at each step, and one more copy of what is trained.
        precompute_ref_logits (`bool`, *optional*, defaults to `False`):
            Whether "kl" finds the starting model's predictions on all retain samples once, before the first step, and keeps
            them in place of that model: for each sample, or each token with a label, 4 bytes a class, or 2 under bf16 and
            fp16. It pays where steps read the retain set more than once. For classifiers of samples and of tokens, as
            language models and Whisper are, whose samples do not vary from step to step.
        npo_beta (`float`, *optional*, defaults to `1.0`):
            Inverse temperature of NPO and SimNPO, in 1 / nats of per-sample loss. The larger, the sooner a sample
            counts as forgotten.
        simnpo_gamma (`float`, *optional*, defaults to `0.0`):
            Margin of SimNPO, which `npo_beta` times a sample's loss is to reach for it to count as forgotten.
        per_device_forget_batch_size (`int`, *optional*, defaults to `8`):
            Number m of forget samples per step and device; no more than the forget set has.
        projection (`str`, *optional*, defaults to `"orthogonal"`):
            What is taken out of the forget gradient: "orthogonal", the span of the per-sample retain gradients,
            "mean", the direction of their mean, or "none".
        projection_scope (`str`, *optional*, defaults to `"global"`):
            "global" projects the gradient of all parameters as one vector, "per_tensor" each tensor alone. The latter
            removes all signal from tensors with no more entries than retain samples.
        projection_parameters (`str`, *optional*, defaults to `"trainable"`):
            Which parameters the projection runs over: "trainable", all that are trained, or "lora", only those of the
            LoRA adapter. A classifier head, say, then takes the unprojected update.
        projection_target (`str`, *optional*, defaults to `"gradient"`):
            What is guaranteed: "gradient", that the gradient handed to the optimizer is orthogonal; momentum, Adam's
            scaling, weight decay and clipping bend it afterwards. "update" also corrects the step that the optimizer
            then makes, by the smallest change after which, to first order, no retain sample of the step is worse (for
            alpha = 0: neither worse nor better). It takes one more copy of the parameters.
        projection_solver (`str`, *optional*, defaults to `"exact"`):
            How the k x k system of inner products is solved. "exact" takes eigenvalues in float64, "cg" conjugate
            gradients, "kaczmarz" sweeps over the retain samples. The last two are there to study what an approximation
            does: they save nothing, as all inner products are found before, and solving takes microseconds. Where
            gradients are at hand as vectors they do save, in [`project_orthogonal`].
        projection_iterations (`int`, *optional*):
            Most iterations of "cg" or sweeps of "kaczmarz"; 100 by default.
        projection_rtol (`float`, *optional*):
            Relative tolerance: the eigenvalue cut of "exact", k times the float32 epsilon by default, or the relative
            residual at which the iterative solvers stop, 1e-6 by default.
        gradient_engine (`str`, *optional*, defaults to `"auto"`):
            How inner products of per-sample gradients are found. "gram" does not form the gradients, "func" takes
            torch.func, "loop" one backward pass per sample. "auto" takes the first of these that follows the model,
            and says it in the log.
        func_chunk_size (`int`, *optional*):
            Samples that the "func" engine vectorises at once; all retain samples of the batch by default.
        retain_chunk_size (`int`, *optional*):
            How many retain samples memory holds at once under the "gram" engine, for batches of more. The projection stays
            that on all of them; time grows with the square of the number of chunks. All by default.
        check_overlap (`bool`, *optional*, defaults to `True`):
            Whether rows that stand in both sets are looked for when the trainer is made. What the model reads of a row
            counts, not its other columns or padding. It reads every row once, in the first process.
        freeze_batch_norm (`bool`, *optional*, defaults to `False`):
            Keeps BatchNorm layers in evaluation mode while training. In training mode they couple the samples of a
            batch, and per-sample gradients do not exist.
        merge_adapter (`bool`, *optional*, defaults to `True`):
            Whether `save_model()` and `push_to_hub()` write a LoRA model merged into its base. Deleting an adapter
            undoes the unlearning it holds. Checkpoints keep the adapter.
        monitor_steps (`int`, *optional*):
            Every how many steps the change that a step really made to its retain losses is measured, and logged beside
            the one predicted. It takes two more forward passes over the retain samples. 0 for never. `logging_steps`
            by default.
        forget_target (`float` or `"reference"`, *optional*):
            What `stop_metric` on the forget set is to reach for training to stop: a number, or "reference". That is
            its value before the first step on `eval_dataset["reference"]`, data of the kind to forget that the model
            never saw.
        retain_budget (`float`, *optional*):
            By how much `stop_metric` may become worse on `eval_dataset["retain"]`, or an `eval_dataset` that is not a
            dict. In the end the model is that of the evaluation inside the budget at which most was forgotten, also
            if losses stop being finite. The trainer's own copy of the arguments gets `save_strategy="best"` and
            `load_best_model_at_end`: checkpoints are of such evaluations alone.
        stop_metric (`str`, *optional*, defaults to `"loss"`):
            "loss", or a metric that `compute_metrics` returns, as "wer".
        stop_greater_is_better (`bool`, *optional*, defaults to `False`):
            Whether a greater `stop_metric` is better quality, as for "accuracy".
        stop_patience (`int`, *optional*, defaults to `0`):
            How many evaluations in a row may lie outside of the budget before training stops.
        squash_history (`bool`, *optional*, defaults to `False`):
            Whether `push_to_hub()` rewrites the branch as one commit, so that no earlier revision of it holds weights that
            remember. Without it a repository that holds such is refused.
    """

    alpha: float = field(
        default=0.5,
        metadata={"help": "Weight of the retain mean; the projected forget gradient has weight 1 - alpha."},
    )
    forget_loss: str = field(
        default="npo",
        metadata={"help": "On forget samples: 'npo', 'simnpo' or 'ascent', or 'refusal', another answer."},
    )
    refusal_labels: list[int] | None = field(
        default=None, metadata={"help": "Labels of the answer that 'refusal' gives in place of forgotten ones."}
    )
    retain_loss: str = field(
        default="nll",
        metadata={"help": "What is descended on retain samples: 'nll', or 'kl', the change of predictions."},
    )
    precompute_ref_logits: bool = field(
        default=False,
        metadata={"help": "Whether predictions for 'kl' are computed once, and the starting model let go."},
    )
    npo_beta: float = field(
        default=1.0, metadata={"help": "Inverse temperature of NPO and SimNPO, in 1 / nats of per-sample loss."}
    )
    simnpo_gamma: float = field(
        default=0.0, metadata={"help": "Margin of SimNPO, which `npo_beta` times a sample's loss is to reach."}
    )
    per_device_forget_batch_size: int = field(
        default=8, metadata={"help": "Number m of forget samples per step and device."}
    )
    projection: str = field(
        default="orthogonal",
        metadata={"help": "What is taken out of the forget gradient: 'orthogonal', 'mean' or 'none'."},
    )
    projection_scope: str = field(
        default="global", metadata={"help": "Project all parameters as one vector, 'global', or 'per_tensor'."}
    )
    projection_parameters: str = field(
        default="trainable", metadata={"help": "Which parameters the projection runs over: 'trainable' or 'lora'."}
    )
    projection_target: str = field(
        default="gradient", metadata={"help": "What is guaranteed: an orthogonal 'gradient', or a harmless 'update'."}
    )
    projection_solver: str = field(
        default="exact", metadata={"help": "How the projection is solved: 'exact', 'cg' or 'kaczmarz'."}
    )
    projection_iterations: int | None = field(
        default=None, metadata={"help": "Most iterations of 'cg' or sweeps of 'kaczmarz'; 100 by default."}
    )
    projection_rtol: float | None = field(
        default=None, metadata={"help": "Relative tolerance of the solver; by default that of float32 products."}
    )
    gradient_engine: str = field(
        default="auto",
        metadata={"help": "How inner products of per-sample gradients are found: 'auto', 'gram', 'func' or 'loop'."},
    )
    func_chunk_size: int | None = field(
        default=None, metadata={"help": "Samples that the 'func' engine vectorises at once; all by default."}
    )
    retain_chunk_size: int | None = field(
        default=None, metadata={"help": "Retain samples that the 'gram' engine holds at once; all by default."}
    )
    check_overlap: bool = field(
        default=True, metadata={"help": "Whether rows that stand in both sets are looked for at the start."}
    )
    freeze_batch_norm: bool = field(
        default=False, metadata={"help": "Keeps BatchNorm layers in evaluation mode while training."}
    )
    merge_adapter: bool = field(
        default=True,
        metadata={"help": "Whether save_model() and push_to_hub() write a LoRA model merged into its base."},
    )
    monitor_steps: int | None = field(
        default=None,
        metadata={
            "help": "Every how many steps the real change of retain losses is logged; `logging_steps` by default."
        },
    )
    forget_target: float | str | None = field(
        default=None,
        metadata={"help": "Level of `stop_metric` on the forget set to stop at: a number, or 'reference'."},
    )
    retain_budget: float | None = field(
        default=None, metadata={"help": "By how much `stop_metric` may become worse on retained data."}
    )
    stop_metric: str = field(default="loss", metadata={"help": "The metric of `forget_target` and `retain_budget`."})
    stop_greater_is_better: bool = field(
        default=False, metadata={"help": "Whether a greater `stop_metric` is better quality."}
    )
    stop_patience: int = field(
        default=0, metadata={"help": "Evaluations in a row that may lie outside of the budget before training stops."}
    )
    squash_history: bool = field(
        default=False, metadata={"help": "Whether pushing rewrites the branch, so that it holds no earlier weights."}
    )

    def __post_init__(self):
        self.check_unlearning()
        super().__post_init__()

    @property
    def keeps_predictions(self) -> bool:
        """Whether the run holds retain samples to the predictions of the model that it starts from."""
        return self.retain_loss == "kl" and self.alpha > 0

    @property
    def solver_settings(self) -> dict:
        """How a projection is solved: arguments of `projection.solve_projection`."""
        return {
            "solver": self.projection_solver,
            "num_iterations": self.projection_iterations,
            "rtol": self.projection_rtol,
        }

    def check_unlearning(self) -> None:
        """Checks the fields that unlearning adds.

        Raises:
            ValueError: A value of the wrong type or out of its range, or two that contradict each other.
        """
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {getattr(self, name)!r}.")
        for name, (low, high, optional) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high, optional)
        for name, (low, optional) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), low, optional)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, but is {getattr(self, name)!r}.")
        if self.npo_beta == 0:
            raise ValueError("`npo_beta` must be positive, but is 0: nothing would count as forgotten.")
        if not isinstance(self.stop_metric, str):
            raise ValueError(f"`stop_metric` must be the name of a metric, but is {self.stop_metric!r}.")
        self._check_refusal()
        self._check_solver()
        self._check_chunks()
        self._check_stopping()
        if self.projection_target == "update" and (self.projection, self.projection_scope) != ("orthogonal", "global"):
            raise ValueError(
                f"`projection_target` is 'update', which needs projection='orthogonal' and projection_scope='global', but "
                f"they are {self.projection!r} and {self.projection_scope!r}."
            )

    def _check_stopping(self) -> None:
        if self.forget_target not in (None, "reference"):
            try:
                self.forget_target = float(self.forget_target)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"`forget_target` must be a number or 'reference', but is {self.forget_target!r}."
                ) from error
            _check_number("forget_target", self.forget_target, -math.inf, math.inf, False)
        if self.retain_budget is None:
            return
        if self.metric_for_best_model not in (None, SCORE) or self.greater_is_better is False:
            raise ValueError(
                f"`retain_budget` restores the best model inside of it, but `metric_for_best_model` is "
                f"{self.metric_for_best_model!r} and `greater_is_better` {self.greater_is_better}, which ask for another. "
                "Leave one of them out."
            )

    def _check_refusal(self) -> None:
        refuses, given = self.forget_loss == "refusal", self.refusal_labels
        if not refuses and given is not None:
            raise ValueError(f"`refusal_labels` is {given!r}, which only forget_loss='refusal' uses: leave it out.")
        if not refuses:
            return
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(
                f"forget_loss='refusal' needs `refusal_labels`, a list of labels, but it is {given!r}. Give [3] for a class, or the "
                "tokens of an answer with its end."
            )
        for label in given:
            _check_integer("refusal_labels", label, 0, False)
        self.refusal_labels = [int(label) for label in given]

    def _check_solver(self) -> None:
        try:
            check_solver(self.projection_solver, self.projection_iterations, self.projection_rtol)
        except ValueError as error:
            raise ValueError(
                f"`projection_solver`={self.projection_solver!r}, `projection_iterations`={self.projection_iterations}, "
                f"`projection_rtol`={self.projection_rtol}: {error}"
            ) from error

    def _check_chunks(self) -> None:
        if self.retain_chunk_size is None or self.projection == "none":
            return
        needed = {
            "projection": ("orthogonal",),
            "projection_scope": ("global",),
            "projection_target": ("gradient",),
            "gradient_engine": ("auto", "gram"),
        }
        for name, values in needed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"`retain_chunk_size` is {self.retain_chunk_size}, which needs `{name}` to be {' or '.join(values)}, "
                    f"but it is {getattr(self, name)!r}. Leave `retain_chunk_size` out, or change that."
                )


def _check_number(name: str, value: object, low: float, high: float, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"`{name}` must be a number, but is {value!r} ({type(value).__name__}).")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f" from {low:g} to {high:g}" if math.isfinite(high) else f" of {low:g} or more" * math.isfinite(low)
        raise ValueError(f"`{name}` must be a finite number{bounds}, but is {value!r}.")


def _check_integer(name: str, value: object, low: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ValueError(f"`{name}` must be a whole number of {low} or more, but is {value!r}.")
