#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Stop the run on all workers of a TPU, after it has saved a checkpoint.' \
    'PROJECT ZONE TPU_NAME' "$@"
worker_script stop
