#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to a table of Dice scores: set up, make the demo data, train, evaluate. No GPU needed.
#
#   bash scripts/demo.sh                   on seeded phantoms, about five minutes on two cores
#   bash scripts/demo.sh DIR               on a folder of BraTS cases
#   bash scripts/demo.sh [DIR] OVERRIDE…   settings of the bundle, e.g. --epochs 20
#
# OUT is the folder to write to (default: demo/ in the checkout). Every run gets a folder of its own.
# For research use only.
set -euo pipefail

data=""
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  data="$(cd "$1" && pwd)"
  shift
fi

# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
out="${OUT:-$MONAI_CGGM_ROOT/demo}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export MPLBACKEND=Agg

if [ -n "$data" ]; then
  monai_cggm_say "checking the cases in $data"
  monai-cggm check "$data"
else
  set -- --epochs 120 "$@"  # phantoms are easy
  data="$out/phantoms"
  monai_cggm_say "making phantoms in $data"
  monai-cggm phantom "$data" --cases 12 --seed 0
fi

run="$out/run-$(date +%Y%m%d-%H%M%S)"
started=$SECONDS

# ---- the run: the only place with the bundle's own keys --------------------------------------------------------------
bundle="$MONAI_CGGM_ROOT/bundles/brats_cggm"
overlay="$MONAI_CGGM_ROOT/configs/hardware/cpu.yaml"
monai_cggm_say "training into $run"
python -m monai.bundle run --config_file "['$bundle/configs/train.yaml','$overlay']" \
  --bundle_root "$bundle" --dataset_dir "$data" --run_dir "$run" "$@"
monai_cggm_say "evaluating over whole volumes"
python -m monai.bundle run --config_file "['$bundle/configs/train.yaml','$overlay','$bundle/configs/evaluate.yaml']" \
  --bundle_root "$bundle" --dataset_dir "$data" --run_dir "$run" "$@"
# ----------------------------------------------------------------------------------------------------------------------

monai_cggm_say "trained and evaluated in $((SECONDS - started)) s; to see the curves:"
# With its whole path: the environment ends with this script.
printf '%q --logdir %q\n' "$(command -v tensorboard)" "$run"
