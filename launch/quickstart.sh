#!/usr/bin/env bash
# From nothing to tokens, audio and their scores: environment, installation, the main job on sample_data with two
# processes, and the run's page.
#
#   bash launch/quickstart.sh [flags of batch_tokenizer, such as --model_path FOLDER]
#
# launch/environment.sh says which variables it heeds.
set -euo pipefail
PACKAGES="python3-venv python3-dev ffmpeg gcc"
EXTRAS=quality,report
source "$(dirname "$(realpath "$0")")/environment.sh"

status=0
OMP_NUM_THREADS=1 "$VENV/bin/torchrun" --standalone --nproc_per_node=2 -m batch_tokenizer \
    --data_list sample_data/data.jsonl --task wav2token2wav --num_workers 1 "$@" || status=$?
echo
if ((status)); then
    echo "The run ended with status $status; the lines above say why." >&2
    exit "$status"
fi
echo "Scores of the audio, original against reconstruction:"
"$VENV/bin/python" -m batch_tokenizer report sample_data/data.wav2token2wav.run --workers 2 || status=$?
echo
echo "Tokens and audio are in sample_data/out: KEY.json and KEY.wav for each row of sample_data/data.jsonl."
echo "The run's ledger, failures and summary are in sample_data/data.wav2token2wav.run."
echo "To look and listen, open sample_data/data.wav2token2wav.run/report.html in a browser."
echo "To go on:  . $VENV/bin/activate;  batch_tokenizer FOLDER_OF_AUDIO -o tokens;  batch_tokenizer --help"
if [[ " $* " != *" --model_path"* ]]; then
    echo "The bundled model is small: its speech is rough. Pass --model_path for a published one."
fi
exit "$status"
