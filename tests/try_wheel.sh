#!/usr/bin/env bash
# Uses the gradxform that is installed in the environment $1 from an empty folder: a step of every
# method, the examples of the docstrings, and a short race.
set -euo pipefail
bin=$1
tests=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

"$bin/python" -W error "$tests/smoke.py"
"$bin/python" -m pytest --quiet --doctest-modules --pyargs gradxform -p no:cacheprovider \
  -o doctest_optionflags="NORMALIZE_WHITESPACE ELLIPSIS" -o filterwarnings=error
"$bin/gradxform" run digits_race --set training.epochs=2 --out race
test -s race/metrics.csv
