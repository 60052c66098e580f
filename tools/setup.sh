#!/usr/bin/env bash
# Make this checkout ready: system libraries, a virtual environment with exactly the packages of requirements.lock, and
# dtvla itself, editable. Everything that is already there is left alone; a second run takes well under a second.
#
#   tools/setup.sh               what every make target runs first
#   tools/setup.sh notebook      also the packages of an extra of pyproject.toml
#
# Settings (environment): PYTHON (a Python 3.12), VENV (default .venv), INSTALLER (uv or pip; default: uv where it can be had).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
INSTALLER=${INSTALLER:-}
EXTRA=${1:-}
STAMP=$VENV/.dtvla-setup
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} # some wheels are hundreds of megabytes

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { printf 'error: setup: %s\n' "$*" >&2; exit 1; }

fingerprint() { # what the environment is made from; another value means: install again
  { pwd -P; cat requirements.lock pyproject.toml tools/setup.sh; } | sha256sum | cut -d' ' -f1
}

# ---------------------------------------------------------------------------------------------------- Python and uv
is_python312() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; }

find_python() { # prints the path of a Python 3.12 outside any virtual environment; a name on the PATH may be a dead shim
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    is_python312 "$PYTHON" || fail "PYTHON=$PYTHON: not a working Python 3.12; choose another or unset PYTHON"
    set -- "$PYTHON"
  else
    set -- python3.12 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
      /usr/local/bin/python3.12 /usr/bin/python3.12 /opt/python*/bin/python3.12 \
      "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/cpython-3.12*/bin/python3.12
  fi
  for candidate in "$@"; do
    if is_python312 "$candidate"; then
      "$candidate" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))'
      return
    fi
  done
}

find_uv() { # prints the name of a uv that works
  local candidate
  for candidate in uv "$PWD/$VENV/bin/uv" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv"; do
    if "$candidate" --version >/dev/null 2>&1; then echo "$candidate"; return; fi
  done
}

# ------------------------------------------------------------------------------------------------- system libraries
missing_libraries() { "$1" tools/system_libraries.py | { grep "^$2" || true; } | cut -d' ' -f2 | xargs; }

system_libraries() { # argument: any Python 3
  local required optional package
  required=$(missing_libraries "$1" required)
  optional=$(missing_libraries "$1" optional)
  [[ -z $required$optional ]] && return
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "installing system packages: $required $optional"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >/dev/null || say "apt-get update failed; trying with the lists that are there"
    # shellcheck disable=SC2086
    [[ -z $required ]] || apt-get install -qq -y --no-install-recommends $required >/dev/null \
      || fail "apt-get could not install: $required"
    for package in $optional; do
      apt-get install -qq -y --no-install-recommends "$package" >/dev/null || say "note: $package could not be installed"
    done
    required=$(missing_libraries "$1" required)
    [[ -z $required ]] || fail "libraries of these packages are installed but cannot be loaded: $required"
  elif [[ -n $required ]]; then
    fail "system libraries are missing; ask an administrator to run (Debian, Ubuntu):" \
      "apt-get install $required $optional"
  elif [[ ! -e $STAMP ]]; then
    say "note: optional system packages are missing: $optional (apt-get install $optional)"
  fi
}

# ---------------------------------------------------------------------------------------------------------- install
make_environment() { # arguments: Python 3.12 or nothing, uv or nothing
  if [[ -e $VENV ]]; then
    if is_python312 "$VENV/bin/python"; then return; fi
    [[ -e $VENV/pyvenv.cfg || -z $(ls -A "$VENV") ]] || fail "$VENV is no virtual environment; remove it or set VENV"
    say "$VENV does not work with Python 3.12; making it anew"
    rm -rf "$VENV"
  fi
  if [[ -n $2 ]]; then
    "$2" venv --quiet --seed --python "${1:-3.12}" "$VENV" || fail "no Python 3.12: install it (Debian: python3.12" \
      "python3.12-venv; or pyenv, or uv python install 3.12), or name one with PYTHON=/path/to/python3.12"
  elif [[ -n $1 ]]; then
    "$1" -m venv "$VENV" || fail "$1 cannot make virtual environments; install its venv module (Debian: python3.12-venv)"
  else
    fail "no Python 3.12 found: install it (Debian: python3.12 python3.12-venv; or pyenv), or name one with PYTHON=..."
  fi
}

install_packages() { # arguments: uv or nothing, then the arguments of "pip install"
  local uv=$1
  shift
  if [[ -n $uv ]]; then
    # Compiled once here: uv leaves that to the first import, which a machine with PYTHONDONTWRITEBYTECODE repeats for ever.
    "$uv" pip install --quiet --compile-bytecode --python "$VENV/bin/python" "$@"
  else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  fi || fail "the installation stopped (see above); run the same command again, it continues"
}

main() {
  exec 9<requirements.lock
  if command -v flock >/dev/null; then flock 9; fi # two makes at once: the second waits and finds everything done
  if [[ -z $EXTRA && -x $VENV/bin/python && $(cat "$STAMP" 2>/dev/null) == "$(fingerprint)" ]]; then
    system_libraries "$VENV/bin/python"
    return
  fi
  local python uv=""
  python=$(find_python)
  [[ $INSTALLER == pip ]] || uv=$(find_uv)
  make_environment "$python" "$uv"
  system_libraries "$VENV/bin/python"
  if [[ -z $uv && $INSTALLER != pip ]]; then
    say "installing uv, the fast installer, into $VENV"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv || say "uv cannot be had; using pip"
    uv=$(find_uv)
  fi
  say "installing $(grep -c '==' requirements.lock) packages into $VENV with ${uv:-pip} (the first time about 7 GB)"
  install_packages "$uv" -r requirements.lock
  install_packages "$uv" --no-deps --no-build-isolation -e . # the build tool comes from the lock, too
  [[ -z $EXTRA ]] || install_packages "$uv" -c requirements.lock --no-build-isolation -e ".[$EXTRA]"
  fingerprint >"$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  say "done"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main; fi
