#!/bin/bash
# Trains a default model from nothing: fetches 4 hours of freely licensed speech and music to learn from, and voices to
# score it on (0.7 GB), from the Debian archive without installing them; decodes and splits them; trains from random
# weights; scores the averaged half-precision weights on voices heard and never heard; writes their model card and licence.
# Stop it at any time; the same command resumes. Needs Debian or a relative of it (apt-get, dpkg-deb) and the
# package with its "quality" extra.
#
#   launch/train_default.sh DIR [flags of python -m batch_tokenizer.training, such as --minutes 90 --threads 1]
#
# DIR/run/checkpoint is then what --model_path takes. For a quick trial, in the environment: PACKAGES, the names of those
# to use; CLIPS, how many of each voice are scored; METRICS, of those of `batch_tokenizer evaluate`.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
folder=$(realpath -m "${1:?usage: train_default.sh DIR [training flags]}")
shift
export PYTHONPATH="${here%/*}${PYTHONPATH:+:$PYTHONPATH}"

# 1. Packages. A package is unpacked under another name and renamed, so that a folder is whole or not there.
mkdir -p "$folder/packages" "$folder/unpacked"
for package in $(python -c "
import sys; sys.path.insert(0, '$here'); import speech_manifests; print(*speech_manifests.chosen_packages())"); do
  [ -e "$folder/unpacked/$package" ] && continue
  (cd "$folder/packages" && apt-get download "$package")
  rm -rf "$folder/packages/$package"
  dpkg-deb -x "$folder/packages/$package"_*.deb "$folder/packages/$package"
  mv "$folder/packages/$package" "$folder/unpacked/$package"
done

# 2. Wav files and manifests; scored.jsonl is the last.
[ -e "$folder/scored.jsonl" ] || python "$here/speech_manifests.py" "$folder"

# 3. Training: spectral losses, then discriminators too; the checkpoint holds averaged weights in half precision.
python -m batch_tokenizer.training \
  --data "$folder/train.jsonl" --held_out "$folder/heard.jsonl" --out "$folder/run" "$@"

# 4. Scores of clips that it did not learn from, by voice, and the model card.
# shellcheck disable=SC2086 # names of metrics, one word each
python -m batch_tokenizer evaluate --data_list "$folder/scored.jsonl" --model_path "$folder/run/checkpoint" \
  --by voice --num_quantizers 4 8 20 --metrics ${METRICS:-stoi pesq_wb sim mos level_change} \
  --out "$folder/scores" --overwrite
python "$here/model_card.py" "$folder"
