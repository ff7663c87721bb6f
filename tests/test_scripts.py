"""The scripts of tpu_scripts/, against commands that only pretend."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pretended import COMMIT, ROOT, SCRIPTS, SETTINGS, World

SHELL = sorted(SCRIPTS.glob("*.sh"))
COMMANDS = [p.name for p in SHELL if p.name not in ("lib.sh", "worker.sh", "slurm_job.sh")]
AT = "--project=my-project --zone=us-central2-b"
SSH = f"gcloud compute tpus tpu-vm ssh tpu-1 --worker=all --quiet --command={{!r}} {AT}"
REPO = "jaxdiff-run/repo/tpu_scripts/worker.sh"
CREATE = (
    "gcloud compute tpus queued-resources create tpu-1 --node-id=tpu-1 "
    "--runtime-version=tpu-ubuntu2204-base --accelerator-type=v4-32 --spot "
    f"--scopes=https://www.googleapis.com/auth/cloud-platform {AT}"
)
SETUP = [
    f"git -C {ROOT} archive --format=tar.gz --output=/t/jaxdiff-0123456789ab.tar.gz {COMMIT} jaxdiff "
    "configs tpu_scripts pyproject.toml constraints.txt README.md LICENSE",
    f"gcloud compute tpus tpu-vm scp /t/jaxdiff-0123456789ab.tar.gz tpu-1: --worker=all --quiet {AT}",
    SSH.format(
        "mkdir -p jaxdiff-run/0123456789ab && tar -xzf jaxdiff-0123456789ab.tar.gz -C "
        "jaxdiff-run/0123456789ab && bash jaxdiff-run/0123456789ab/tpu_scripts/worker.sh setup 3.12 "
        "gs://bucket/runs/a"
    ),
]
LAUNCH = SSH.format(f"bash {REPO} start gs://bucket/runs/a configs/digits.py")
LOGS = "jaxdiff-run/train.log jaxdiff-run/buckets/bucket/runs/a/metrics.jsonl"
DELETE = f"gcloud compute tpus queued-resources delete tpu-1 --force --quiet {AT}"
LIST = "gcloud compute tpus {} list --filter='name~/tpu-1$' --format='value({})' " + AT
FINISHED = "gcloud storage ls gs://bucket/runs/a/metrics.json --project=my-project"
STATUS, STOP = (SSH.format(f"bash {REPO} {verb}") for verb in ("status", "stop"))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


# --- the text of the scripts ----------------------------------------------------------------------


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is part of the test dependencies"
    scripts = [path for path in SHELL if path.name != "lib.sh"]
    for arguments in (["lib.sh"], ["--exclude=SC1091", *scripts]):  # SC1091: lib.sh is not followed
        found = subprocess.run([shellcheck, *arguments], text=True, capture_output=True, cwd=SCRIPTS)
        assert found.returncode == 0, found.stdout


def test_every_script_is_strict_and_parses():
    for path in SHELL:
        if path.name != "lib.sh":
            assert "\nset -euo pipefail\n" in path.read_text(), path.name
            assert os.access(path, os.X_OK), path.name
        subprocess.run(["bash", "-n", path], check=True)


def test_help_and_the_page_document_every_setting(world):
    settings = set(re.findall(r"^ {8}([A-Z_| ]+)(?:=gs)?\)$", (SCRIPTS / "lib.sh").read_text(), re.M))
    settings = {name for names in settings for name in names.split(" | ")}
    page = (ROOT / "docs" / "pods.md").read_text()
    documented = set()
    for script in COMMANDS:
        shown = world.run(script, "--help")
        assert shown.returncode == 0 and f"tpu_scripts/{script} [--dry-run] [--help]" in shown.stdout
        documented |= set(re.findall(r"^  ([A-Z_]+) +\S", shown.stdout, re.M))
        assert f"`{script}`" in page or f"tpu_scripts/{script}" in page, script
    assert documented == settings and len(settings) > 20
    for name in settings:
        assert f"`{name}`" in page, name
    assert not world.calls()


# --- what is run ----------------------------------------------------------------------------------

RSYNC = "gcloud storage rsync gs://bucket/runs/a runs/a --recursive {}--project=my-project"
SBATCH = (
    "sbatch --job-name=a --nodes={} --ntasks-per-node={} --gpus-per-node=4 --time=24:00:00 "
    "--signal=TERM@120 --requeue --open-mode=append --output=/runs/a.log {}"
    f"{SCRIPTS}/slurm_job.sh JAXDIFF {ROOT}/configs/digits.py /runs/a"
)
TRAIN = f"JAXDIFF train --config {ROOT}/configs/digits.py --workdir /runs/a"
DIRECT = {"PROVISION": "direct"}
RUNS = {
    "create": ("create.sh", {}, [], [CREATE]),
    "create a direct, reserved v6e in a network": (
        "create.sh",
        DIRECT | {"CAPACITY": "reserved", "ACCELERATOR_TYPE": "v6e-8", "SERVICE_ACCOUNT": "a@b.c",
                  "NETWORK": "net", "SUBNETWORK": "sub"},
        [],
        ["gcloud compute tpus tpu-vm create tpu-1 --version=v2-alpha-tpuv6e --accelerator-type=v6e-8 "
         "--reserved --service-account=a@b.c --network=net --subnetwork=sub "
         f"--scopes=https://www.googleapis.com/auth/cloud-platform {AT}"],
    ),
    "create on demand": (
        "create.sh", {"CAPACITY": "on-demand", "ACCELERATOR_TYPE": "v5p-8"}, [],
        [CREATE.replace(" --spot", "").replace("v4-32", "v5p-8")
         .replace("tpu-ubuntu2204-base", "v2-alpha-tpuv5")],
    ),
    "create a preemptible with a runtime": (
        "create.sh",
        DIRECT | {"CAPACITY": "preemptible", "ACCELERATOR_TYPE": "v5litepod-16",
                  "RUNTIME_VERSION": "mine"},
        [],
        ["gcloud compute tpus tpu-vm create tpu-1 --version=mine --accelerator-type=v5litepod-16 "
         f"--preemptible --scopes=https://www.googleapis.com/auth/cloud-platform {AT}"],
    ),
    "setup": ("setup.sh", {}, [], SETUP),
    "setup with data": (
        "setup.sh", {"DATA": "gs://other/data", "PYTHON_VERSION": "3.11"}, [],
        [*SETUP[:2], SETUP[2].replace("3.12", "3.11").replace("runs/a'", "runs/a gs://other/data'")],
    ),
    "launch": ("launch.sh", {}, [], [LAUNCH]),
    "launch with arguments": (
        "launch.sh", {}, ["--", "--config.train.steps=10", "--config.data.folder=a b", "--x='"],
        [["gcloud", "compute", "tpus", "tpu-vm", "ssh", "tpu-1", "--worker=all", "--quiet",
          f"--command=bash {REPO} start gs://bucket/runs/a configs/digits.py --config.train.steps=10 "
          "'--config.data.folder=a b' '--x='\\'''", *AT.split()]],
    ),
    "status": ("status.sh", {}, [], [LIST.format("queued-resources", "state.state"), STATUS]),
    "status of a direct one": ("status.sh", DIRECT, [], [LIST.format("tpu-vm", "state"), STATUS]),
    "stop": ("stop.sh", {}, [], [STOP]),
    "logs": (
        "logs.sh", {}, [],
        [SSH.format(f"tail -n 100 -F {LOGS}").replace("worker=all", "worker=0")],
    ),
    "logs of all": (
        "logs.sh", {"WORKER": "all", "LINES_SHOWN": "5"}, [],
        [SSH.format(f"tail -n 5 -F {LOGS}")],
    ),
    "collect": ("collect.sh", {}, [], ["mkdir -p runs/a", RSYNC.format("")]),
    "collect all but checkpoints": (
        "collect.sh", {"CHECKPOINTS": "no"}, [],
        ["mkdir -p runs/a", RSYNC.format("'--exclude=^checkpoints/.*' ")],
    ),
    "delete": ("delete.sh", {}, [], [DELETE]),
    "delete a direct one": (
        "delete.sh", DIRECT, [], [f"gcloud compute tpus tpu-vm delete tpu-1 --quiet {AT}"],
    ),
    "slurm": ("slurm.sh", {"WORKDIR": "/runs/a"}, [], [SBATCH.format(1, 1, "")]),
    "slurm by GPU": (
        "slurm.sh",
        {"WORKDIR": "/runs/a", "NODES": "2", "TASKS": "gpu", "CPUS_PER_TASK": "8", "PARTITION": "p",
         "ACCOUNT": "me"},
        ["--", "--config.seed=1"],
        [SBATCH.format(2, 4, "--cpus-per-task=8 --partition=p --account=me ") + " --config.seed=1"],
    ),
    "single node": ("single_node.sh", {"WORKDIR": "/runs/a"}, [], [TRAIN]),
    "single node, some GPUs": (
        "single_node.sh",
        {"WORKDIR": "/runs/a", "GPUS": "0,2", "CONFIG": "configs/digits.py:small"}, ["--", "--quiet"],
        [f"env CUDA_VISIBLE_DEVICES=0,2 {TRAIN} --quiet".replace(".py", ".py:small")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_dry_run_prints_the_commands_and_a_run_runs_them(world, case):
    script, settings, arguments, expected = RUNS[case]
    jaxdiff = str(world.bin / "jaxdiff")
    expected = [c if isinstance(c, list) else shlex.split(c) for c in expected]
    expected = [[word.replace("JAXDIFF", jaxdiff) for word in c] for c in expected]
    dry = world.run(script, "--dry-run", *arguments, **SETTINGS | settings)
    assert dry.returncode == 0, dry.stderr
    assert commands(dry.stdout) == expected
    assert not world.calls()

    for name in ("env", "mkdir"):
        world.fake(name)
    assert world.run(script, *arguments, **SETTINGS | settings).returncode == 0
    programs = [[Path(c[0]).name, *c[1:]] for c in expected]
    assert world.calls() == programs


def test_the_dry_run_of_resume_prints_what_it_may_run(world):
    dry = world.run("resume.sh", "--dry-run", **SETTINGS, DELETE_AT_END="yes")
    listed = LIST.format("queued-resources", "state.state")
    expected = [FINISHED, listed, CREATE, DELETE, STATUS, *SETUP, LAUNCH, STOP, DELETE]
    assert commands(dry.stdout) == [shlex.split(c) for c in expected]
    assert not world.calls()


# --- wrong settings -------------------------------------------------------------------------------

WRONG = {
    "PROJECT": ("create.sh", "", "PROJECT is not set: it must be the id of a Google Cloud project"),
    "ZONE": ("create.sh", "central", "ZONE must be a zone, such as us-central2-b, got 'central'"),
    "TPU_NAME": ("create.sh", "my tpu", "TPU_NAME must be a lower-case letter, then letters, digits"),
    "ACCELERATOR_TYPE": ("create.sh", "v7x-8", "v5litepod-N or v6e-N, got 'v7x-8'"),
    "PROVISION": ("delete.sh", "later", "PROVISION must be queued or direct, got 'later'"),
    "CAPACITY": (
        "create.sh", "preemptible",
        "CAPACITY must be spot, on-demand or reserved with PROVISION=queued, got 'preemptible'",
    ),
    "WORKDIR": ("launch.sh", "/runs/a", "WORKDIR must be gs://BUCKET/FOLDER, got '/runs/a'"),
    "CONFIG": ("launch.sh", "configs/none.py", "such as configs/digits.py, got 'configs/none.py'"),
    "COMMIT": ("setup.sh", "nowhere", "COMMIT must be a commit, branch or tag of this repository, got"),
    "DATA": ("setup.sh", "gs://b/$(x)", "DATA must be gs://BUCKET/FOLDER, got 'gs://b/$(x)'"),
    "PYTHON_VERSION": ("setup.sh", "3.10", "PYTHON_VERSION must be 3.11 or 3.12, got '3.10'"),
    "WORKER": ("logs.sh", "first", "WORKER must be the number of a worker, or all, got 'first'"),
    "POLL_SECONDS": ("resume.sh", "0", "must be a whole number of seconds, at least 1, got '0'"),
    "MAX_FAILURES": ("resume.sh", "-1", "MAX_FAILURES must be a whole number, at least 1, got '-1'"),
    "JAXDIFF": ("single_node.sh", "/no/jaxdiff", "JAXDIFF must be a program, got '/no/jaxdiff'"),
    "GPUS": ("single_node.sh", "0-3", "GPUS must be all, or numbers such as 0,1,2, got '0-3'"),
    "TASKS": ("slurm.sh", "core", "TASKS must be node or gpu, got 'core'"),
    "TIME_LIMIT": ("slurm.sh", "a day", "TIME_LIMIT must be [DAYS-]HOURS:MINUTES:SECONDS, got 'a day'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_named_before_anything_runs(world, name):
    script, value, message = WRONG[name]
    workdir = {"WORKDIR": "/runs/a"} if script in ("slurm.sh", "single_node.sh") else {}
    found = world.run(script, **SETTINGS | workdir | {name: value})
    assert found.returncode == 2
    assert message in found.stderr
    assert not found.stdout and not world.calls()


def test_all_wrong_settings_are_told_at_once_and_wrong_arguments_too(world):
    found = world.run("create.sh")
    assert found.returncode == 2
    for name in ("PROJECT", "ZONE", "TPU_NAME", "ACCELERATOR_TYPE"):
        assert f"{name} is not set" in found.stderr
    for arguments, message in ((["--dryrun"], "got '--dryrun'"), (["--", "x"], "no arguments after --")):
        found = world.run("create.sh", *arguments, **SETTINGS)
        assert (found.returncode, found.stdout) == (2, "") and message in found.stderr
    assert not world.calls()
