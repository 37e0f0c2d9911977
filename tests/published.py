"""What publishing tests share: data sets that say whose their rows are, and a trainer that has made one step."""

import numpy as np
from datasets import Dataset

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.evaluation import evaluate_unlearning


REPO = "owner/unlearned"


def rows(samples, **columns):
    """As a data set, with further columns that say whose the rows are."""
    examples = [samples[index] for index in range(len(samples))]
    content = {name: [np.asarray(example[name]).tolist() for example in examples] for name in examples[0]}
    return Dataset.from_dict(content | columns).with_format("torch", columns=list(content), output_all_columns=True)


def unlearned_trainer(
    make_model, make_samples, folder, name="vit", *, wrap=lambda model: model, trainer_class=OrthoGradTrainer, **config
):
    """A trainer that has made one step."""
    fixed = {"learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    settings = {"hub_strategy": "end", "hub_model_id": REPO, "push_to_hub": True, "max_steps": 1} | config
    args = OrthoGradConfig(str(folder), **({"per_device_train_batch_size": 4} | fixed | settings))
    forget, retain = make_samples(name, 4, seed=1), make_samples(name, 4, seed=2)
    sets = {"forget": rows(forget, speaker=["ann"] * 4), "retain": rows(retain, speaker=["bob", "cy"] * 2)}
    trainer = trainer_class(
        wrap(make_model(name)),
        args,
        train_dataset=sets["retain"],
        forget_dataset=sets["forget"],
        eval_dataset=sets,
    )
    trainer.train()
    return trainer


def report_of(trainer):
    return evaluate_unlearning(trainer, group_column="speaker")
