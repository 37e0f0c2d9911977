#!/usr/bin/env bash
# What a GPU is needed for: its tests, the cost of a step, and TOFU whole.
#
#     bash benchmarks/on_gpu.sh <SmolLM2-135M-Instruct: a folder or a GGUF file> <TOFU as JSON lines>
#
# Tables land in benchmarks/results. Nothing is measured twice, so it can be stopped and called again.
set -eu
model=$(realpath "$1") data=$(realpath "$2")
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD

python3 -m pytest -q -n 4 tests/test_gpu.py tests/test_architectures.py
python3 benchmarks/step_cost.py --device cuda --bf16 --repeats 10 --samples 8 16 32 \
    --models vit-l-16 smollm2-135m llama-1b whisper-large-v3 --methods graddiff two_pass gram gram_kl \
    --memory_methods graddiff two_pass gram gram_kl

study() {
    # 19 of 20 questions on an author in turn: a divisor of 20 would take the same ones of each
    python3 benchmarks/studies/text.py --model "$model" --data_folder "$data" --authors 200 --forgotten 2 \
        --at_hand 19 --asked 40 --eval_batch_size 64 --threads 1 "$@"
}

all() { # waits for what was started, and fails if one of them failed
    local failed=0
    for process in $(jobs -p); do wait "$process" || failed=1; done
    return $failed
}

# the models first: every run starts from one and is judged by another
study --stages models --seeds 0
for seed in 1 2; do study --stages models --seeds $seed & done
all
ours="OrthoGrad + NPO, kl" theirs="NPO, kl"
for train in full lora; do
    for variant in "gradient ascent" GradDiff NPO SimNPO UNDIAL RMU "OrthoGrad + NPO"; do
        study --train $train --variants "$variant" --stages tune final &
    done
    for kept in "$theirs" "$ours"; do
        { study --train $train --variants "$kept" --stages tune final \
            && study --train $train --variants "$kept, k = 16" "$kept, k = 32" "$kept, k = 64" --stages final; } &
    done
    all
done
study --stages report
