"""The direction of imports (DESIGN section 2): whoever is lower never knows who is above."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import headwater

ROOT = Path(headwater.__file__).parent
LAYERS = [
    {"tokens", "random", "view", "init", "distributed", "spec", "fused", "embedded", "codes"},
    {"attention", "position", "cache", "sequence", "process", "turns", "controllers", "tally"},
    {"layers"},
    {"trunk", "teacher"},
    {"pooling", "forms"},
    {"model"},
    {"modalities", "fusion", "objectives"},
    {"datamodules", "pretrainer", "training"},
    {"evaluation", "tools", "cli"},  # and whatever is not named here: hub, generation, ...
]
MEDIA = {"modalities", "fusion", "objectives"}
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}


def arrows():
    """(importing module, imported module) for the imports of headwater at the top of its files."""
    for file in sorted(ROOT.rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headwater"):
                base = node.module.removeprefix("headwater").lstrip(".")
                for alias in node.names:
                    longer = f"{base}.{alias.name}".lstrip(".")
                    yield module, longer if exists(longer) else base
            elif isinstance(node, ast.Import):
                yield from ((module, a.name.removeprefix("headwater.")) for a in node.names if a.name.startswith("headwater."))


def exists(module):
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def part(module):
    return module.partition(".")[0]


def level(module):
    top = len(LAYERS) - 1
    return LEVEL.get(part(module), top)


def test_the_walk_finds_arrows():
    assert {("model", "trunk"), ("datamodules.collate", "tokens"), ("random", "tokens")} <= set(arrows())


def test_imports_point_downwards():
    assert [(a, b) for a, b in arrows() if a and b and level(a) < level(b)] == []


def test_objectives_modalities_and_fusion_do_not_know_each_other():
    wrong = [(a, b) for a, b in arrows() if {part(a), part(b)} <= MEDIA and part(a) != part(b)]
    assert wrong == []


def test_there_is_no_cycle():
    graph = {}
    for a, b in arrows():
        if not b.startswith(f"{a}.") and a != b:  # a package lists its own files
            graph.setdefault(a, set()).add(b)
    TopologicalSorter(graph).prepare()  # raises CycleError with the cycle


def test_the_package_itself_imports_nothing_heavy():
    body = ast.parse((ROOT / "__init__.py").read_text()).body
    modules = {a.name for n in body if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in body if isinstance(n, ast.ImportFrom)}
    assert not {m.partition(".")[0] for m in modules} & {"torch", "lightning", "timm", "open_clip", "transformers", "headwater"}
