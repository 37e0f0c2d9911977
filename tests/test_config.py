from dataclasses import MISSING, fields

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_orthograd import OrthoGradConfig


INHERITED = {field.name for field in fields(Seq2SeqTrainingArguments)}
OWN = [field for field in fields(OrthoGradConfig) if field.name not in INHERITED]


@pytest.mark.parametrize("field", OWN, ids=lambda field: field.name)
def test_each_field_has_help_and_documentation(field):
    assert field.metadata["help"].endswith(".")
    assert f"\n        {field.name} (`" in OrthoGradConfig.__doc__
    if field.default not in (None, MISSING):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        assert f"defaults to `{default}`" in OrthoGradConfig.__doc__.split(f"{field.name} (`")[1].split("\n")[0]


def test_no_inherited_default_is_changed():
    inherited = {field.name: field.default for field in fields(Seq2SeqTrainingArguments)}
    changed = [f.name for f in fields(OrthoGradConfig) if f.name in INHERITED and f.default != inherited[f.name]]
    assert not changed


def test_parses_from_a_command_line(tmp_path):
    command = ["--output_dir", str(tmp_path), "--alpha", "0.25", "--forget_loss", "npo", "--projection_rtol", "1e-5"]
    (config,) = HfArgumentParser(OrthoGradConfig).parse_args_into_dataclasses(command)
    assert (config.alpha, config.forget_loss, config.projection_rtol) == (0.25, "npo", 1e-5)
    assert "alpha" in HfArgumentParser(OrthoGradConfig).format_help()


def test_round_trip(tmp_path):
    config = OrthoGradConfig(str(tmp_path), alpha=0.1, forget_loss="npo", report_to="none")
    saved = config.to_dict()
    again = OrthoGradConfig(str(tmp_path), report_to="none", **{field.name: saved[field.name] for field in OWN})
    assert all(getattr(again, field.name) == getattr(config, field.name) for field in OWN)
