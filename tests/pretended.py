"""Commands that only pretend, for the scripts of tpu_scripts/."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
COMMIT = "0123456789ab" + 28 * "c"
SETTINGS = {
    "PROJECT": "my-project", "ZONE": "us-central2-b", "TPU_NAME": "tpu-1", "CONFIG": "configs/digits.py",
    "ACCELERATOR_TYPE": "v4-32", "WORKDIR": "gs://bucket/runs/a", "LOCAL_DIR": "runs/a", "TMPDIR": "/t",
    "GPUS_PER_NODE": "4",
}  # fmt: skip

# A program that notes how it was called, and goes on as the test wants.
FAKE = """#!/usr/bin/env bash
{ printf '%s\\001' "${0##*/}" "$@" && echo; } >> "$WORLD/calls"
source "$WORLD/${0##*/}"
"""
GIT = f"""
if [[ $3 == rev-parse ]]; then
    [[ $* != *nowhere* ]] && echo {COMMIT}
fi
"""


class World:
    """A folder with the programs that scripts find, and what they were called with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.fake("git", GIT)
        for name in ("gcloud", "jaxdiff", "sbatch", "srun", "scontrol"):
            self.fake(name)

    def fake(self, name: str, body: str = "") -> None:
        (self.bin / name).write_text(FAKE)
        (self.bin / name).chmod(0o755)
        (self.folder / name).write_text(body)

    def write(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    def calls(self) -> list[list[str]]:
        """What was run, but for the questions to git."""
        lines = [line.split("\001")[:-1] for line in self.read("calls").splitlines()]
        return [c for c in lines if c[0] != "git" or c[3] not in ("rev-parse", "cat-file")]

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        folder = str(self.folder)
        known = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": folder, "WORLD": folder}
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *arguments], env=known | environment, text=True,
            capture_output=True, timeout=60, cwd=folder,
        )  # fmt: skip
