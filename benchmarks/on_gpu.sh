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
python3 benchmarks/step_cost.py --device cuda --bf16 --repeats 10 --samples 8 32 \
    --models vit-l-16 whisper-large-v3 smollm2-135m --methods graddiff two_pass gram gram_kl \
    --memory_methods graddiff two_pass gram gram_kl

study() {
    python3 benchmarks/studies/text.py --model "$model" --data_folder "$data" --authors 200 --forgotten 2 \
        --at_hand 20 --asked 40 --eval_batch_size 64 --threads 1 "$@"
}

# the models first: every run starts from one and is judged by another
study --stages models --seeds 0
for seed in 1 2; do study --stages models --seeds $seed & done
wait
ours="OrthoGrad + NPO, kl" theirs="NPO, kl"
for train in full lora; do
    for variant in "gradient ascent" GradDiff NPO SimNPO UNDIAL RMU "OrthoGrad + NPO"; do
        study --train $train --variants "$variant" --stages tune final &
    done
    { study --train $train --variants "$theirs" --stages tune final \
        && study --train $train --variants "$theirs, k = 32" --stages final; } &
    { study --train $train --variants "$ours" --stages tune final \
        && study --train $train --variants "$ours, k = 16" "$ours, k = 32" "$ours, k = 64" --stages final; } &
    wait
done
study --stages report
