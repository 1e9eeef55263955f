#!/usr/bin/env bash
# Train on the classes that a Select job kept, then score all particles with the trained model.
#
#     bash examples/train_from_select.sh [FOLDER]
#
# FOLDER is for a new project (cryofilter_example if not given); one that is there is used again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=${1:-cryofilter_example}
[ -d "$project" ] || python "$here/simulate.py" "$project"
cd "$project"

relion_cryofilter train --in_parts Select/job003/particles.star --o trained/
relion_cryofilter score --in_parts Extract/job001/particles.star \
    --weights trained/model.safetensors --threshold recall=0.9 --o scored_by_trained/
