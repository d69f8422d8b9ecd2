#!/usr/bin/env bash
# Start the information-gain service in the foreground. Every flag goes to the service; see --help.
# Variables such as IG_PORT and IG_MODEL_PATH are read by the service itself; a flag wins over its variable.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$root/scripts/python.sh"
exec "$python" -P -m IG.service.IG_server "$@"
