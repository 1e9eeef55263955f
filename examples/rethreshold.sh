#!/usr/bin/env bash
# Sort particles again by other thresholds, without reading an image.
#
#     bash examples/rethreshold.sh [FOLDER]
#
# FOLDER is that of score.sh and train_from_select.sh, which are run first where need be.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=${1:-cryofilter_example}
[ -f "$project/scored/particles.star" ] || bash "$here/score.sh" "$project"
[ -f "$project/trained/model.safetensors" ] || bash "$here/train_from_select.sh" "$project"
cd "$project"

# By a number of particles, by a score ...
relion_cryofilter select --in_parts scored/particles.star --threshold count=200 --o best_200/
relion_cryofilter select --in_parts scored/particles.star --threshold 0.8 --o above_0.8/
# ... and so that 90 % of what is accepted is good, as far as the model was validated.
relion_cryofilter select --in_parts scored_by_trained/particles.star --threshold precision=0.9 \
    --weights trained/model.safetensors --o precise/
