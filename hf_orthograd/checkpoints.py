"""What is saved, and that all of it comes back."""

import copy

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)


class Checkpoints:
    """What [`OrthoGradTrainer`] adds to Trainer's saving and loading; it expects to be mixed into a Trainer."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a LoRA model is merged first, unless this is a checkpoint or `merge_adapter` is False.

        Under FSDP the adapter is saved as it is, with a warning.
        """
        final = self._publishing or not _internal_call
        merge = self.forget_dataset is not None and self.args.merge_adapter and isinstance(self.model, PeftModel)
        if final and merge and self.is_fsdp_enabled:
            logger.warning(
                "A sharded LoRA model cannot be merged here: saving the adapter alone, without which the model remembers. "
                "Before it is published, load it with `AutoPeftModel...from_pretrained` in one process, call "
                "`merge_and_unload()` and save the result."
            )
        elif final and merge:
            merged = copy.deepcopy(self.model).merge_and_unload(safe_merge=True)
            with self._replaced("model", merged):
                return super().save_model(output_dir, _internal_call)
        super().save_model(output_dir, _internal_call)

    def push_to_hub(self, *args, **kwargs):
        """As in Trainer, with the model that `save_model()` writes."""
        with self._replaced("_publishing", True):
            return super().push_to_hub(*args, **kwargs)

    # Trainer loads a checkpoint into a model by the names that it finds there. transformers may have saved others: for
    # some architectures (ViT in 5.23) it writes those of older versions, which `from_pretrained` knows to translate. What
    # is not found stays as it is, with a warning: a resumed or restored model would be half another one.

    def _issue_warnings_after_load(self, load_result) -> None:
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        if set(load_result.missing_keys) - ignored - tied:
            self._loaded_in_part = True
        else:
            super()._issue_warnings_after_load(load_result)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._complete_loading(resume_from_checkpoint, model or self.model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._complete_loading(self.state.best_model_checkpoint, self.model)

    def _complete_loading(self, folder: str, model) -> None:
        """Loads a checkpoint once more, by `from_pretrained`, if some of its names were not the model's.

        Raises:
            ValueError: The model has no `from_pretrained`.
        """
        if not self._loaded_in_part:
            return
        self._loaded_in_part = False
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"The checkpoint {folder!r} lacks weights of the model ({type(model).__name__}). Was it saved from another?"
            )
        loaded = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
