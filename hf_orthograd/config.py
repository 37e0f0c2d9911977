"""Every knob of the method, its unit, its default and why."""

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from .objectives import FORGET_LOSSES
from .projection import SOLVERS, check_solver


# the metric by which a `retain_budget` has the best model found: how far forgetting has come, if inside the budget
SCORE = "eval_forgotten_within_budget"

CHOICES = {
    "forget_loss": FORGET_LOSSES,
    "projection": ("orthogonal", "mean", "none"),
    "projection_scope": ("global", "per_tensor"),
    "projection_parameters": ("trainable", "lora"),
    "projection_target": ("gradient", "update"),
    "projection_solver": SOLVERS,
    "gradient_engine": ("auto", "gram", "func", "loop"),
}


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
            What is ascended on the forget set: "npo", the bounded negative preference optimisation (arXiv 2404.05868),
            "simnpo", the same without a reference (arXiv 2410.07163), or "ascent", the loss itself, unbounded, as in
            the paper. The first step of "npo" is that of "ascent". Bounded by default, because there is no stopping
            rule by default: `docs/choosing_settings.md` has the numbers.
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
            "global" projects the gradient of all parameters as one vector; "per_tensor" each tensor alone, which
            removes all signal from tensors with no more entries than retain samples.
        projection_parameters (`str`, *optional*, defaults to `"trainable"`):
            Which parameters the projection runs over: "trainable", all that are trained, or "lora", only those of the
            LoRA adapter, so that a classifier head, say, takes the unprojected update.
        projection_target (`str`, *optional*, defaults to `"gradient"`):
            What is guaranteed: "gradient", that the gradient handed to the optimizer is orthogonal; momentum, Adam's
            scaling, weight decay and clipping bend it afterwards. "update" also corrects the step that the optimizer
            then makes, by the smallest change after which, to first order, no retain sample of the step is worse (for
            alpha = 0: neither worse nor better). It takes one more copy of the parameters.
        projection_solver (`str`, *optional*, defaults to `"exact"`):
            How the projection is solved: "exact", by eigenvalues in float64, "cg", by conjugate gradients, or
            "kaczmarz", by sweeps over the retain samples.
        projection_iterations (`int`, *optional*):
            Most iterations of "cg" or sweeps of "kaczmarz"; 100 by default.
        projection_rtol (`float`, *optional*):
            Relative tolerance: the eigenvalue cut of "exact", k times the float32 epsilon by default, or the relative
            residual at which the iterative solvers stop, 1e-6 by default.
        gradient_engine (`str`, *optional*, defaults to `"auto"`):
            How inner products of per-sample gradients are found: "gram", without forming the gradients, "func", by
            torch.func, "loop", by one backward pass per sample, or "auto", the first of these that follows the model,
            said in the log.
        func_chunk_size (`int`, *optional*):
            Samples that the "func" engine vectorises at once; all retain samples of the batch by default.
        retain_chunk_size (`int`, *optional*):
            How many retain samples memory holds at once under the "gram" engine, for batches of more. The projection stays
            that on all of them; time grows with the square of the number of chunks. All by default.
        freeze_batch_norm (`bool`, *optional*, defaults to `False`):
            Keeps BatchNorm layers in evaluation mode while training. In training mode they couple the samples of a
            batch, and per-sample gradients do not exist.
        merge_adapter (`bool`, *optional*, defaults to `True`):
            Whether `save_model()` and `push_to_hub()` write a LoRA model merged into its base. Deleting an adapter
            undoes the unlearning it holds. Checkpoints keep the adapter.
        monitor_steps (`int`, *optional*):
            Every how many steps the change of the retain losses that a step really made is measured and logged beside
            the one predicted, for two more forward passes over its retain samples; 0 for never. `logging_steps` by
            default.
        forget_target (`str` or `float`, *optional*):
            What `stop_metric` on the forget set is to reach for training to stop: a number, or "reference", its value
            before the first step on `eval_dataset["reference"]`, data of the kind to forget that the model never saw.
        retain_budget (`float`, *optional*):
            By how much `stop_metric` may become worse on `eval_dataset["retain"]`, or an `eval_dataset` that is not a
            dict. In the end the model is that of the evaluation inside the budget at which most was forgotten, also
            if losses stop being finite. Sets `save_strategy="best"` and `load_best_model_at_end`: checkpoints are of
            such evaluations alone.
        stop_metric (`str`, *optional*, defaults to `"loss"`):
            "loss", or a metric that `compute_metrics` returns, as "wer".
        stop_greater_is_better (`bool`, *optional*, defaults to `False`):
            Whether a greater `stop_metric` is better quality, as for "accuracy".
        stop_patience (`int`, *optional*, defaults to `0`):
            How many evaluations in a row may lie outside of the budget before training stops.
    """

    alpha: float = field(
        default=0.5,
        metadata={
            "help": "Weight of the retain mean in the update; the projected forget gradient has weight 1 - alpha."
        },
    )
    forget_loss: str = field(
        default="npo",
        metadata={"help": "What is ascended on the forget set: the bounded 'npo' or 'simnpo', or 'ascent'."},
    )
    npo_beta: float = field(
        default=1.0, metadata={"help": "Inverse temperature of NPO and SimNPO, in 1 / nats of per-sample loss."}
    )
    simnpo_gamma: float = field(
        default=0.0, metadata={"help": "Margin of SimNPO, which `npo_beta` times a sample's loss is to reach."}
    )
    per_device_forget_batch_size: int = field(
        default=8,
        metadata={"help": "Number m of forget samples per step and device; no more than the forget set has."},
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
        default=None,
        metadata={"help": "Retain samples that memory holds at once under the 'gram' engine; all by default."},
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
    forget_target: str | None = field(
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

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {getattr(self, name)!r}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must lie in [0, 1], but is {self.alpha}.")
        if not self.npo_beta > 0:
            raise ValueError(f"`npo_beta` must be positive, but is {self.npo_beta}.")
        for name in ("per_device_forget_batch_size", "func_chunk_size", "retain_chunk_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")
        self._check_solver()
        self._check_chunks()
        self._check_stopping()
        if self.projection_target == "update" and (self.projection, self.projection_scope) != ("orthogonal", "global"):
            raise ValueError(
                f"`projection_target` is 'update', which needs projection='orthogonal' and projection_scope='global', but "
                f"they are {self.projection!r} and {self.projection_scope!r}."
            )
        super().__post_init__()

    def _check_stopping(self) -> None:
        for name in ("monitor_steps", "stop_patience", "retain_budget"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must not be negative, but is {getattr(self, name)}.")
        if self.forget_target not in (None, "reference"):
            try:
                float(self.forget_target)
            except ValueError as error:
                raise ValueError(
                    f"`forget_target` must be a number or 'reference', but is {self.forget_target!r}."
                ) from error
        if self.retain_budget is None:
            return
        if self.metric_for_best_model not in (None, SCORE):
            raise ValueError(
                f"`retain_budget` restores the best model inside of it, but `metric_for_best_model` is "
                f"{self.metric_for_best_model!r}, which asks for another. Leave one of them out."
            )
        self.metric_for_best_model, self.greater_is_better, self.load_best_model_at_end = SCORE, True, True
        self.save_strategy = "best"

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
