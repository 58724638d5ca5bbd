"""Runs that are killed: whatever remains makes the same batches as a run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from recorder import read

STEPS = 48
TRUNK = {"width": 16, "depth": 1, "heads": 2}
RECIPE = {
    "model": {
        "backbone": {
            "encoders": {
                "image": {
                    "class_path": "Image",
                    "init_args": {"size": 32, "patch": 16, "trunk": TRUNK},
                },
                "text": {"class_path": "Text", "init_args": {"length": 32, "trunk": TRUNK}},
                "audio": {"class_path": "Audio", "init_args": {"seconds": 0.5, "trunk": TRUNK}},
            }
        },
        "objective": {
            "class_path": "Weighted",
            "init_args": {
                "parts": {
                    "words": {"class_path": "Causal", "init_args": {"modality": "text"}},
                    "patches": {"class_path": "Masked", "init_args": {"modality": "image"}},
                    "sound": {"class_path": "Masked", "init_args": {"modality": "audio"}},
                }
            },
        },
    },
    "data": {
        "batch_size": 12,
        "notice": 8,
        "workers": 2,
        "train": {
            "things": {"shards": "embedded:things-seen-*.tar", "modalities": ["image", "text"], "views": ["image"], "weight": 2},
            "sounds": {"shards": "embedded:sounds-test-*.tar", "modalities": ["audio"], "views": ["audio"]},
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": STEPS, "logger": False},
}
CHANGES = '{"10": {"things": 1, "sounds": 3}, "25": {"things": 5, "sounds": 1}}'


@pytest.fixture
def launch(tmp_path):
    """Start `headwater fit` on the recipe in a folder of its own, with every batch written down."""

    def start(name, *options):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        recorder = {"class_path": "recorder.Recorder", "init_args": {"file": str(folder / "batches.jsonl"), "weights": CHANGES}}
        recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], "callbacks": [recorder]}}
        (folder / "run.yaml").write_text(yaml.safe_dump(recipe))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "headwater.cli", "fit", "--config", "run.yaml", "--checkpoint_every", "3", *options]
        with (folder / "said.txt").open("a") as said:
            return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True)

    return start


def finish(run, folder):
    assert run.wait(200) == 0, (folder / "said.txt").read_text()[-3000:]


def reach(run, folder, step):
    """Wait until a step is being made, then kill the run with all its ranks and workers."""
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if (folder / "batches.jsonl").exists() and f'"step": {step},' in (folder / "batches.jsonl").read_text():
            break
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def ids(seen):
    """step -> ids of the global batch, rows back in their order."""
    out = {}
    for step, ranks in seen.items():
        world = len(ranks)
        total = [None] * sum(len(found) for found, _ in ranks.values())
        for rank, (found, _) in ranks.items():
            total[rank::world] = found
        out[step] = total
    return out


@pytest.mark.slow
def test_ten_kills_change_nothing(launch, tmp_path):
    finish(launch("whole"), tmp_path / "whole")
    whole = read(tmp_path / "whole" / "batches.jsonl")
    assert sorted(whole) == list(range(STEPS))
    draw = random.Random(0)
    for step in sorted(draw.sample(range(1, STEPS - 1), 10)):
        resume = ["--resume"] if (tmp_path / "killed").exists() else []
        reach(launch("killed", *resume), tmp_path / "killed", step)
    finish(launch("killed", "--resume"), tmp_path / "killed")
    assert read(tmp_path / "killed" / "batches.jsonl") == whole
    shares = {source: sum(i >> 40 == source for step in range(STEPS) for i in ids(whole)[step]) for source in (0, 1)}
    assert 0.5 < shares[0] / shares[1] < 4  # both changes of weights took place


@pytest.mark.slow
def test_other_ranks_and_workers_go_on_with_the_same_sequence(launch, tmp_path):
    finish(launch("whole", "--data.workers", "0"), tmp_path / "whole")
    whole = ids(read(tmp_path / "whole" / "batches.jsonl"))
    for ranks, workers, until in ((2, 0, 12), (3, 2, 26), (1, 1, None)):
        resume = ["--resume"] if (tmp_path / "changed").exists() else []
        run = launch("changed", "--trainer.devices", str(ranks), "--data.workers", str(workers), *resume)
        finish(run, tmp_path / "changed") if until is None else reach(run, tmp_path / "changed", until)
        (tmp_path / "changed" / "batches.jsonl").rename(tmp_path / f"{ranks}.jsonl")
    made = {}
    for ranks in (2, 3, 1):
        seen = read(tmp_path / f"{ranks}.jsonl")
        complete = {step: found for step, found in seen.items() if len(found) == ranks}
        assert len(seen) - len(complete) <= 1  # the step in which it was killed
        made |= ids(complete)
    assert made == whole
