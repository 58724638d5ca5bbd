"""Real English for claims about language: the Python language reference and the docstrings of the standard library.

Both ship with Python, so nothing is downloaded; some 2 million characters. A document is a topic of the reference or a module.
"""

from __future__ import annotations

import ast
import inspect
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from benchmarks.claims.trial import Members

SKIPPED = {"test", "tests", "idlelib", "idle_test", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


@lru_cache(maxsize=1)
def documents() -> list[str]:
    """Every topic of the reference, then the docstrings of every module, in one order on any machine with this Python."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    found = [*(topics[name] for name in sorted(topics)), *("\n\n".join(docstrings(path)) for path in modules)]
    return [text for text in found if text.strip()]


def docstrings(path: Path) -> Iterator[str]:
    """Those of a module, its classes and its functions that say more than a line."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) > 80:
                yield text


def passages(text: str, length: int) -> Iterator[str]:
    """Paragraphs of a document joined up to `length` characters each; a longer paragraph is cut at words.

    Rows of stars and dashes below headings, and the indentation of lines, are left out.
    """
    held = ""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        words = [word for word in paragraph.split() if len(set(word)) > 1 or len(word) < 4]
        for word in words:
            if held and len(held) + 1 + len(word) > length:
                yield held
                held = ""
            held = f"{held} {word}" if held else word
        if len(held) > length / 2:  # passages start with a paragraph where that wastes little
            yield held
            held = ""
    if held:
        yield held


def prose(seed: int, length: int = 256, held_out: float = 0.1) -> tuple[list[str], list[str]]:
    """Passages to train on, and passages of other documents to test on, each in an order that the seed draws.

    length: the most characters of a passage; those below a quarter of it are left out. held_out: share of the characters. A
    passage that stands in several documents is kept once.
    """
    return divided(documents(), seed, length, held_out)


def divided(documents: Iterable[str], seed: int, length: int, held_out: float) -> tuple[list[str], list[str]]:
    """Passages of the later documents in an order that the seed draws, and of the first ones; see `prose`."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    total, size = sum(map(len, order)), 0
    parts: tuple[list[str], list[str]] = [], []
    seen: set[str] = set()
    for text in order:
        size += len(text)
        for passage in passages(text, length):
            if len(passage) >= length / 4 and passage not in seen:
                seen.add(passage)
                parts[size <= held_out * total].append(passage)
    for part in parts:
        random.Random(seed).shuffle(part)
    return parts


def members(texts: Sequence[str]) -> list[Members]:
    """Passages as samples, for `trial.written` and `trial.signals`."""
    return [{"txt": text.encode()} for text in texts]
