#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Install this repository, at a commit, on all workers of a TPU, and mount the bucket of the run.
The workers need no access to the repository: an archive of the commit is sent to them.' \
    'PROJECT ZONE TPU_NAME COMMIT PYTHON_VERSION WORKDIR=gs DATA' "$@"
setup_workers
