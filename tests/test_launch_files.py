"""The configurations for `accelerate launch` are ones that accelerate reads."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


FOLDER = Path(__file__).parent.parent / "examples" / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("multi_gpu", "MULTI_GPU"), ("fsdp2", "FSDP"), ("deepspeed_zero2", "DEEPSPEED")],
)
def test_accelerate_reads_every_configuration(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes > 1
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert name != "deepspeed_zero2" or config.deepspeed_config["zero_stage"] == 2


def test_no_configuration_is_forgotten():
    assert {path.stem for path in FOLDER.iterdir()} == {"multi_gpu", "fsdp2", "deepspeed_zero2"}
