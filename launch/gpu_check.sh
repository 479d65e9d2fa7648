#!/usr/bin/env bash
# On a machine with a GPU: driver, known answers, equal bits in any batch, and the benchmark at full size, in one report
# whose tables go into docs/performance.md as they are. The essential part comes first and takes some minutes on one card.
#
#   bash launch/gpu_check.sh [flags of batch_tokenizer bench, such as --model_path FOLDER in place of random weights]
#
#   VENV=DIR     use this environment; made if absent (default: .venv in the repository)
#   VENV=        use the Python that is there (PYTHON, default python3): nothing is installed, no network is needed
#   REPORT=FILE  where the report goes (default: gpu_check.md)
#   MINUTES=N    time for the essential part, after which what is left is skipped and named (default: 8)
set -euo pipefail
HERE=$(dirname "$(realpath "$0")")
if [[ -n ${VENV-unset} ]]; then
    PACKAGES="python3-venv ffmpeg gcc g++ python3-dev"
    EXTRAS=dev
    source "$HERE/environment.sh"
    PYTHON=$VENV/bin/python
else
    cd "$HERE/.."
    PYTHON=${PYTHON:-python3}
fi
REPORT=${REPORT:-gpu_check.md}
END=$((SECONDS + 60 * ${MINUTES:-8}))
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# 1. What is there. builds of torch for CUDA 13.0 need driver 580 or newer.
driver=$(cat /proc/driver/nvidia/version 2>/dev/null | head -1 || true)
echo "driver: ${driver:-none}"
missing=$("$PYTHON" - <<'PYTHON'
import importlib.util, sys
needed = "torch torchaudio numpy soundfile soxr av safetensors orjson jsonlines webdataset accelerate fsspec tqdm"
optional = "pytest hypothesis"
absent = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if absent:
    sys.exit("cannot run, as this Python lacks: " + ", ".join(absent))
print(" ".join(name for name in optional.split() if importlib.util.find_spec(name) is None))
PYTHON
)
"$PYTHON" -c 'from batch_tokenizer.records import RunError
from batch_tokenizer.runtime.devices import choose_device
try:
    print(choose_device("cuda", "auto", 0).reason)
except RunError as error:
    raise SystemExit(str(error))'
for tool in nvidia-smi gcc; do command -v "$tool" >/dev/null || missing+=" $tool"; done
[[ -z ${missing// /} ]] || echo "missing, so that a part below is left out or slower:$(printf ' %s' $missing)"

model=(--config mimo-1.2b --random_weights)
[[ " $* " == *" --model_path "* ]] && model=()
bench=("$PYTHON" -m batch_tokenizer bench --device cuda "${model[@]}" --lengths seed-tts --num_utterances 2048
    --repeats 3 --work_dir "$WORK" "$@")

# run TITLE COMMAND…: a section of the report; skipped when the time is used up.
run() {
    local left=$((END - SECONDS))
    echo
    echo "## $1"
    echo
    if ((left < 15)); then
        echo "Left out: the ${MINUTES:-8} minutes are used up."
        return
    fi
    shift
    timeout "$left" "$@" 2>&1 || echo "Ended with status $?."
}

{
    echo "# GPU check, $(date --iso-8601=minutes)"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>/dev/null || true
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())'
    # 2. Right tokens first, then speed of both tasks with the time of each part.
    if [[ $missing == *pytest* ]]; then
        echo "Known answers and equal bits are left out: pytest is missing."
    else
        run "Known answers; thousands of utterances in mixed orders" "$PYTHON" -m pytest -q -rsP -p no:cacheprovider \
            tests/parity/test_mimo_cuda.py tests/parity/test_mimo_golden.py
    fi
    for task in wav2token2wav wav2token; do
        run "$task, bfloat16" "${bench[@]}" --task "$task" --parts peak model end_to_end profile
    done
    # 3. Comparisons, as long as there is time.
    for task in wav2token2wav wav2token; do
        run "$task, layers not compiled" env TORCHDYNAMO_DISABLE=1 "${bench[@]}" --task "$task" --parts peak model
        run "$task, log-mel in the loader" "${bench[@]}" --task "$task" --parts peak model end_to_end --front_end host
    done
    run "Batches of other codecs against one by one" "$PYTHON" -m tests.measure.batched --device cuda --num_utterances 64 \
        mimi snac-24khz dac-44khz encodec-24khz nanocodec wavtokenizer qwen3-tts-12hz s3-v2 moss-nano
} 2>&1 | tee "$REPORT"
