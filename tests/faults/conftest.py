"""Launches the runs of the drill, waits for their steps, and compares what they leave."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

TRUNK = {"width": 16, "depth": 1, "heads": 2}
STEPS = 36
POISON = {23: float("nan"), 26: float("inf"), 29: 1e9}
RECIPE = {
    "model": {
        "backbone": {
            "encoders": {
                "image": {"class_path": "Image", "init_args": {"size": 32, "patch": 16, "trunk": TRUNK}},
                "text": {"class_path": "trouble.StuckText", "init_args": {"trunk": TRUNK}},
            },
            "fusion": {"class_path": "JointTokens", "init_args": {"trunk": TRUNK}},
            "space": 16,
        },
        "objective": {  # dropout, a teacher, a queue, masks: all that a run has to remember or to repeat
            "class_path": "Weighted",
            "init_args": {
                "parts": {
                    "words": {"class_path": "Causal", "init_args": {"modality": "text"}},
                    "patches": {"class_path": "Masked", "init_args": {"modality": "image"}},
                    "pair": {"class_path": "Contrastive", "init_args": {"momentum": 0.9, "queue": 24}},
                }
            },
        },
        "guard": {"class_path": "headwater.training.guard.Guard", "init_args": {"spike": 20, "action": "skip"}},
    },
    "data": {
        "batch_size": 8,
        "workers": 1,
        "train": {"things": {"shards": "embedded:things-seen-*.tar", "modalities": ["image", "text"], "views": ["image"]}},
    },
}


class Drill:
    """Runs of one recipe in folders of their own. ranks, strategy: of every run. pause: seconds after each step."""

    def __init__(self, root, ranks=2, strategy="auto", steps=STEPS, every=5, pause=0.05):
        self.root, self.steps, self.every = root, steps, every
        callbacks = [
            {"class_path": "trouble.Pids", "init_args": {"pause": pause}},
            {"class_path": "trouble.Poison", "init_args": {"steps": POISON, "rank": ranks - 1}},
            {"class_path": "headwater.training.meters.Meters", "init_args": {"every": 4}},
        ]
        trainer = {"accelerator": "cpu", "devices": ranks, "max_steps": steps, "log_every_n_steps": 1, "callbacks": callbacks}
        self.recipe = {**RECIPE, "trainer": {**trainer, "strategy": strategy}}

    def start(self, name, *options, patience=60, end=120, before=()):
        """`headwater fit` in a session of its own, as a scheduler starts it. before: words in front of the command."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        watch = {"class_path": "headwater.training.watchdog.Watchdog", "init_args": {"patience": patience, "end": end}}
        callbacks = [*self.recipe["trainer"]["callbacks"], watch]
        recipe = {**self.recipe, "trainer": {**self.recipe["trainer"], "callbacks": callbacks}}
        (folder / "drill.yaml").write_text(yaml.safe_dump(recipe))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        command = [*before, sys.executable, "-m", "headwater.cli", "fit", "--config", "drill.yaml"]
        command += ["--checkpoint_every", str(self.every), *options]
        with (folder / "said.txt").open("w") as said:
            run = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)
        return Run(run, folder)


class Run:
    """One launch."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder
        self.made = folder / "runs/drill/000"

    @property
    def said(self):
        return (self.folder / "said.txt").read_text()

    def pid(self, rank):
        return int((self.folder / f"pid-{rank}").read_text())

    def kill(self, rank, number):
        os.kill(self.pid(rank), number)

    def checkpoints(self):
        """Names, the newest last."""
        return sorted(p.name for p in (self.made / "checkpoints").glob("step-*.ckpt"))

    def reach(self, condition, seconds=300):
        """Wait until it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.02)

    def reach_step(self, step):
        """Wait until a step is logged, by this launch or one before it."""
        metrics = self.made / "metrics.csv"
        self.reach(lambda: metrics.exists() and f"\n{step}," in metrics.read_text())

    def ends(self, status, seconds=300):
        """It ends so, within that time, and leaves no process behind."""
        assert self.process.wait(seconds) == status, self.said[-3000:]
        deadline = time.monotonic() + 10
        while alive(self.process.pid):
            assert time.monotonic() < deadline, f"left behind: {alive(self.process.pid)}\n{self.said[-3000:]}"
            time.sleep(0.05)

    def result(self):
        """All that a finished run leaves, but for times and paths."""
        state = torch.load(self.made / "checkpoints/last.ckpt", weights_only=True)
        texts = {name: (self.made / name).read_text() for name in ("metrics.csv", "summary.json", "guard.jsonl")}
        state["loops"] = None  # how often Lightning started is not the same
        return {**texts, "backbone": (self.made / "backbone/weights.safetensors").read_bytes(), **state}


def alive(session):
    """Processes of a session that are still there."""
    out = subprocess.run(["ps", "-o", "pid=,stat=,args=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in out.splitlines() if line.split()[1][0] != "Z"]


def same(a, b):
    """Equal, bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def equal(a, b):
    """The results of two runs are the same; names what is not."""
    differing = [name for name in a if not same(a[name], b[name])]
    assert a.keys() == b.keys()
    assert not differing


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A drill of two ranks."""
    return Drill(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def straight(two):
    """What a run leaves that nothing happens to but poison."""
    run = two.start("straight")
    run.ends(0)
    return run


def signal_all(run, number):
    """As a scheduler does: every process of the job gets it."""
    os.killpg(run.process.pid, number)


TERM, KILL, STOP = signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP
