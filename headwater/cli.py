"""`headwater <command>`: training through LightningCLI, the other commands as plain functions."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.resources import files
from inspect import signature

TRAINING = {
    "fit": "Train a model by a recipe, evaluate it and export its backbone",
    "validate": "Evaluate a checkpoint on the held-out parts of a recipe",
    "test": "The same on the test parts",
    "predict": "Run a checkpoint over the held-out parts and write the pooled features",
}
COMMANDS = {
    "shard": ("headwater.tools.shard:shard", "Make WebDataset shards from folders, manifests, films, corpora, data sets or robots"),
    "index": ("headwater.tools.index_shards:index_shards", "Make the index beside every shard, with a hash of every member"),
    "verify": ("headwater.tools.verify:verify", "Check every member of shards against its hash, and decode it with --decode"),
    "reshard": ("headwater.tools.reshard:reshard", "Cut shards anew by number, size, key or split, at constant memory"),
    "merge": ("headwater.tools.merge:merge", "Make one set of shards of several sets, at constant memory"),
    "tokenizer": ("headwater.tools.tokenizer:tokenizer", "Train a tokenizer on the texts, or the actions, of shards"),
    "clusters": ("headwater.tools.clusters:clusters", "Fit clusters to the tokens of shards, or to a trained tower's features"),
    "stats": ("headwater.tools.stats:stats", "Print what the indices of shards tell, without reading the shards"),
    "inspect": ("headwater.tools.inspect:inspect", "Print what shards hold, and draw it as a page with --html"),
    "describe": ("headwater.tools.describe:describe", "Print what a recipe builds and costs, without the memory for it"),
    "export": (
        "headwater.tools.export:export",
        "Write a backbone as timm, open_clip or transformers load it, and prove that they do",
    ),
    "generate": (
        "headwater.tools.generate:generate",
        "Make texts, pictures, sounds, films or actions with a backbone, given others or their own beginning",
    ),
    "relabel": (
        "headwater.tools.relabel:relabel",
        "Write shards with what models say of samples: labels or texts, chosen by confidence, vote and rule",
    ),
    "select": (
        "headwater.tools.select:select",
        "Score the samples of a pool by what they do for a target, and write those that do most as shards",
    ),
    "doctor": ("headwater.tools.doctor:doctor", "Print which kernels, decoders and devices this machine has, and why not"),
    "plan": (
        "headwater.tools.plan:plan",
        "Print what a recipe needs on given devices, without running it: memory per rank, FLOPs, step time",
    ),
    "surgery": (
        "headwater.tools.surgery:surgery",
        "Write the backbone of a recipe as it starts: merged, grown, longer, with other ids",
    ),
    "soup": ("headwater.tools.surgery:soup", "Average backbones, or add what others have learned, into one backbone"),
    "recipes": ("headwater.tools.recipes:recipes", "List the recipes that ship with the package"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; every foreseeable error is one message that says what was found, what was expected and what to do."""
    given = sys.argv[1:] if arguments is None else arguments
    command = given[0] if given else "--help"
    if command in ("-h", "--help"):
        print(overview())
    elif command == "--version":
        from headwater import __version__

        print(__version__)
    elif command in TRAINING:
        tidy(train, given)
    elif command in COMMANDS:
        tidy(call, given)
    else:
        sys.exit(f"headwater: found the command {command!r}; expected one of {', '.join([*TRAINING, *COMMANDS])}")


def overview() -> str:
    """Every command with one line."""
    lines = {**TRAINING, **{name: line for name, (_, line) in COMMANDS.items()}}
    width = max(map(len, lines))
    rows = "\n".join(f"  {name:<{width}}  {line}" for name, line in lines.items())
    return f"usage: headwater COMMAND [OPTIONS]\n\n{rows}\n\nheadwater COMMAND --help tells the options of a command"


def tidy(run, given: list[str]) -> None:
    """Foreseeable errors as one message; HEADWATER_TRACEBACK=1 shows where they arose."""
    try:
        run(given)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("HEADWATER_TRACEBACK"):
            raise
        sys.exit(f"headwater: {error}")


def call(given: list[str]) -> None:
    """A command that is a plain function."""
    from jsonargparse import auto_cli

    module, _, name = COMMANDS[given[0]][0].partition(":")
    function = getattr(import_module(module), name)
    words = spell_out(given[1:])
    first = next(iter(signature(function).parameters.values()), None)
    several = first is not None and str(first.annotation).startswith("list")
    auto_cli(function, args=listed(words) if several else words, as_positional=True, prog=f"headwater {given[0]}")


def listed(given: list[str]) -> list[str]:
    """All bare words but the last as one list: `A B OUT` is `["A", "B"] OUT`. A word after --option is the option's."""
    taken = [i > 0 and given[i - 1].startswith("--") and "=" not in given[i - 1] for i in range(len(given))]
    bare = [one for one, after in zip(given, taken) if not after and not one.startswith("-")]
    options = [one for one, after in zip(given, taken) if after or one.startswith("-")]
    sets = max(1, len(bare) - 1)
    return [json.dumps(bare[:sets]), *bare[sets:], *options] if bare else given


def spell_out(given: list[str]) -> list[str]:
    """A bare switch such as --overwrite means --overwrite true."""
    switch = [one.startswith("--") and "=" not in one and one != "--help" for one in given]
    ends = [i + 1 == len(given) or given[i + 1].startswith("--") for i in range(len(given))]
    return [f"{one}=true" if bare and end else one for one, bare, end in zip(given, switch, ends)]


def train(given: list[str]) -> None:
    """A Trainer command."""
    from headwater.tools.train import run

    run(translate(given))


def recipe_path(name: str) -> str:
    """A recipe by path, or by bare name among those that ship with the package."""
    if os.path.isfile(name):
        return name
    folder = files("headwater") / "configs"
    shipped = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    if name.removesuffix(".yaml") not in shipped:
        raise FileNotFoundError(f"found no recipe {name!r}; expected a YAML file or one of {', '.join(shipped)}")
    return str(folder / f"{name.removesuffix('.yaml')}.yaml")


def translate(given: list[str]) -> list[str]:
    """Short forms of the command line: recipes by bare name, --data FOLDER, --resume with or without a run."""
    recipes, out = [], given[:1]  # recipes go first, so that every other option overrides them
    rest = [
        part
        for one in given[1:]
        for part in (one.split("=", 1) if one.startswith(("--config=", "--data=", "--resume=")) else [one])
    ]
    while rest:
        option = rest.pop(0)
        if option in ("--config", "-c") and rest:
            recipes += ["--config", recipe_path(rest.pop(0))]
        elif option == "--data" and rest:
            out += ["--data.path", rest.pop(0)]
        elif option == "--resume":
            out += ["--resume", rest.pop(0) if rest and not rest[0].startswith("-") else "newest"]
        else:
            out.append(option)
    return [*out[:1], *recipes, *out[1:]]


if __name__ == "__main__":
    main()
