#!/usr/bin/env bash
# Parity of every reward with its publication's own package: builds their environment once, then runs the tests against it.
#   tests/parity/run.sh [pytest arguments]
# PYTHON=...      interpreter of the project (3.11 or newer, with the project's requirements); by default .venv/bin/python or python3
# PARITY_VENV=... where the scorers' environment lies, by default .venv-parity
# PIP_FLAGS=...   more flags for pip, e.g. an index with CPU wheels of torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
venv="${PARITY_VENV:-.venv-parity}"

if [ ! -f "$venv/.installed" ]; then
  "$python" -m venv "$venv"
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install ${PIP_FLAGS:-} -r tests/parity/requirements.txt
  # their own requirements pin what no longer installs beside a current torch
  # shellcheck disable=SC2086
  "$venv/bin/python" -m pip install ${PIP_FLAGS:-} --no-deps hpsv2==1.2.0 image-reward==1.5
  touch "$venv/.installed"
fi

TC_PARITY_PYTHON="$venv/bin/python" "$python" -m pytest -m extended -s tests/parity "$@"
