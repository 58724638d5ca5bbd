"""Every recipe runs end to end on the embedded shards, in both precisions, and moves between modalities by its YAML alone."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import headwater
from headwater import cli
from headwater.datamodules.writer import ShardWriter
from headwater.training.meters import Meters

CONFIGS = Path(cli.__file__).parent / "configs"
RECIPES = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
SMALL = {
    "trainer.max_steps": 2,
    "trainer.accelerator": "cpu",
    "trainer.log_every_n_steps": 1,
    "trainer.limit_val_batches": 1,
    "data.workers": 0,
    "data.batch_size": 4,
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Meters.__init__, "__defaults__", (1, 8, False))  # measured in every step


def fit(recipe, **more):
    """The run folder, its summary, and every logged value by name."""
    options = SMALL | {name.replace("__", "."): value for name, value in more.items()}
    cli.main(["fit", "--config", recipe, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    folder = Path("runs", Path(recipe).stem, "000")
    logged = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            logged.setdefault(row["name"], []).append(float(row["value"]))
    return folder, json.loads((folder / "summary.json").read_text()), logged


def finite(logged, *prefixes):
    values = {name: value for name, value in logged.items() if name.startswith(prefixes)}
    assert values, f"found nothing logged under {prefixes}, only {sorted(logged)}"
    assert all(math.isfinite(v) for value in values.values() for v in value), values


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_and_exports_what_loads(recipe):
    folder, summary, logged = fit(recipe)
    assert summary["step"] == 2
    finite(logged, "train/")
    finite(logged, "meters/")
    assert not summary["skipped"]
    backbone = headwater.load_backbone(folder / "backbone")
    assert set(backbone.reader) == set(backbone.card["modalities"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_in_bfloat16(recipe):
    _, summary, logged = fit(recipe, trainer__precision="bf16-mixed")
    assert summary["step"] == 2
    finite(logged, "train/", "meters/")


def test_recipes_are_short_and_say_what_they_are():
    for name in RECIPES:
        lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
        assert len(lines) <= 40, name
        assert lines[0].startswith("# "), f"{name}: the first line says what the recipe is; `headwater recipes` prints it"
        assert lines[1].startswith("# mechanism: "), f"{name}: the second line names mechanisms; docs/objectives.md is made of it"


TRUNK = {"width": 32, "depth": 1}
MOVES = {  # modality -> its encoder, and shards that have it
    "image": ({"class_path": "Image", "init_args": {"size": 64, "patch": 16, "trunk": TRUNK}}, "embedded:things-train-*.tar"),
    "audio": ({"class_path": "Audio", "init_args": {"seconds": 1.0, "trunk": TRUNK}}, "embedded:sounds-train-*.tar"),
    "video": ({"class_path": "Video", "init_args": {"size": 56, "patch": 14, "trunk": TRUNK}}, "embedded:episodes-train-*.tar"),
    "action": ({"class_path": "Action", "init_args": {"slots": 3, "trunk": TRUNK}}, "robots.tar"),
}


@pytest.mark.parametrize("modality", MOVES)
def test_mae_moves_to_another_modality_by_its_name_and_encoder_alone(modality):
    with ShardWriter("robots.tar") as writer:  # the embedded episodes have choices; pixels are numbers, and so are these
        for k in range(8):
            file = io.BytesIO()
            np.save(file, np.random.default_rng(k).normal(size=(6 + k, 3)).astype(np.float32))
            writer.write(f"{k}", {"npy": file.getvalue()})
    recipe = yaml.safe_load((CONFIGS / "mae.yaml").read_text())
    encoder, shards = MOVES[modality]
    recipe["model"]["backbone"]["encoders"] = {modality: encoder}
    recipe["model"]["objective"]["init_args"]["modality"] = modality
    recipe["data"]["train"] = {"moved": {"shards": shards}}
    Path("moved.yaml").write_text(yaml.safe_dump(recipe))
    folder, summary, logged = fit("moved.yaml")
    finite(logged, "train/masked", f"meters/{modality}/")
    assert min(logged["train/masked"]) > 0
    assert not summary["skipped"]
    assert list(headwater.load_backbone(folder / "backbone").reader) == [modality]
