#!/usr/bin/env bash
# Renew requirements.lock: exact versions of everything that pyproject.toml, its development tools, the optional loggers
# and the launchers of multiruns need, without addresses or hashes, for every platform that Python 3.12 runs on.
# Versions that still fit are kept; `tools/lock.sh --upgrade` or `--upgrade-package NAME` renews them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv --version >/dev/null 2>&1 || { echo "error: lock: uv is needed (pip install uv)" >&2; exit 1; }
uv pip compile pyproject.toml --extra dev --extra loggers --extra sweep --python-version 3.12 --universal --quiet \
  --no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file requirements.lock "$@"
