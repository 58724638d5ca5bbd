"""The tables of docs/objectives.md: mechanism -> classes -> recipe, from docstrings and from the first lines of the recipes.

`python -m headwater.tools.methods` writes them anew into the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc, getmembers, isclass
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, NamedTuple

import yaml

from headwater import objectives

CONFIGS = Path(__file__).parent.parent / "configs"
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d+)")
PAGE = Path(__file__).parent.parent.parent / "docs/objectives.md"
BEGIN, END = "<!-- tables: python -m headwater.tools.methods -->\n", "<!-- end of the tables -->\n"


class Recipe(NamedTuple):
    """What a recipe file says of itself. classes: those below model.objective, in order; papers: arXiv numbers in its comments."""

    name: str
    line: str
    mechanisms: tuple[str, ...]
    classes: tuple[str, ...]
    papers: tuple[str, ...]


def recipe(path: Path) -> Recipe:
    """Its first line, the mechanisms of its second ("# mechanism: a, b (arXiv:1234.56789)"), and the classes of its objective.

    Raises ValueError where the second line names no mechanism.
    """
    text = path.read_text("utf-8")
    found = re.match(r"# (.+)\n# mechanism: ([\w, -]+)(.*\n(#.*\n)*)", text)
    if not found:
        raise ValueError(f"{path.name}: expected two comment lines first: what it is, and `# mechanism: NAME, NAME (arXiv:NUMBER)`")
    asked = yaml.safe_load(text)["model"].get("objective", {})
    classes = dict.fromkeys(name.rpartition(".")[2] for name in named({"class_path": asked} if isinstance(asked, str) else asked))
    mechanisms = tuple(one.strip() for one in found[2].split(","))
    return Recipe(path.stem, found[1], mechanisms, tuple(classes), tuple(dict.fromkeys(ARXIV.findall(found[0]))))


def named(value: Any) -> Iterator[str]:
    """Every class_path in nested settings, outer ones first."""
    if isinstance(value, dict):
        if "class_path" in value:
            yield value["class_path"]
        for inner in value.values():
            yield from named(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from named(inner)


def classes() -> list[type]:
    """Public classes of headwater.objectives, file by file."""
    modules = [import_module(m.name) for m in walk_packages(objectives.__path__, f"{objectives.__name__}.")]
    return [c for m in modules for n, c in getmembers(m, isclass) if c.__module__ == m.__name__ and not n.startswith("_")]


def sentence(cls: type) -> str:
    """The first sentence of its docstring, without the papers."""
    first = " ".join(cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    first = re.sub(r" \([^()]*(\([^()]*\)[^()]*)*arXiv[^()]*\)", "", first)
    return re.split(r"(?<=[.:]) (?=[A-Z])", first)[0].rstrip(".:").replace("|", "\\|")


def papers(*found: type) -> tuple[str, ...]:
    """arXiv numbers of the docstrings; an objective without any has those of its file."""
    numbers: dict[str, None] = {}
    for cls in found:
        whole = import_module(cls.__module__).__doc__ if issubclass(cls, objectives.Objective) else None
        numbers |= dict.fromkeys(ARXIV.findall(cls.__doc__ or "") or ARXIV.findall(whole or ""))
    return tuple(numbers)


def links(numbers: tuple[str, ...]) -> str:
    """arXiv numbers as links."""
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in numbers)


def link(one: Recipe) -> str:
    """A recipe's name with a link to its file."""
    return f"[{one.name}](../headwater/configs/{one.name}.yaml)"


def tables() -> str:
    """All three tables, as Markdown."""
    recipes, known = [recipe(path) for path in sorted(CONFIGS.glob("*.yaml"))], classes()
    out = ["## By mechanism", "", "| mechanism | recipe | what it is | classes | papers |", "| --- | --- | --- | --- | --- |"]
    for mechanism in sorted({m for one in recipes for m in one.mechanisms}):
        for one in recipes:
            if mechanism in one.mechanisms:
                used = [cls for name in one.classes for cls in known if cls.__name__ == name]
                names = ", ".join(f"`{name}`" for name in dict.fromkeys(cls.__name__ for cls in used))
                told = one.papers or papers(*(cls for cls in used if not issubclass(cls, objectives.Objective)))
                out.append(f"| {mechanism} | {link(one)} | {one.line} | {names} | {links(told)} |")
    out += ["", "## Objectives", "", "| class | what it does | papers | recipes |", "| --- | --- | --- | --- |"]
    for cls in (getattr(objectives, name) for name in objectives.__all__ if name not in ("Objective", "Term")):
        using = ", ".join(link(one) for one in recipes if cls.__name__ in one.classes)
        out.append(f"| `{cls.__name__}` | {sentence(cls)} | {links(papers(cls))} | {using} |")
    out += ["", "## What they are built from", "", "| for a | there is | what it does | papers |", "| --- | --- | --- | --- |"]
    out += [
        f"| `{base}` | `{cls.__name__}` | {sentence(cls)} | {links(papers(cls))} |"
        for base, cls in choices(known, {name for one in recipes for name in one.classes})
    ]
    return "\n".join([*out, ""])


def choices(known: list[type], used: set[str]) -> list[tuple[str, type]]:
    """(kind, class) of what objectives are given: subclasses of a kind, and what an objective or a `used` class asks for."""
    asking = [cls for cls in known if issubclass(cls, objectives.Objective) or cls.__name__ in used]
    hints = " ".join(str(hint) for cls in asking for hint in cls.__dict__.get("__init__", choices).__annotations__.values())
    found = []
    for cls in known:
        kinds = [base for base in cls.__mro__[1:] if base in known]
        alone = re.search(rf"\b{cls.__name__}\b", hints) and not any(cls in other.__mro__[1:] for other in known)
        if not issubclass(cls, (objectives.Objective, tuple)) and (kinds or alone):
            found.append(((kinds or [cls])[-1].__name__, cls))
    return sorted(found, key=lambda pair: pair[0])


def page(text: str) -> str:
    """The page with its tables written anew. Raises ValueError where it has no place for them."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{PAGE.name} has no place for the tables; expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return text[: text.index(BEGIN) + len(BEGIN)] + "\n" + tables() + "\n" + text[text.index(END) :]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
