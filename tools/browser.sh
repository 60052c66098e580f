#!/usr/bin/env bash
# A browser for the tests of the review page, where this may be installed; without one those tests are skipped, and say so.
set -euo pipefail
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "setup: installing chromium for the tests of the review page" >&2
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 \
    || echo "setup: note: chromium could not be installed; the tests of the review page are skipped" >&2
else
  echo "setup: note: no chromium; the tests of the review page are skipped (apt-get install chromium chromium-driver)" >&2
fi
