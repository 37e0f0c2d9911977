"""What tests of histories make trainers and compare models with."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer


def maker(retain_rows, **config):
    """A trainer's maker that brings its own retain rows where the request has none."""

    def make(model, forget, retain, output_dir):
        settings = {"max_steps": 3, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
        settings |= {"per_device_train_batch_size": 4} | config
        args = OrthoGradConfig(
            output_dir, per_device_forget_batch_size=4, per_device_eval_batch_size=3,
            report_to="none", use_cpu=True, disable_tqdm=True, **settings,
        )  # fmt: skip
        return OrthoGradTrainer(
            ViTForImageClassification.from_pretrained(model),
            args,
            train_dataset=retain_rows if retain is None else retain,
            forget_dataset=forget,
        )

    return make


def weights(folder):
    return load_file(Path(folder, "model.safetensors"))


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
