"""What only an accelerator can show; `test_architectures.py` takes one too where there is one."""

import warnings
from collections import Counter

import pytest
import torch
from conftest import MODELS
from engines import forget_batch, retain_batch
from launched import samples
from torch.utils.data import default_collate

from hf_orthograd import OrthoGradConfig, OrthoGradTrainer
from hf_orthograd.gradients import GramEngine, products
from hf_orthograd.gradients.products import exact_arithmetic, inner_products
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KINDS = list(MODELS)


@pytest.fixture(autouse=True)
def convolutions_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else on by default


def unlearned(folder, kind, trainer_class=OrthoGradTrainer, **settings):
    torch.manual_seed(0)
    sizes = {"per_device_train_batch_size": 4, "per_device_forget_batch_size": 4, "max_steps": 3}
    fixed = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "optim": "sgd"}
    args = OrthoGradConfig(str(folder), **(fixed | sizes | {"max_grad_norm": 0} | settings))
    sets = {"train_dataset": samples(kind, 8, seed=1), "forget_dataset": samples(kind, 8, seed=2)}
    trainer = trainer_class(MODELS[kind](), args, **sets)
    trainer.train()
    return trainer


def flat(trainer):
    return torch.cat([parameter.detach().flatten().cpu().float() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize(
    "settings", [{}, {"retain_loss": "kl", "forget_loss": "npo"}, {"projection_target": "update"}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_that_of_a_cpu(kind, settings, tmp_path):
    own, reference = (unlearned(tmp_path, kind, use_cpu=on_cpu, **settings) for on_cpu in (False, True))
    assert own.args.device.type == "cuda" and own.gradient_engine.name == reference.gradient_engine.name == "gram"
    start = torch.cat([parameter.detach().flatten() for parameter in _start(kind).parameters()])
    change = flat(reference) - start
    assert (flat(own) - flat(reference)).norm() <= 1e-3 * change.norm()


def _start(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_goes_the_same_way(kind, precision, tmp_path):
    # under fp16 the first steps find the scale
    own = unlearned(tmp_path, kind, max_steps=12, **{precision: True})
    reference = unlearned(tmp_path, kind, max_steps=12, use_cpu=True)
    assert own.gradient_engine.name == "gram"
    start = torch.cat([parameter.detach().flatten() for parameter in _start(kind).parameters()])
    change = flat(own) - start, flat(reference) - start
    assert change[0].norm() > 0 and torch.cosine_similarity(*change, dim=0) >= 0.9


class Watched(OrthoGradTrainer):
    """Counts where a training step waits for the device, as CUDA itself reports it, by the file that asks."""

    def training_step(self, *args, **kwargs):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return super().training_step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found = [warning for warning in caught if "synchronizing" in str(warning.message)]
                self.waits = Counter(warning.filename for warning in found)


@pytest.mark.parametrize("settings", [{}, {"retain_loss": "kl", "forget_loss": "npo"}])
@pytest.mark.parametrize("kind", ["whisper", "vit", "llama"])
def test_a_step_waits_at_most_four_times(kind, settings, tmp_path):
    """Our own code; a model may wait where it looks at its mask, under any trainer, and does so through the recorder."""
    trainer = unlearned(tmp_path, kind, Watched, monitor_steps=0, **settings)
    assert trainer.gradient_engine.name == "gram"
    ours = [name for name in trainer.waits if "hf_orthograd" in name and not name.endswith("gram/recording.py")]
    own = {name: trainer.waits[name] for name in ours}
    assert 1 <= sum(own.values()) <= 4, trainer.waits  # one is there: the Gram matrix is solved on the host


def test_products_are_exact_where_the_process_allows_tf32():
    before = torch.get_float32_matmul_precision()
    rows = torch.randn(64, 20000, device="cuda")
    expected = rows.double() @ rows.double().T
    torch.set_float32_matmul_precision("high")
    try:
        rough = rows @ rows.T
        with exact_arithmetic(rows.device):
            found = inner_products(rows, rows)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    scale = expected.diagonal().mean()
    errors = [((product.double() - expected).abs().max() / scale).item() for product in (found, rough)]
    assert errors[0] <= 2e-6 < errors[1]


@pytest.mark.parametrize("kind", ["whisper", "vit", "llama"])
def test_halves_are_multiplied_as_they_are(kind, monkeypatch):
    """By matrix units, with sums in float32: the same Gram matrix as of float32 copies."""
    batches = [
        {name: value.cuda() for name, value in default_collate(list(samples(kind, count, seed=count))).items()}
        for count in (3, 4)
    ]
    torch.manual_seed(0)
    model = MODELS[kind]().cuda().eval()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = Parameters(trained, {})

    def gram():
        with torch.autocast("cuda", torch.bfloat16):
            engine = GramEngine(parameters, PerSampleLoss(model))
            return engine.measure(model, [forget_batch(batches[0])], [retain_batch(batches[1])]).gram

    assert products.sums_in_float32(torch.device("cuda", 0), torch.bfloat16)
    found = gram()
    monkeypatch.setattr(products, "sums_in_float32", lambda device, dtype: False)
    expected = gram()
    norms = expected.diagonal().sqrt()
    assert ((found - expected).abs() / torch.outer(norms, norms)).max() <= 1e-5
