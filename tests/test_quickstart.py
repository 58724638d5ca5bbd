"""The main job, whole: what the README's first command promises. Slow; run by name or with -m slow."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)


def run(folder, seed):
    """Seconds of training and evaluation, and the summary, of one quickstart."""
    seeds = ["--seed_everything", str(seed), "--model.seed", str(seed), "--data.seed", str(seed)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    began = time.monotonic()
    command = [sys.executable, "-m", "headwater.cli", "fit", "--config", "quickstart", "--runs", str(folder / str(seed)), *seeds]
    subprocess.run(command, check=True, env=environment)
    return time.monotonic() - began, json.loads((folder / str(seed) / "quickstart/000/summary.json").read_text())


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """Median of three seeds: held-out retrieval at 3x chance, actions above both trivial answers; intervals above them."""
    runs = [run(tmp_path, seed) for seed in SEEDS]
    print("seconds:", [round(seconds) for seconds, _ in runs])
    found = [{(r["source"], r["metric"]): r for r in summary["results"]} for _, summary in runs]
    for pair in ("image->text", "text->image", "audio->text", "text->audio"):
        rows = [results["seen", f"{pair} R@5"] for results in found]
        chance = rows[0]["against"]["chance"]
        print(pair, [round(row["value"], 3) for row in rows], "chance", round(chance, 3))
        assert statistics.median(row["value"] for row in rows) >= 3 * chance
        assert statistics.median(row["low"] for row in rows) > chance
    rows = [results["episodes", "action accuracy"] for results in found]
    print("action", [round(row["value"], 3) for row in rows], rows[0]["against"])
    assert statistics.median(row["value"] for row in rows) > max(rows[0]["against"].values())
    folder = tmp_path / "0/quickstart/000"
    names = {p.name for p in folder.iterdir()}
    assert {"metrics.csv", "config.yaml", "checkpoints", "backbone", "losses.png", "retrieval.png", "tensorboard"} <= names


@pytest.mark.slow
def test_the_wheel_alone_runs_the_quickstart_from_any_folder(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", str(ROOT), "-w", str(tmp_path)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "empty")], check=True)
    python = tmp_path / "empty/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()
    command = [tmp_path / "empty/bin/headwater", "fit", "--config", "quickstart", "--trainer.max_steps", "4"]
    subprocess.run(command, check=True, cwd=elsewhere)
    assert (elsewhere / "runs/quickstart/000/backbone/card.yaml").exists()
