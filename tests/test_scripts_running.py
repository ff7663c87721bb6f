"""The scripts of tpu_scripts/ that watch, work and wait, in a pretended world."""

import pytest
from pretended import ROOT, SETTINGS, World


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# --- resume ---------------------------------------------------------------------------------------

# Files of the world: `tpu` (a state), `run` (what the workers answer), `ready` (set up), `finished`,
# `saved` (the checkpoints). Time passes in `sleep`, which then plays the test's `events`.
GCLOUD = """
has() { [[ -f $WORLD/$1 ]]; }
case "$*" in
    *' list '*) if has outage; then exit 1; elif has tpu; then cat "$WORLD/tpu"; fi ;;
    *' create '*) has tpu && exit 1; echo "$WAITING" > "$WORLD/tpu" ;;
    *' delete '*) rm -f "$WORLD"/{tpu,run,ready} ;;
    *metrics.json*) has finished ;;
    *checkpoints/*) has saved && cat "$WORLD/saved" ;;
    *) [[ $(<"$WORLD/tpu") == "$UP" ]] || exit 255
        case "$*" in
            *' status'*) if has run; then cat "$WORLD/run"; else echo 'jaxdiff-run: idle'; fi ;;
            *' setup '*) has broken && exit 1; : > "$WORLD/ready" ;;
            *' start '*) has ready || exit 1; printf 'jaxdiff-run: running\\n%.0s' 1 2 > "$WORLD/run" ;;
            *' stop'*) printf 'jaxdiff-run: exited 0\\n%.0s' 1 2 > "$WORLD/run" ;;
        esac ;;
esac
"""
SLEEP = """
[[ $1 == 7 ]] || exit 98
tick=$(($(<"$WORLD/tick") + 1)); echo "$tick" > "$WORLD/tick"
((tick < 40)) || exit 99
all() { printf 'jaxdiff-run: %s\\n' "$1" "$1" > "$WORLD/run"; }
if [[ -f $WORLD/tpu && $(<"$WORLD/tpu") == "$WAITING" ]]; then echo "$UP" > "$WORLD/tpu"; fi
source "$WORLD/events"
"""
VERBS = ("create", "delete", "scp", "setup", "start", "stop", "tail")
ATTEMPT = ["scp", "setup", "start"]


def watch(world, events, **settings):
    """Exit code, what resume.sh changed, in order, the ticks it took, and what it said."""
    queued = settings.get("PROVISION") != "direct"
    states = {"WAITING": "WAITING_FOR_RESOURCES", "UP": "ACTIVE"} if queued else {
        "WAITING": "CREATING", "UP": "READY"}  # fmt: skip
    world.fake("gcloud", GCLOUD)
    world.fake("sleep", SLEEP)
    world.write("tick", "0")
    world.write("events", events)
    known = SETTINGS | states | {"POLL_SECONDS": "7"}
    found = world.run("resume.sh", **known | settings)
    done = []
    for call in world.calls():
        words = " ".join(call)
        done += [verb for verb in VERBS if f" {verb} " in f"{words} ".replace("=", " ")][:1]
    return found.returncode, done, int(world.read("tick")), found.stderr


@pytest.mark.parametrize("kind", [("queued", "SUSPENDED"), ("direct", "PREEMPTED")], ids=str)
def test_a_preempted_run_is_continued_once_and_watched_to_its_end(world, kind):
    provision, taken = kind
    code, done, ticks, said = watch(
        world,
        f'case $tick in 4) echo {taken} > "$WORLD/tpu"; rm "$WORLD"/{{run,ready}} ;;'
        '9) : > "$WORLD/finished"; all "exited 0" ;; esac',
        PROVISION=provision,
    )
    assert done == ["create", *ATTEMPT, "delete", "create", *ATTEMPT]
    assert (code, ticks) == (0, 9), said  # it ended at the first look after the run did
    assert "finished: gs://bucket/runs/a" in said and "still there, and costs" in said


def test_a_finished_run_starts_nothing(world):
    world.write("finished")
    assert watch(world, "", DELETE_AT_END="yes")[:3] == (0, ["delete"], 0)


def test_a_run_already_going_is_left_alone_through_an_outage(world):
    world.write("tpu", "ACTIVE")
    world.write("run", "jaxdiff-run: running\njaxdiff-run: running\n")
    events = (
        'case $tick in 2) : > "$WORLD/outage" ;; 5) rm "$WORLD/outage"; echo REPAIRING > "$WORLD/tpu" ;;'
        '7) echo ACTIVE > "$WORLD/tpu" ;; 9) : > "$WORLD/finished" ;; esac'
    )
    assert watch(world, events, DELETE_AT_END="yes")[:3] == (0, ["delete"], 9)


def test_a_run_that_keeps_failing_is_given_up(world):
    events = '[[ ! -f $WORLD/run ]] || all "exited 1"'
    code, done, _, said = watch(world, events)
    assert (code, done) == (1, ["create", *3 * ATTEMPT, "tail"])
    assert "failure 3 of 3" in said and "still there, and costs" in said


def test_failures_between_checkpoints_do_not_add_up(world):
    # It fails at every other look, and has saved a new checkpoint each time until tick 10.
    events = """
    if [[ -f $WORLD/run ]] && ((tick % 2)); then all 'exited 1'; fi
    if ((tick < 10)); then echo "checkpoints/$tick" > "$WORLD/saved"; fi
    """
    code, done, ticks, said = watch(world, events, MAX_FAILURES="2", DELETE_AT_END="yes")
    assert code == 1 and done[-2:] == ["tail", "delete"] and 10 < ticks < 20
    assert done.count("start") >= 5 and done.count("create") == 1


def test_failures_on_a_tpu_that_was_taken_away_are_forgotten(world):
    events = """
    case $tick in
        3 | 8) all 'exited 1' ;;
        5) echo SUSPENDED > "$WORLD/tpu" ;;
        11) : > "$WORLD/finished" ;;
    esac
    """
    code, done, ticks, _ = watch(world, events, MAX_FAILURES="2")
    again = [*ATTEMPT, *ATTEMPT]
    assert (code, done, ticks) == (0, ["create", *again, "delete", "create", *again], 11)


def test_a_command_that_jaxdiff_refuses_is_not_tried_again(world):
    code, done, _, said = watch(world, '[[ ! -f $WORLD/run ]] || all "exited 2"')
    assert (code, done) == (1, ["create", *ATTEMPT, "tail"]) and "refused" in said


def test_workers_that_cannot_be_set_up_are_given_up(world):
    world.write("broken")
    code, done, _, said = watch(world, "", MAX_FAILURES="2", DELETE_AT_END="yes")
    assert (code, done) == (1, ["create", "scp", "setup", "scp", "setup", "tail", "delete"])
    assert "could not be set up: failure 2 of 2" in said


@pytest.mark.parametrize("other", ["exited 1", "idle"])
def test_a_run_that_goes_on_some_workers_only_is_stopped_and_continued(world, other):
    events = f"""
    if ((tick == 2)); then printf 'jaxdiff-run: %s\\n' '{other}' running > "$WORLD/run"; fi
    ((tick < 12)) || : > "$WORLD/finished"
    """
    code, done, ticks, _ = watch(world, events)
    assert (code, done, ticks) == (0, ["create", *ATTEMPT, "stop", *ATTEMPT], 12)


# --- the workers' side ----------------------------------------------------------------------------

UV = """
folder=$HOME/jaxdiff-run/venv/bin
if [[ $1 == venv ]]; then mkdir -p "$folder"; fi
cp "$WORLD/trainer" "$folder/jaxdiff"; cp "$WORLD/trainer" "$folder/python"
"""
# Saves and ends when told to; ends with 3 if it was started with "fail".
TRAINER = """#!/usr/bin/env bash
printf '%s\\n' "$JAX_COMPILATION_CACHE_DIR" "$@" > "$WORLD/trained"
if [[ ${!#} == fail ]]; then exit 3; fi
trap 'echo saved; exit 0' TERM
for _ in {1..1000}; do sleep 0.02; done  # and not for ever, should a test fail
"""


def worker(world, *arguments):
    return world.run("worker.sh", *arguments)


def wait_for(world, answer):
    for _ in range(200):
        if worker(world, "status").stdout == f"jaxdiff-run: {answer}\n":
            return True
    return False


def test_a_worker_is_set_up_and_runs_the_run(world):
    world.fake("uv", UV)
    world.fake("gcsfuse", 'touch "$WORLD/mounted"')
    world.fake("mountpoint", '[[ -f $WORLD/mounted ]]')
    world.write("trainer", TRAINER)
    (world.folder / "trainer").chmod(0o755)
    assert worker(world, "status").stdout == "jaxdiff-run: idle\n"
    assert "not set up" in worker(world, "start", "gs://bucket/runs/a", "configs/digits.py").stderr

    home = world.folder / "jaxdiff-run"
    bucket = home / "buckets" / "bucket"
    found = worker(world, "setup", "3.12", "gs://bucket/runs/a", "gs://other/data")
    assert found.returncode == 0, found.stderr
    assert worker(world, "setup", "3.12", "gs://bucket/runs/a").returncode == 0  # twice: no harm
    names = [call[0] for call in world.calls() if call[0] != "mountpoint"]
    assert names == ["gcsfuse", "uv", "uv", "gcloud", "uv"]
    copy = ["gcloud", "storage", "rsync", "--recursive", "gs://other/data", f"{home}/data"]
    assert copy in world.calls()
    assert (home / "repo").resolve() == ROOT and not list(bucket.iterdir())

    start = ["start", "gs://bucket/runs/a", "configs/digits.py:small", "--config.data.path=a b"]
    assert worker(world, *start, "fail").stdout == "jaxdiff-run: started\n"
    assert wait_for(world, "exited 3")
    assert worker(world, *start).returncode == 0
    assert wait_for(world, "running")
    assert "going already" in worker(world, *start).stderr
    assert "stop it first" in worker(world, "setup", "3.12", "gs://bucket/runs/a").stderr
    assert worker(world, "stop").stdout == "jaxdiff-run: exited 0\n"
    assert world.read("trained").splitlines() == [
        f"{bucket}/.jax_cache", "train", "--config", f"{home}/repo/configs/digits.py:small", "--workdir",
        f"{bucket}/runs/a", "--quiet", "--config.data.path=a b",
    ]  # fmt: skip
    assert "saved" in (home / "train.log").read_text()

    (home / "exit").unlink()  # as if the machine had been restarted
    assert worker(world, "status").stdout == "jaxdiff-run: lost\n"
    missing = worker(world, "start", "gs://bucket/r", "configs/x.py")
    assert "no such file in this commit: configs/x.py" in missing.stderr


def test_a_bucket_that_cannot_rename_folders_is_refused(world):
    world.fake("gcsfuse")
    world.fake("mountpoint")
    world.fake("mv", "exit 1")
    found = worker(world, "setup", "3.12", "gs://flat/runs/a")
    assert found.returncode == 1 and "gs://flat cannot rename folders" in found.stderr
    assert not list((world.folder / "jaxdiff-run" / "buckets" / "flat").iterdir())


@pytest.mark.parametrize(
    "tasks, code, finished, requeued, devices",
    [("1", 0, True, False, "0,1,2,3"), ("1", 0, False, True, "0,1,2,3"), ("4", 1, False, False, "none")],
)
def test_a_slurm_job_queues_itself_again_until_the_run_is_finished(
    world, tasks, code, finished, requeued, devices
):
    done = 'mkdir -p "$WORLD/a" && : > "$WORLD/a/metrics.json"' if finished else ":"
    world.fake("srun", f'echo "${{JAX_LOCAL_DEVICE_IDS:-none}} ${{https_proxy:-}}"; {done}; exit {code}')
    found = world.run(
        "slurm_job.sh", "jaxdiff", "c.py", f"{world.folder}/a", "--config.seed=1", SLURM_JOB_ID="12",
        SLURM_NTASKS_PER_NODE=tasks, SLURM_GPUS_ON_NODE="4", SLURM_CPUS_PER_TASK="6", https_proxy="x",
    )  # fmt: skip
    assert found.returncode == code
    assert found.stdout.splitlines()[0] == f"{devices} "
    run = [
        "srun", "--kill-on-bad-exit=1", "--gpu-bind=none", "--cpus-per-task=6", "jaxdiff", "train",
        "--config", "c.py", "--workdir", f"{world.folder}/a", "--quiet", "--config.seed=1",
    ]  # fmt: skip
    assert world.calls() == [run] + requeued * [["scontrol", "requeue", "12"]]
