#!/usr/bin/env bash
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

begin 'Copy the folder of a run from its bucket to this machine; the TPU may be gone.' \
    'PROJECT WORKDIR=gs LOCAL_DIR CHECKPOINTS' "$@"
options=(--recursive)
[[ $CHECKPOINTS == yes ]] || options+=('--exclude=^checkpoints/.*')
run mkdir -p "$LOCAL_DIR"
run gcloud storage rsync "$WORKDIR" "$LOCAL_DIR" "${options[@]}" --project="$PROJECT"
