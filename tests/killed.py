"""One run to be killed and resumed: python tests/killed.py FOLDER [STEP], killed in the middle of STEP if one is given.

Saves the final parameters as FOLDER/final.pt. It starts from the last checkpoint in FOLDER, if there is one.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from conftest import MODELS
from launched import samples
from transformers import TrainerCallback

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


class Kill(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS["llama"](dropout=0.1)
    args = OrthoGradConfig(
        str(folder), max_steps=9, save_strategy="steps", save_steps=2, per_device_train_batch_size=2,
        per_device_forget_batch_size=2, gradient_accumulation_steps=2, forget_loss="npo", optim="adamw_torch",
        learning_rate=1e-2, weight_decay=0.1, projection_target="update", report_to="none", logging_steps=1,
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    retain, forget = samples("llama", 10, seed=1), samples("llama", 7, seed=2)
    callbacks = [Kill(int(sys.argv[2]))] if len(sys.argv) > 2 else []
    trainer = OrthoGradTrainer(model, args, train_dataset=retain, forget_dataset=forget, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    torch.save([p.detach() for p in model.parameters()], folder / "final.pt")


if __name__ == "__main__":
    main()
