#!/usr/bin/env bash
# On a machine with a GPU: known answers, equal bits in any batch, and the benchmark at full size, in one report.
#
#   bash launch/gpu_check.sh [flags of batch_tokenizer bench, such as --model_path FOLDER in place of random weights]
#
#   REPORT=FILE  where the report goes (default: gpu_check.txt); put its tables into docs/performance.md
#
# launch/environment.sh says which variables it heeds.
set -euo pipefail
PACKAGES="python3-venv ffmpeg gcc g++ python3-dev"
EXTRAS=dev
source "$(dirname "$(realpath "$0")")/environment.sh"
REPORT=${REPORT:-gpu_check.txt}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$VENV/bin/python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no CUDA device here")'

model=(--config mimo-1.2b --random_weights)
[[ " $* " == *" --model_path "* ]] && model=()
bench=("$VENV/bin/python" -m batch_tokenizer bench --device cuda "${model[@]}" --lengths seed-tts --num_utterances 4096
    --batch_size 256 --work_dir "$WORK" "$@")

{
    date --iso-8601
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader
    "$VENV/bin/python" -m pytest -q -rsP tests/parity/test_mimo_cuda.py tests/parity/test_mimo_golden.py
    for task in wav2token2wav wav2token; do
        echo "== $task, bfloat16"
        "${bench[@]}" --task "$task"
        echo "== $task, bfloat16, log-mel in the loader"
        "${bench[@]}" --task "$task" --parts peak model end_to_end --front_end host
        echo "== $task, bfloat16, layers not compiled"
        TORCHDYNAMO_DISABLE=1 "${bench[@]}" --task "$task" --parts peak model
    done
} 2>&1 | tee "$REPORT"
