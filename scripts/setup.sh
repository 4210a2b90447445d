#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts: `. scripts/setup.sh [EXTRA]` leaves an active Python environment that holds monai_cggm
# (from this checkout, editable) with the pinned dependencies. An environment that is active already is used; otherwise
# .venv is made in the checkout. PYTHON names the interpreter to make it with.

MONAI_CGGM_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

monai_cggm_say() { printf '==> %s\n' "$*" >&2; }

monai_cggm_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

monai_cggm_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

monai_cggm_find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if monai_cggm_is_new_enough "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  monai_cggm_fail "no Python 3.11 or newer among: ${PYTHON:-python3, python3.13, python3.12, python3.11, python};" \
    "install one, or name it with PYTHON=/path/to/python3"
}

# Sets and exports what `activate` would, without the prompt.
monai_cggm_activate() {
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    monai_cggm_say "using the active environment $VIRTUAL_ENV"
    export PATH="$VIRTUAL_ENV/bin:$PATH"
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
    monai_cggm_say "using the active environment $CONDA_PREFIX"
  else
    local venv="$MONAI_CGGM_ROOT/.venv" python
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
      python="$(monai_cggm_find_python)" || exit 1
      monai_cggm_say "making the environment $venv with $("$python" --version)"
      "$python" -m venv --clear "$venv" ||
        monai_cggm_fail "$python cannot make a virtual environment (on Debian and Ubuntu: install python3-venv)"
    fi
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    unset PYTHONHOME
  fi
  monai_cggm_is_new_enough python ||
    monai_cggm_fail "needs Python 3.11 or newer, but the environment has $(python --version 2>&1)"
  python -m pip --version >/dev/null 2>&1 || monai_cggm_fail "the environment has no pip: run python -m ensurepip"
}

# Installs only where the requirements of this checkout are not those that were installed last.
monai_cggm_install() {
  local extra="$1" stamp wanted started=$SECONDS quiet="--quiet --quiet"
  stamp="$(python -c 'import sys; print(sys.prefix)')/.monai_cggm-installed"
  wanted="$MONAI_CGGM_ROOT $(cat "$MONAI_CGGM_ROOT/pyproject.toml" "$MONAI_CGGM_ROOT/constraints.txt" | cksum)"
  if [ "$(cat "$stamp${extra:+-$extra}" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  monai_cggm_say "installing monai_cggm${extra:+ with its extra $extra} and pinned dependencies (minutes, only once)"
  # On a terminal pip's own progress bars show; in a log they would be noise.
  if [ -t 1 ]; then quiet=""; fi
  # shellcheck disable=SC2086  # none or two words
  python -m pip install $quiet --disable-pip-version-check --constraint "$MONAI_CGGM_ROOT/constraints.txt" \
    --editable "$MONAI_CGGM_ROOT${extra:+[$extra]}"
  # An install with an extra is one without it, too.
  printf '%s\n' "$wanted" | tee "$stamp" "$stamp${extra:+-$extra}" >/dev/null
  monai_cggm_say "installed in $((SECONDS - started)) s"
}

monai_cggm_activate
monai_cggm_install "${1:-}"
