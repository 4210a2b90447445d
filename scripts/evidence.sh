#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Does balancing help? The small version of docs/evidence.md: about forty minutes on two CPU cores, then a page.
#
#   bash scripts/evidence.sh               on phantoms in which one sequence drowns out the others
#   bash scripts/evidence.sh DIR           on a folder of cases of your own, at about 2 mm (scripts/prepare_2mm.py)
#   bash scripts/evidence.sh [DIR] OPTION… options of monai-cggm compare, e.g. --set epochs=120
#
# OUT is the folder to write to (default: evidence/ in the checkout). It can be stopped and started again: what is
# finished is kept. For research use only.
set -euo pipefail

data=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  data="$(cd "$1" && pwd)"
  shift
fi

# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
out="${OUT:-$MONAI_CGGM_ROOT/evidence}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export MPLBACKEND=Agg

if [ -z "$data" ]; then
  data="$out/phantoms"
  monai_cggm_say "making phantoms in $data: T1ce shows the lesions, the other sequences a third of their contrast"
  monai-cggm phantom "$data" --cases 33 --seed 21 --informativeness flair=0.35,t1=0.35,t2=0.35
fi
started=$SECONDS
monai_cggm_say "training and scoring; stop it whenever you like"
monai-cggm compare small --data "$data" --out "$out/comparison" "$@"
monai_cggm_say "compared in $((SECONDS - started)) s; open $out/comparison/report.html"
