#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Start, or continue, a run in the background on all workers of a TPU.' \
    'PROJECT ZONE TPU_NAME WORKDIR=gs CONFIG' "$@"
launch_run
