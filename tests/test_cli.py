"""The command line as a user meets it: one message per mistake, one override per change, exact resume."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from headwater import cli
from headwater.datamodules.index import load_index
from headwater.datamodules.writer import ShardWriter
from headwater.tools.shard import shard

SMALL = [
    "--trainer.max_steps",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--data.workers",
    "0",
    "--data.batch_size",
    "4",
    "--trainer.log_every_n_steps",
    "1",
]
TINY = [
    *("--model.backbone.encoders.image.trunk", "{width: 32, depth: 1}"),
    *("--model.backbone.encoders.text.trunk", "{width: 32, depth: 1}"),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(*options, recipe="clip"):
    """Run `headwater fit` in this process; returns the newest run folder and its summary."""
    cli.main(["fit", "--config", recipe, *options])
    folder = max((p for p in Path("runs", Path(recipe).stem).iterdir()), key=lambda p: int(p.name))
    return folder, json.loads((folder / "summary.json").read_text())


def refused(capsys, *options, recipe="clip"):
    """The message with which `headwater fit` ends before it makes a step."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config", recipe, *options])
    said = str(stop.value.code)
    assert said.startswith("headwater: ")
    assert not list(Path("runs").rglob("config.yaml")), "a step was made, or a run folder was left, for a mistake"
    return said


def test_importing_headwater_is_quick_and_leaves_torch_alone():
    code = "import time; t = time.perf_counter(); import headwater, sys; print(time.perf_counter() - t, 'torch' in sys.modules)"
    seconds, torch_loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(seconds) < 0.3
    assert torch_loaded == "False"


def test_help_lists_every_command_without_heavy_imports():
    code = (
        "import sys; from headwater.cli import main; main(['--help']); print('torch' in sys.modules, 'jsonargparse' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in [*cli.TRAINING, *cli.COMMANDS]:
        assert f"\n  {name} " in out
    assert out.endswith("False False\n")


def test_run_folder_holds_what_the_docs_say(here):
    folder, summary = fit(*SMALL, *TINY)
    names = {p.name for p in folder.iterdir()}
    assert {"metrics.csv", "config.yaml", "checkpoints", "backbone", "losses.png", "retrieval.png", "summary.json"} <= names
    assert summary["step"] == 2
    assert {r["metric"] for r in summary["results"]} == {"image->text R@5", "text->image R@5"}
    merged = yaml.safe_load((folder / "config.yaml").read_text())
    assert merged["trainer"]["max_steps"] == 2
    cli.main(["fit", "--config", str(folder / "config.yaml")])  # the merged config is a recipe
    assert (folder / "backbone/weights.safetensors").read_bytes() == Path(
        "runs/config/000/backbone/weights.safetensors"
    ).read_bytes()
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    cli.main(["validate", "--config", "clip", *SMALL, *TINY, "--ckpt_path", str(folder / "checkpoints/last.ckpt")])
    cli.main(["predict", "--config", "clip", *SMALL, *TINY, "--ckpt_path", str(folder / "checkpoints/last.ckpt")])
    written = load_file("predictions/seen.safetensors")
    assert written["sample"].tolist() == list(range(160))  # each once, though the last batch wraps round
    assert written["image"].shape == written["text"].shape == (160, 128)
    with pytest.raises(SystemExit, match=r"needs a checkpoint.*runs/clip/000/checkpoints/last.ckpt"):
        cli.main(["validate", "--config", "clip", *SMALL, *TINY])


def test_an_error_in_a_worker_ends_the_run(here):
    Path("mine.py").write_text(
        "import torch\nfrom headwater.modalities.text import Text, TextReader\nfrom headwater.trunk import Trunk\n"
        "class Broken(TextReader):\n    def tokens(self, signal, view=None):\n        t = super().tokens(signal)\n"
        "        return t._replace(position=t.position.expand(-1, 1 + len(t.x) % 3))\n"
        "class BrokenText(Text):\n    def __init__(self, trunk: Trunk):\n        super().__init__(trunk)\n"
        "        self.reader = Broken()\n"
    )
    model = [
        "--model.objective",
        "Causal",
        "--model.backbone.encoders",
        "{text: {class_path: mine.BrokenText, init_args: {trunk: {width: 32}}}}",
    ]
    run = launch(*SMALL, *model, "--data.workers", "1", "--trainer.callbacks", "null")
    said = run.communicate(timeout=100)[0]
    assert run.returncode == 1, said
    assert "DataLoader worker" in said


@pytest.mark.parametrize(
    ("recipe", "option", "value", "found"),
    [
        ("clip", "--model.objective", "Masked", "objective: class_path: headwater.objectives.Masked"),
        ("clip", "--model.objective.loss.temperature", "0.2", "temperature: 0.2"),
        ("clip", "--model.backbone.fusion", "JointTokens", "fusion: class_path: headwater.fusion.JointTokens"),
        ("flow", "--model.backbone.fusion.trunk.depth", "1", "fusion: class_path: headwater.fusion.JointTokens"),
        ("clip", "--model.backbone.encoders.image", "timm/test_vit", "image: timm/test_vit"),
        ("clip", "--trainer.precision", "bf16-mixed", "precision: bf16-mixed"),
    ],
)
def test_one_override_changes_one_thing(here, recipe, option, value, found):
    folder, summary = fit(*SMALL, option, value, recipe=recipe)
    assert summary["step"] == 2
    assert found in " ".join((folder / "config.yaml").read_text().split())


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (["--model.objective.direction", "forth"], ["direction", "expected one of", "directions"]),
        (["--model.objectiv", "Masked"], ["objectiv"]),
        (["--data.batchsize", "3"], ["batchsize"]),
        (["--model.objective", "Contrastiv"], ["Contrastiv", "expected", "Contrastive"]),
        (["--data.train.things.shards", "/nowhere/x.tar"], ["/nowhere/x.tar", "expected", "headwater shard"]),
        (["--data", "/nowhere"], ["/nowhere", "headwater shard"]),
        (["--model.objective.b", "audio"], ["no encoder for 'audio'", "image, text"]),
        (["--data.train.things.modalities", "[text]"], ["needs image, text", "provides things: text", "Add shards"]),
        (["--data.train.things.modalities", "[text, sound]"], ["sound", "no encoder of that name"]),
        (["--trainer.accumulate_grad_batches", "2"], ["accumulate_grad_batches=2", "model.micro"]),
        (["--trainer.gradient_clip_val", "1"], ["gradient_clip_val", "model.clip"]),
        (["--model.micro", "9"], ["4 rows", "micro=9"]),
        (["--resume"], ["no run"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_message_before_step_0(here, capsys, mistake, words):
    said = refused(capsys, *SMALL, *mistake)
    for word in words:
        assert word in said, said


def test_an_unknown_recipe_names_the_known_ones(here):
    with pytest.raises(SystemExit, match=r"clip.*quickstart"):
        cli.main(["fit", "--config", "nope"])


def test_an_unknown_key_in_a_recipe_file_is_named(here):
    text = (Path(cli.__file__).parent / "configs/clip.yaml").read_text().replace("batch_size:", "batchsize:")
    Path("mine.yaml").write_text(text)
    with pytest.raises(SystemExit, match="batchsize"):
        cli.main(["fit", "--config", "mine.yaml"])


def test_the_command_line_wins_wherever_the_recipe_stands():
    assert cli.translate(["fit", "--data=x", "--config", "clip"])[1] == "--config"
    assert cli.translate(["fit", "--resume", "--config", "clip"])[-2:] == ["--resume", "newest"]


def pictures(folder, n):
    for i in range(n):
        name = folder / "my & pics" / f"pic {i}.v1"
        name.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (40 + i, 30), (10 * i % 255, 80, 200))
        (picture.convert("P") if i % 2 else picture).save(f"{name}.png")
        Path(f"{name}.txt").write_text(f"picture number {i}")
    (folder / "my & pics" / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "my & pics" / "broken.txt").write_text("broken")


def test_own_folder_trains_without_yaml_or_python(here, capsys):
    pictures(here / "mine", 9)
    shard("mine", "out")
    assert "broken.png" in capsys.readouterr().out
    _, summary = fit(*SMALL, *TINY, "--data", "out/")
    assert summary["step"] == 2


def test_broken_members_are_named_skipped_and_reported(here, capsys):
    with ShardWriter("bad/train-{:03d}.tar", samples=20) as writer:
        for i in range(40):
            picture = here / "p.png"
            Image.new("RGB", (20, 20), (i * 6, 0, 0)).save(picture)
            content = b"not a picture" if i == 3 else picture.read_bytes()
            writer.write(f"{i:03d}", {"png": content, "txt": b"  " if i == 5 else b"a red square"})
    tar = Path("bad/train-001.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: load_index(tar).extent(15, ["png"]).offset + 10])  # cut in the middle of a member
    _, summary = fit(*SMALL, *TINY, "--data", "bad", "--trainer.max_steps", "12", "--data.fault_budget", "0.5")
    said = " ".join(summary["skipped"])
    assert "003.png" in said
    assert "005.txt: ValueError: the text is empty" in said
    assert "train-001.tar" in said
    assert "cut off" in said or "unexpected end" in said
    assert "003.png" in capsys.readouterr().out


def test_too_many_broken_members_stop_the_run_with_the_list(here):
    with ShardWriter("bad/train-{:03d}.tar") as writer:
        for i in range(40):
            writer.write(f"{i:03d}", {"png": b"not a picture", "txt": b"words"})
    with pytest.raises(SystemExit, match=r"budget(?s:.)*\.png: UnidentifiedImageError"):
        cli.main(["fit", "--config", "clip", *SMALL, *TINY, "--data", "bad", "--trainer.max_steps", "40"])


def launch(*options, recipe="clip", **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "headwater.cli", "fit", "--config", recipe, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **more)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_stopped_run_ends_like_the_uninterrupted_one(here, number):
    steps = ["--trainer.max_steps", "60", "--trainer.accelerator", "cpu", "--data.batch_size", "8", "--data.workers", "1"]
    steps += ["--trainer.log_every_n_steps", "1", *TINY, "--data", "out"]
    pictures(here / "mine", 20)
    with ShardWriter("out/{:03d}.tar") as writer:
        for i, path in enumerate(sorted(Path("mine/my & pics").glob("*.png"))):
            writer.write(str(i), {"png": path.read_bytes(), "txt": path.with_suffix(".txt").read_bytes()})
    straight = launch(*steps, "--runs", "straight")
    killed = launch(*steps, "--runs", "killed", start_new_session=True)
    metrics = Path("killed/clip/000/metrics.csv")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 12):
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(killed.pid, number)  # as a scheduler or a terminal does: the loader's workers get it too
    said = killed.communicate()[0]
    assert killed.returncode == 143, said
    assert "--resume killed/clip/000" in said
    assert straight.wait() == 0, straight.communicate()[0]
    again = launch(*steps, "--runs", "killed", "--resume")
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert "resuming killed/clip/000 from" in said
    (times,) = json.loads(Path("straight/clip/000/summary.json").read_text())["skipped"].values()
    assert times in (22, 23)  # the broken picture is counted each time it comes: 480 places over 21 samples
    for name in ("metrics.csv", "summary.json", "backbone/weights.safetensors"):
        assert Path("straight/clip/000", name).read_bytes() == Path("killed/clip/000", name).read_bytes(), name


@pytest.mark.slow
def test_two_devices_need_only_one_option(here):
    run = launch(*SMALL, *TINY, "--trainer.devices", "2")
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert [p.name for p in Path("runs/clip").iterdir()] == ["000"]
    assert json.loads(Path("runs/clip/000/summary.json").read_text())["results"][0]["n"] == 160


def test_out_of_memory_names_batch_tokens_and_what_to_lower():
    from headwater.pretrainer import explain_memory
    from headwater.tokens import Tokens

    batch = {"image": Tokens(torch.zeros(3, 4, 5), torch.zeros(3, 4, 1)), "sample": torch.arange(3)}
    with pytest.raises(MemoryError, match=r"3 samples.*'image': \(3, 4\).*batch_size.*micro.*size, frames"), explain_memory(batch):
        torch.empty(1 << 60)
