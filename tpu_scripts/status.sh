#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Show the state of a TPU and, of each worker, whether the run goes or how it ended.' \
    'PROJECT ZONE TPU_NAME PROVISION' "$@"
tpu_state
worker_script status
