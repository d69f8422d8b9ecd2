#!/usr/bin/env bash
# Start the information-gain service in the foreground. Every flag goes to the service; see --help.
# Variables such as IG_PORT and IG_MODEL_PATH are read by the service itself; a flag wins over its variable.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ -z "${VIRTUAL_ENV:-}" && -x "$here/.venv/bin/python" ]]; then
  python="$here/.venv/bin/python"
else
  python="python3"
fi
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m IG.service.IG_server "$@"
