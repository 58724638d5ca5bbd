"""Plans of several stages: one job equals chained jobs, every stage resumes, and what is printed is what happens."""

import csv
import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

import headwater
from headwater import cli
from headwater.datamodules.datamodule import ShardDataModule
from headwater.pretrainer import Pretrainer
from headwater.tools import stages as plan
from headwater.tools.stages import arguments, merged, recipe_of, stages_of
from headwater.tools.train import read_stages

TRUNK = {"width": 16, "depth": 1, "heads": 2}
STILL = {"class_path": "Named", "init_args": {"names": ["encoders.image"]}}
NAMES = ("begin", "mix", "decay")
RECIPE = {
    "model": {
        "backbone": {
            "encoders": {
                "text": {"class_path": "Text", "init_args": {"length": 12, "trunk": TRUNK}},
                "image": {"class_path": "Image", "init_args": {"size": 32, "patch": 16, "trunk": TRUNK}},
            }
        },
        "objective": {
            "class_path": "Weighted",
            "init_args": {
                "parts": {
                    "next": {"class_path": "Causal", "init_args": {"modality": "text"}},
                    "patches": {"class_path": "Latent", "init_args": {"modality": "image", "width": 16, "depth": 1}},
                }
            },
        },
        "schedule": {"class_path": "WSD", "init_args": {"warmup": 0.25, "decay": 0}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
    "data": {
        "batch_size": 4,
        "workers": 0,
        "train": {"things": {"shards": "embedded:things-train-*.tar", "modalities": ["image", "text"]}},
    },
    "trainer": {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1},
    "stages": [
        {"name": "begin"},
        {
            "name": "mix",
            "model": {
                "schedule": "headwater.training.schedules.constant",
                "backbone": {"frozen": ["image"], "encoders": {"text": {"init_args": {"length": 32}}}},
                "objective": {
                    "class_path": "Causal",
                    "init_args": {"modality": "text"},
                },
            },
            "data": {
                "unit": "sample",
                "train": {
                    "things": {"weight": 3, "modalities": ["text"]},
                    "missions": {"shards": "embedded:episodes-train-*.tar", "modalities": ["text"]},
                },
            },
            "carry": ["model", "optimizer"],
        },
        {
            "name": "decay",
            "model": {"schedule": {"init_args": {"warmup": 0, "decay": 1}}},
            "trainer": {"max_steps": 3, "callbacks": [{"class_path": "Freezing", "init_args": {"rules": [STILL]}}]},
            "carry": ["model"],
        },
    ],
}
FIT = ["fit", "--config", "plan.yaml", "--checkpoint_every", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plan.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def weights(folder):
    return {name: torch.load(Path(folder, name, "checkpoints/last.ckpt"), weights_only=True) for name in NAMES}


def rows(path):
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def assert_same(a, b):
    """Weights, optimizer states and metrics, bit by bit."""
    one, other = weights(a), weights(b)
    for name in NAMES:
        for key in ("state_dict", "optimizer_states"):
            assert_close(one[name][key], other[name][key], rtol=0, atol=0)
    assert rows(Path(a, "metrics.csv")) == rows(Path(b, "metrics.csv"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a plan that ran as one job, and what each of its steps had."""
    folder, seen = tmp_path_factory.mktemp("whole"), []
    (folder / "plan.yaml").write_text(yaml.safe_dump(RECIPE))
    step = Pretrainer.training_step

    def look(self, batch, batch_idx):
        out = step(self, batch, batch_idx)
        trains = sum(p.numel() for p in self.parameters() if p.requires_grad)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        seen.append((rate, trains, batch["text"].position.shape[1], batch["sample"].tolist()))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Pretrainer, "training_step", look)
        cli.main(FIT)
    return folder / "runs/plan/000", seen


def test_a_plan_leaves_what_a_run_leaves(whole):
    folder, seen = whole
    assert len(seen) == 11
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stages"] == {"begin": 4, "mix": 4, "decay": 3}
    assert headwater.load_backbone(folder / "backbone").card["step"] == 3
    losses = [int(row["step"]) for row in rows(folder / "metrics.csv") if row["name"].startswith("train/")]
    assert sorted(set(losses)) == list(range(11))
    for name in NAMES:
        assert {"metrics.csv", "config.yaml", "summary.json", "backbone", "checkpoints"} <= {
            p.name for p in (folder / name).iterdir()
        }


def test_what_happens_is_what_the_table_says(whole, monkeypatch):
    folder, seen = whole
    monkeypatch.chdir(folder.parent.parent.parent)
    stages = stages_of(recipe_of(FIT))
    runs, made = read_stages(FIT, stages)
    lines = [plan.line(stages, k, run, made[k]) for k, run in enumerate(runs)]
    at = [0, 4, 8]
    assert [one.length for one in lines] == ["4 steps", "4 steps", "3 steps"]
    for one, first in zip(lines, at, strict=True):
        assert one.trains.split()[0].replace(",", "") == str(seen[first][1])
    assert [row[0] for row in seen] == pytest.approx([0.01] * 8 + [0.01 * 2 / 3, 0.01 / 3, 0])
    assert [one.tokens for one in lines] == ["text 12, image 4", "text 32", "text 12, image 4"]
    assert max(row[2] for row in seen[:4]) <= 12 < max(row[2] for row in seen[4:8]) <= 32
    assert "things 75%, missions 25%" in lines[1].data
    assert [one.begins for one in lines] == ["anew", "model, optimizer", "model"]
    sources = [sum(i >> 40 for row in seen[a:b] for i in row[3]) for a, b in ((0, 4), (4, 8), (8, 11))]
    assert (sources[0] > 0, sources[1] > 0, sources[2] > 0) == (False, True, False)
    assert seen[8][3] != seen[0][3]  # not the samples that the first stage began with


def test_one_job_equals_chained_jobs(here, whole):
    for name in NAMES:
        cli.main([*FIT, "--stage", name])
    assert [p.name for p in Path("runs/plan").iterdir()] == ["000"]
    assert_same("runs/plan/000", whole[0])
    with pytest.raises(SystemExit, match="has been run already"):
        cli.main([*FIT, "--stage", "mix"])


@pytest.mark.slow
@pytest.mark.parametrize("stops", [3, 7, 9])
def test_every_stage_resumes(here, whole, monkeypatch, stops):
    step, count = Pretrainer.training_step, [0]

    def die(self, batch, batch_idx):
        if count[0] == stops:
            raise RuntimeError("the machine went away")
        count[0] += 1
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Pretrainer, "training_step", die)
    with pytest.raises(SystemExit, match="went away"):
        cli.main(FIT)
    assert not Path("runs/plan/000/summary.json").exists()
    monkeypatch.setattr(Pretrainer, "training_step", step)
    cli.main([*FIT, "--resume"])
    assert_same("runs/plan/000", whole[0])
    with pytest.raises(SystemExit, match="all finished"):
        cli.main([*FIT, "--resume"])


def test_the_order_of_samples_goes_on_where_data_is_carried(here, monkeypatch):
    recipe = deepcopy(RECIPE)
    recipe["stages"] = [{"name": "stable"}, {"name": "decay", "model": {"schedule": {"init_args": {"warmup": 0, "decay": 1}}}}]
    Path("plan.yaml").write_text(yaml.safe_dump(recipe))
    begun, make, step = [], ShardDataModule.train_dataloader, Pretrainer.training_step

    def look(self):
        begun.append((self.first, self.seed))
        return make(self)

    def stop(self, batch, batch_idx):
        self.trainer.should_stop = len(begun) == 1 and self.global_step == 1  # as a callback ends a stage early
        return step(self, batch, batch_idx)

    monkeypatch.setattr(ShardDataModule, "train_dataloader", look)
    monkeypatch.setattr(Pretrainer, "training_step", stop)
    cli.main(FIT)
    assert begun == [(0, 0), (2, 0)]
    assert json.loads(Path("runs/plan/000/summary.json").read_text())["stages"] == {"stable": 2, "decay": 4}


@pytest.mark.slow
def test_two_ranks_stay_for_all_stages(here, tmp_path):
    """Lightning launches the other rank once, for the first stage; it goes through the same plan."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(folder, *options):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "plan.yaml").write_text(yaml.safe_dump(RECIPE))
        command = [sys.executable, "-m", "headwater.cli", *FIT, "--trainer.devices", "2", *options]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]

    run("one")
    for name in NAMES:
        run("three", "--stage", name)
    assert_same("one/runs/plan/000", "three/runs/plan/000")


def changed(**stage):
    recipe = deepcopy(RECIPE)
    recipe["stages"][1] |= stage
    return recipe


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        (changed(name="begin"), [], ["begin, begin, decay", "different names"]),
        (changed(name="a/b"), [], ["a/b"]),
        (changed(modle={"micro": 2}), [], ["modle"]),
        (changed(carry=["weights"]), [], ["weights"]),
        (changed(trainer={"max_stepz": 3}), [], ["max_stepz"]),
        (changed(carry=["model", "objective"]), [], ["'mix'", "objective", "carry"]),
        (
            changed(model={"backbone": {"encoders": {"text": {"init_args": {"trunk": {"width": 32}}}}}}),
            [],
            ["'mix'", "model", "other shape"],
        ),
        (RECIPE, ["--stage", "middle"], ["middle", "begin, mix, decay"]),
        (RECIPE, ["--stage", "mix"], ["'begin' is finished"]),
        (RECIPE, ["--model.start.checkpoint", "x"], ["--model.start"]),
        (RECIPE, ["--resume"], ["no run"]),
        ({k: v for k, v in RECIPE.items() if k != "stages"}, ["--stage", "mix"], ["--stage mix", "no `stages`"]),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_a_mistake_in_a_plan_is_told_before_its_first_step(here, recipe, options, words):
    Path("plan.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stop:
        cli.main([*FIT, *options])
    for word in words:
        assert word in str(stop.value.code)
    assert not list(Path().glob("runs/*/*/*")), "something was left for a mistake"


def test_recipes_merge_key_by_key():
    base = {"a": {"class_path": "X", "init_args": {"p": 1, "q": 2}}, "b": [1, 2], "c": {"d": 1}}
    assert merged(base, {"a": {"init_args": {"q": 3}}})["a"] == {"class_path": "X", "init_args": {"p": 1, "q": 3}}
    assert merged(base, {"a": {"class_path": "X", "init_args": {"q": 3}}})["a"]["init_args"] == {"p": 1, "q": 3}
    assert merged(base, {"a": {"class_path": "Y"}})["a"] == {"class_path": "Y"}  # nothing of X stays
    assert merged(base, {"b": [3], "c": {"e": 2}, "f": None}) == {"a": base["a"], "b": [3], "c": {"d": 1, "e": 2}, "f": None}
    assert base["c"] == {"d": 1}


def test_seeds_and_sources_of_stages(here):
    recipe = deepcopy(RECIPE)
    two = {"things": None, "missions": {"shards": "embedded:episodes-train-*.tar", "modalities": ["text"]}}
    recipe["stages"] = [
        {"name": "a"},
        {"name": "b"},
        {"name": "c", "data": {"train": two}},
        {"name": "d", "data": {"train": two}},
        {"name": "e"},
    ]
    recipe["data"]["seed"] = 5
    Path("plan.yaml").write_text(yaml.safe_dump(recipe))
    stages = stages_of(recipe)
    made = [json.loads(arguments(FIT, stages, k, Path("runs/plan/000"))[2]) for k in range(5)]
    assert [one["data"]["seed"] for one in made] == [5, 5, 6, 6, 7]
    assert ["data" in one["model"].get("start", {}).get("carry", []) for one in made] == [False, True, False, True, False]
    assert list(made[2]["data"]["train"]) == ["missions"]
    assert made[1]["model"]["start"]["checkpoint"] == "runs/plan/000/a/checkpoints/last.ckpt"
    assert arguments([*FIT, "--stage=b", "--resume", "x", "--data.batch_size", "2"], stages, 1, None)[3:] == [
        "--checkpoint_every",
        "2",
        "--data.batch_size",
        "2",
    ]


def test_a_resumed_run_tells_what_changed(here, monkeypatch, capfd):
    recipe = {k: v for k, v in RECIPE.items() if k != "stages"}
    Path("plan.yaml").write_text(yaml.safe_dump(recipe))
    step, rates = Pretrainer.training_step, []

    def look(self, batch, batch_idx):
        out = step(self, batch, batch_idx)
        rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        if len(rates) == 3:
            raise RuntimeError("the machine went away")
        return out

    monkeypatch.setattr(Pretrainer, "training_step", look)
    with pytest.raises(SystemExit, match="went away"):
        cli.main(FIT)
    recipe["data"]["window"] = 8
    Path("plan.yaml").write_text(yaml.safe_dump(recipe))
    capfd.readouterr()
    cli.main([*FIT, "--resume", "--model.optimizer.lr", "0.002"])
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("│")]
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in said if " lr" in line or ".lr" in line or "window" in line
    ]
    assert cells == [
        ["data.window", "16", "8", "", "8"],
        ["model.optimizer.init_args.lr", "0.01", "0.01", "0.002", "0.002"],
    ]
    assert rates[-1] == pytest.approx(0.002)
