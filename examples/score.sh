#!/usr/bin/env bash
# Score simulated particles with the bundled model and keep the best 60 %.
#
#     bash examples/score.sh [FOLDER]
#
# FOLDER is for a new project (cryofilter_example if not given); one that is there is used again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
project=${1:-cryofilter_example}
[ -d "$project" ] || python "$here/simulate.py" "$project"
cd "$project"

relion_cryofilter score --in_parts Extract/job001/particles.star --threshold keep=0.6 --o scored/

echo "The first five scores, in the order of the input:"
head -n 5 scored/scores.csv
