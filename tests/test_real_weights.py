"""With real weights and real speech, where they are at hand."""

from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from engines import forget_batch, retain_batch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

from hf_orthograd.data.speech import SpeechCollator, prepare_speech_dataset, shorten_whisper
from hf_orthograd.gradients import GramEngine, LoopEngine
from hf_orthograd.objectives import PerSampleLoss
from hf_orthograd.parallel import Parameters


SHARED = Path(__file__).parent.parent.parent / "shared"
WHISPER = SHARED / "models" / "whisper-tiny.en"
SPEECH = SHARED / "data" / "speech" / "mini-librispeech-small"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not WHISPER.exists() or not SPEECH.exists(), reason=f"no weights or speech in {SHARED}"),
]


def test_inner_products_on_whisper_tiny():
    """Tied embeddings of 51,864 rows, 10 s windows, unequal transcripts: the float32 loop is the reference."""
    processor = AutoProcessor.from_pretrained(WHISPER)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(WHISPER, dtype=torch.float32)
    shorten_whisper(model, processor, 10)
    rows = prepare_speech_dataset(load_dataset(str(SPEECH), split="test").select(range(5)), processor)
    collator = SpeechCollator(processor, model.config.decoder_start_token_id)
    forget, retain = collator([rows[0], rows[1]]), collator([rows[2], rows[3], rows[4]])
    parameters = Parameters({name: p for name, p in model.named_parameters() if p.requires_grad}, {})
    steps = [
        engine(parameters, PerSampleLoss(model)).measure(model, [forget_batch(forget)], [retain_batch(retain)])
        for engine in (GramEngine, LoopEngine)
    ]
    norms = steps[1].gram.diagonal().sqrt()
    assert ((steps[0].gram - steps[1].gram).abs() / (norms * norms[:, None])).max() <= 1e-5
