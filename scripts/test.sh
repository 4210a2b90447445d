#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Style, types and tests, with a set-up that needs nothing but Python.
#
#   bash scripts/test.sh                            the fast tests
#   bash scripts/test.sh --all                      also those that are slow or need real cases
#   bash scripts/test.sh tests/methods -k direction what follows goes to pytest
#
# MONAI_CGGM_TEST_DATA names the folder of real cases; tests that need them are skipped where it is absent.
# WORKERS is the number of tests run at a time (default: one a core, 4 at most; 0: in this process, as --pdb needs).
set -euo pipefail

all=false
if [ "${1:-}" = --all ]; then
  all=true
  shift
fi

# shellcheck source=scripts/setup.sh
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test
cd "$MONAI_CGGM_ROOT"

# Tests use tiny networks: one thread each, and one test a core, is faster than all cores for one test.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export MPLBACKEND=Agg
workers="${WORKERS:-$(python -c 'import os; print(min(os.cpu_count() or 1, 4))')}"

monai_cggm_say "ruff: style"
python -m ruff check
python -m ruff format --check
monai_cggm_say "mypy: types"
python -m mypy

if "$all"; then
  monai_cggm_say "pytest: every test, $workers at a time"
  # in the order of tests/conftest.py, not files with many tests first, which leaves the few long ones for the end
  python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@"
  if [ "$#" -eq 0 ]; then
    # Where MLflow is installed MONAI loads it at every start: its tests come last, with a folder of packages of their own.
    monai_cggm_say "pytest: the tests that need MLflow"
    packages="$(mktemp -d)"
    trap 'rm -rf "$packages"' EXIT
    python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --target "$packages" \
      mlflow-skinny sqlalchemy alembic
    PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" MLFLOW_DISABLE_TELEMETRY=true \
      python -m pytest tests/new_bundle/test_mlflow.py -m slow
  fi
  exit
fi
monai_cggm_say "pytest: the fast tests, $workers at a time; left out: those marked slow or real_data (--all runs them)"
exec python -m pytest --numprocesses "$workers" --dist loadfile -m "not slow and not real_data" "$@"
