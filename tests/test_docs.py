"""What the pages say is true: code blocks run, command lines exist, links lead somewhere, help lines equal docstrings."""

import os
import re
import shlex
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import yaml

from headwater.cli import COMMANDS, TRAINING, recipe_path
from headwater.datamodules.collate import collate
from headwater.modalities import Text
from headwater.model import Model
from headwater.objectives import Masked
from headwater.trunk import Trunk

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?P<note><!-- not a test: [^\n]+ -->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
REMOTE = ("http://", "https://", "mailto:", "#")


class Block(NamedTuple):
    """A fenced block. line: of the page where its text starts."""

    language: str
    text: str
    line: int
    tested: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [Block(m["language"], m["text"], text.count("\n", 0, m.start("text")) + 1, not m["note"]) for m in FENCE.finditer(text)]


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def commands(text: str) -> list[list[str]]:
    """The `headwater ...` parts of shell lines, split into words."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    words = [shlex.split(part, comments=True) for part in parts]
    calls = [[word for word in one if not re.fullmatch(r"[A-Z_]+=.*", word)] for one in words]
    return [one for one in calls if one and Path(one[0]).name == "headwater"]


@pytest.mark.parametrize("page", named(p for p in PAGES if any(b.language == "python" for b in blocks(p))))
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = ModuleType(f"page_{page.stem}")  # classes of a page need a module that pickle and cards can name
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(page, module)


def run(page: Path, module: ModuleType) -> None:
    for block in blocks(page):
        if block.language == "python" and block.tested:
            code = "\n" * (block.line - 1) + block.text  # a traceback then names the line of the page
            exec(compile(code, str(page), "exec"), module.__dict__)


def test_the_examples_of_the_readme_meet_old_parts(monkeypatch):
    module = ModuleType("page_README_parts")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    run(ROOT / "README.md", module)
    model = Model({"heart": module.Heartbeat(Trunk(16, depth=1)), "text": Text(Trunk(16, depth=1))})
    columns = {name: reader.example(4, seed=0) for name, reader in model.readers.items()}
    rows = collate([dict(zip(columns, row)) for row in zip(*columns.values())], list(columns))
    batch = {name: model.readers[name].prepare(t) for name, t in rows.items()} | {"seed": torch.arange(4)}
    for make in (module.Typo, partial(Masked, modality="heart", ratio=0.5, width=16)):
        objective = make(model)
        hidden = objective.task(batch)
        for name, term in objective(model, hidden).items():
            assert term.number == objective.numbers(hidden)[name] > 0
            term.total.backward()
    assert all(p.grad is not None for p in model.encoder("heart").stem.parameters())


@pytest.mark.parametrize("page", named(PAGES))
def test_commands_exist(page):
    for block in blocks(page):
        for words in commands(block.text) if block.language == "bash" else ():
            if len(words) > 1 and not words[1].startswith("-"):
                assert words[1] in TRAINING or words[1] in COMMANDS, f"{page.name}:{block.line} names headwater {words[1]}"
            given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"]
            for name in given if block.tested else ():
                assert os.path.isfile(recipe_path(name)), f"{page.name}:{block.line} names the recipe {name}"


@pytest.mark.parametrize("page", named(PAGES))
def test_yaml_blocks_are_yaml(page):
    for block in blocks(page):
        if block.language == "yaml":
            assert yaml.safe_load(block.text), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        path = (page.parent / target.partition("#")[0]).resolve()
        if not target.startswith(REMOTE):
            assert path.exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_equals_docstring(name):
    module, _, function = COMMANDS[name][0].partition(":")
    first = getattr(import_module(module), function).__doc__.splitlines()[0]
    assert first.removesuffix(".") == COMMANDS[name][1]
