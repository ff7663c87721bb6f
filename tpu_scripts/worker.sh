#!/usr/bin/env bash
# What the other scripts run on each worker of a TPU, over ssh:
#
#   worker.sh setup PYTHON_VERSION gs://BUCKET/FOLDER [gs://DATA]
#   worker.sh start gs://BUCKET/FOLDER CONFIG [ARGUMENTS of jaxdiff train]
#   worker.sh status     prints "jaxdiff-run: running", "exited CODE", "lost" or "idle"
#   worker.sh stop       has the run save and end
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
home=$HOME/jaxdiff-run # tpu_scripts/lib.sh has the same
venv=$home/venv
pid_file=$home/pid   # of the run, or of the last one
exit_file=$home/exit # its exit code, once it has ended

fail() { printf 'jaxdiff-run: error: %s\n' "$*" >&2 && exit 1; }

retry() {
    local left=10
    until "$@"; do
        ((left -= 1)) || return 1
        sleep 15 # a fresh machine updates itself, and holds apt's lock
    done
}

is_running() {
    [[ -f $pid_file && ! -f $exit_file ]] && kill -0 "$(<"$pid_file")" 2>/dev/null
}

mount_point() { # gs://BUCKET/...
    local path=${1#gs://}
    printf %s "$home/buckets/${path%%/*}"
}

setup() {
    local python_version=$1 workdir=$2 data=${3:-}
    if is_running; then fail 'a run is going: stop it first (tpu_scripts/stop.sh)'; fi
    mount_bucket "$workdir"
    export PATH=$HOME/.local/bin:$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    [[ -x $venv/bin/python ]] || uv venv --python "$python_version" "$venv"
    uv pip install --python "$venv/bin/python" --constraint "$here/constraints.txt" \
        --reinstall-package jaxdiff "${here}[tensorboard,parquet]" 'jax[tpu]'
    if [[ -n $data ]]; then
        mkdir -p "$home/data"
        gcloud storage rsync --recursive "$data" "$home/data"
    fi
    ln -sfn "$here" "$home/repo"
    echo 'jaxdiff-run: set up'
}

mount_bucket() {
    local bucket=${1#gs://} folder probe
    bucket=${bucket%%/*} folder=$(mount_point "$1")
    command -v gcsfuse >/dev/null || install_gcsfuse
    mkdir -p "$folder"
    # Without caches of names every worker sees at once what another one wrote; without streaming
    # what a run has synced is in the bucket, and not only what it has closed.
    mountpoint -q "$folder" || gcsfuse --implicit-dirs --rename-dir-limit=0 \
        --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
        --enable-streaming-writes=false "$bucket" "$folder"
    # A checkpoint is written under a temporary name and renamed: that must be one atomic step.
    probe=$folder/.probe-$HOSTNAME-$$
    mkdir -p "$probe/inner"
    if ! mv "$probe" "$probe-moved"; then
        rm -rf "$probe"
        fail "gs://$bucket cannot rename folders: it needs a hierarchical namespace (docs/pods.md)"
    fi
    rm -rf "$probe-moved"
}

install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt
    curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    retry sudo apt-get update -q
    retry sudo apt-get install -q -y gcsfuse
}

start() {
    local folder config=$2
    folder=$(mount_point "$1")
    local workdir=$folder/${1#gs://*/}
    shift 2
    if is_running; then fail 'a run is going already'; fi
    [[ -x $venv/bin/jaxdiff ]] || fail 'not set up (tpu_scripts/setup.sh)'
    [[ -f $home/repo/${config%%:*} ]] || fail "no such file in this commit: $config"
    mountpoint -q "$folder" || fail "the bucket is not mounted (tpu_scripts/setup.sh)"
    rm -f "$exit_file" "$pid_file"
    cd "$home"
    # Compiled programs outlive the machine.
    export JAX_COMPILATION_CACHE_DIR=$folder/.jax_cache
    setsid nohup bash "$here/tpu_scripts/worker.sh" train "$home/repo/$config" "$workdir" "$@" \
        >>"$home/train.log" 2>&1 </dev/null &
    for _ in {1..50}; do
        [[ -f $pid_file ]] && echo 'jaxdiff-run: started' && return
        sleep 0.1
    done
    fail "the run did not start; $home/train.log says why"
}

# The background process: it stays until the run ends, to note how.
train() {
    local config=$1 workdir=$2 code=0
    shift 2
    printf '=== %s: commit %s: %s %s\n' "$(date -u +%FT%TZ)" "$(basename "$here")" "$config" "$*"
    "$venv/bin/jaxdiff" train --config "$config" --workdir "$workdir" --quiet "$@" &
    echo $! >"$pid_file"
    wait $! || code=$?
    echo "$code" >"$exit_file"
}

status() {
    if is_running; then
        echo 'jaxdiff-run: running'
    elif [[ -f $exit_file ]]; then
        echo "jaxdiff-run: exited $(<"$exit_file")"
    elif [[ -f $pid_file ]]; then
        echo 'jaxdiff-run: lost' # the machine was restarted
    else
        echo 'jaxdiff-run: idle'
    fi
}

stop() {
    if is_running; then
        kill -TERM "$(<"$pid_file")"
        for _ in {1..3000}; do
            is_running || break
            sleep 0.2
        done
    fi
    status
}

command=${1:-}
case $command in
    setup | start | train | status | stop) shift && "$command" "$@" ;;
    *) fail "commands are setup, start, status and stop, got '$command'" ;;
esac
