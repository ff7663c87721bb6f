#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Request a TPU: a queued resource with one node, or a plain TPU VM.' \
    'PROJECT ZONE TPU_NAME ACCELERATOR_TYPE RUNTIME_VERSION PROVISION CAPACITY SERVICE_ACCOUNT NETWORK
    SUBNETWORK' "$@"
create_tpu
