#!/bin/bash
# Trains the bundled default model: fetches 8 hours of freely licensed speech and music (0.4 GB) from the Debian archive
# without installing it, decodes it, sets whole voices and languages aside, and trains from random weights.
# Stop it at any time; the same command goes on. Needs Debian or a relative of it (apt-get, dpkg-deb) and the package.
#
#   launch/train_default.sh DIR [flags of python -m batch_tokenizer.training, such as --minutes 90 --threads 1]
#
# DIR/run/checkpoint is then what --model_path takes.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
folder=$(realpath -m "${1:?usage: train_default.sh DIR [training flags]}")
shift

mkdir -p "$folder/packages" "$folder/unpacked"
if [ ! -e "$folder/unpacked/done" ]; then
  # shellcheck disable=SC2046 # names of packages, one word each
  (cd "$folder/packages" && apt-get download $(python -c "
import sys; sys.path.insert(0, '$here'); import speech_manifests; print(*speech_manifests.PACKAGES)"))
  for package in "$folder"/packages/*.deb; do
    name=$(basename "${package%%_*}")
    dpkg-deb -x "$package" "$folder/unpacked/$name"
  done
  touch "$folder/unpacked/done"
fi
[ -e "$folder/never_heard.jsonl" ] || python "$here/speech_manifests.py" "$folder"

cd "$here/.."
exec python -m batch_tokenizer.training \
  --data "$folder/train.jsonl" --held_out "$folder/never_heard.jsonl" --out "$folder/run" "$@"
