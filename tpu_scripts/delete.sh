#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Delete a TPU and its queued resource: the costs end. The folder of the run stays in its bucket.' \
    'PROJECT ZONE TPU_NAME PROVISION' "$@"
delete_tpu
