#!/usr/bin/env bash
# One machine, all of its GPUs: a rank on each, or one rank on the CPU where there is no GPU.
#
#   launch/torchrun.sh --data_list data.jsonl --task wav2token2wav --model_path MODEL [flags of batch_tokenizer]
#
# Kill it whenever you like; the same command goes on where it was, with any number of ranks.
#
#   NPROC=N         ranks (default: as many as GPUs that are visible, at least one)
#   MAX_RESTARTS=N  times that all ranks are started again after one of them died (default: 3)
#   VENV=DIR        virtual environment that has the package (default: .venv in the repository; VENV= for the python
#                   in PATH)
set -euo pipefail
repository=$(dirname "$(dirname "$(realpath "$0")")")
VENV=${VENV-$repository/.venv}
python=${VENV:+$VENV/bin/}python
NPROC=${NPROC:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# Ranks divide the machine's cores among themselves; without this every rank would take all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m batch_tokenizer.runtime.torchrun --standalone --nproc_per_node="$NPROC" \
    --max_restarts="${MAX_RESTARTS:-3}" -m batch_tokenizer "$@"
