#!/bin/bash
# Trains the bundled default model from nothing: fetches 230 minutes of freely licensed speech (240 MB) from the Debian
# archive without installing it, decodes it, sets a speaker and a slice of the others aside, and trains.
# Stop it at any time; the same command goes on. Needs Debian or a relative of it (apt-get, dpkg-deb) and the package.
#
#   launch/train_default.sh DIR [flags of python -m batch_tokenizer.training, such as --minutes 75 --threads 2]
#
# DIR/run/checkpoint is then what --model_path takes.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
folder=$(realpath -m "${1:?usage: train_default.sh DIR [training flags]}")
shift

packages=(festvox-ru)
for language in en es fr it ru; do packages+=("asterisk-core-sounds-$language-g722"); done

mkdir -p "$folder/packages" "$folder/unpacked"
if [ ! -e "$folder/unpacked/done" ]; then
  (cd "$folder/packages" && apt-get download "${packages[@]}")
  for package in "$folder"/packages/*.deb; do dpkg-deb -x "$package" "$folder/unpacked"; done
  touch "$folder/unpacked/done"
fi
[ -e "$folder/held_out.jsonl" ] || python "$here/speech_manifests.py" "$folder"

cd "$here/.."
exec python -m batch_tokenizer.training \
  --data "$folder/train.jsonl" --held_out "$folder/held_out.jsonl" --out "$folder/run" "$@"
