"""What a run takes over from another one: weights, optimizer state, the average of the weights, the order of samples.

Resuming (`--resume`) goes on with the same run and restores everything. A start begins a new run, or the next stage of a plan,
whose step count, schedule and settings are its own, and says what it carries over. Optimizer state is matched by the names of
the parameters, so it survives other groups, frozen parts and new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from headwater.training.averaging import Average
from headwater.training.sharding import Sharded, share_state

Part = Literal["model", "objective", "optimizer", "average", "data"]
LAST = "checkpoints/last.ckpt"  # within a run folder
GIVEN = ("params", "lr", "initial_lr", "weight_decay", "initial_weight_decay")  # what schedules change in a group


class Start:
    """Begin a run with parts of an earlier one.

    "model": the weights of the backbone, before teachers are copied from it. "objective": heads, teachers, queues. "optimizer": its
    state, for every parameter that kept its name and shape; learning rates and other settings are those of this run. "average": of
    the weights, which the callback Average goes on with. "data": the order of samples goes on where the other run stopped.

    Args:
        checkpoint: a file, or a run folder, of which it is the last one.
        carry: parts that are taken over; the others start anew.
        coverage: least share of the model's, and of the objective's, parameters that must fit; see hub.audit.Report.
    """

    def __init__(self, checkpoint: str, carry: Sequence[Part] = ("model", "objective", "optimizer"), coverage: float = 1.0) -> None:
        if not carry:
            raise ValueError("found a start that carries nothing over; name parts in `carry`, or leave the start out")
        if not 0 < coverage <= 1:
            raise ValueError(f"found coverage {coverage}; expected a share of the parameters above 0, at most 1")
        self.checkpoint, self.carry, self.coverage = checkpoint, tuple(carry), coverage

    def model(self, pretrainer: Any) -> None:
        """The backbone's weights, in place. pretrainer: before it is sharded, and before teachers are copied."""
        if "model" in self.carry:
            self._weights(pretrainer.backbone, "backbone", self._read(pretrainer))

    def rest(self, pretrainer: Any) -> None:
        """The objective's weights, the average and the order of samples; after teachers and averages were made."""
        found, trainer = self._read(pretrainer), pretrainer.trainer
        if "objective" in self.carry and pretrainer.objective.state_dict():
            self._weights(pretrainer.objective, "objective", found)
        if "average" in self.carry:
            callback = next((c for c in trainer.callbacks if isinstance(c, Average)), None)
            state = found["callbacks"].get("Average")
            if callback is None or state is None:
                where = "this run" if callback is None else self.checkpoint
                raise ValueError(f"{where} keeps no average of the weights; take `average` out of `carry`, or add the callback")
            self._weights(pretrainer.average, "average", found)
            callback.load_state_dict({**state, "step": 0})
        if "data" in self.carry:
            trainer.datamodule.go_on(found[type(trainer.datamodule).__qualname__], found["global_step"])

    def optimizer(self, pretrainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Its state, matched by name. pretrainer: as it trains, sharded or not."""
        if "optimizer" not in self.carry:
            return
        found = self._read(pretrainer)
        record, saved = found.get("optimizer"), found["optimizer_states"][0]
        if record is None:
            raise ValueError(f"{self.checkpoint} does not say whose its optimizer state is; take `optimizer` out of `carry`")
        if record["class"] != form_of(optimizer):
            raise ValueError(
                f"found the state of {record['class']} in {self.checkpoint}, but this run has {form_of(optimizer)}; "
                "take `optimizer` out of `carry`, or keep the optimizer"
            )
        shapes = {name: tuple(w.shape) for name, w in found["state_dict"].items()}
        own = dict(pretrainer.named_parameters())
        states, moved = by_name(record, saved)
        fits = {name: state for name, state in states.items() if name in own and shapes[name] == tuple(own[name].shape)}
        load_state(pretrainer, optimizer, fits)
        every = names(optimizer, own)
        for group, inside in zip(optimizer.param_groups, every, strict=True):
            group |= next((moved[name] for name in inside if name in fits), {})
        say(f"optimizer from {self.checkpoint}: state of {len(fits)} of {sum(map(len, every))} parameters")

    def _read(self, pretrainer: Any) -> dict[str, Any]:
        """The checkpoint that the first rank names; tensors stay in the file until they are asked for."""
        path = Path(pretrainer.trainer.strategy.broadcast(self.checkpoint))
        path = path / LAST if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"found no checkpoint at {path}, from which this run is to start; expected a .ckpt file or a run folder"
            )
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)

    def _weights(self, module: nn.Module, name: str, found: dict[str, Any]) -> None:
        from headwater.hub.audit import load_weights  # the hub knows modalities, which are above training

        weights = {key.removeprefix(f"{name}."): w for key, w in found["state_dict"].items() if key.startswith(f"{name}.")}
        try:
            report = load_weights(module, weights, self.coverage)
        except ValueError as error:
            part = "model" if name == "backbone" else name
            raise ValueError(
                f"the {part} of {self.checkpoint} is not that of this run: {error}, or take {part!r} out of `carry`"
            ) from error
        say(f"{name} from {self.checkpoint}: {report.summary()}")


@rank_zero_only
def say(words: str) -> None:
    """Print once."""
    print(words, flush=True)


def names(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    """Of the parameters of each group, in the order in which an optimizer's state numbers them."""
    name = {id(p): n for n, p in parameters.items()}
    return [[name[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def by_name(record: dict[str, Any], saved: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Parameter -> its state, and what its group counts beside the settings that were asked for, such as its steps."""
    states: dict[str, dict[str, Any]] = {}
    moved: dict[str, dict[str, Any]] = {}
    for group, inside, asked in zip(saved["param_groups"], record["names"], record["settings"], strict=True):
        counts = {k: v for k, v in group.items() if k not in GIVEN and plain(v) != asked.get(k)}
        for name, number in zip(inside, group["params"], strict=True):  # fsdp2 numbers in an order of its own
            moved[name] = counts
            if number in saved["state"]:
                states[name] = saved["state"][number]
    return states, moved


def load_state(module: nn.Module, optimizer: torch.optim.Optimizer, states: dict[str, dict[str, Any]]) -> None:
    """State by the name of the parameter, in whole tensors, into an optimizer whose settings stay; the others begin anew."""
    if isinstance(module.trainer.strategy, Sharded):
        share_state(module, optimizer, states)
        return
    every, whole = names(optimizer, dict(module.named_parameters())), optimizer.state_dict()
    whole["state"] = {i: deepcopy(states[name]) for i, name in enumerate(chain.from_iterable(every)) if name in states}
    optimizer.load_state_dict(whole)


def form_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose state it is: that of its class, or the form that fused optimizers of several libraries share."""
    return getattr(optimizer, "form", type(optimizer).__qualname__)


def record(module: nn.Module, optimizer: torch.optim.Optimizer, asked: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint tells of its optimizer: its class, whose state has which number, and what was asked for."""
    return {
        "class": form_of(optimizer),
        "names": names(optimizer, dict(module.named_parameters())),
        "settings": asked,
    }


def settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Rates, decays, momenta and the like of each group, as plain values; asked before schedules change them."""
    return [{key: plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def plain(value: Any) -> Any:
    """A setting as it can be saved and compared."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def check_groups(before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError where the state of a checkpoint would go to other parameters than those that it belongs to."""
    if before["class"] != now["class"]:
        raise ValueError(
            f"the checkpoint has the state of {before['class']}, this run has {now['class']}; resume with the same optimizer, or "
            "begin a new run with --model.start.checkpoint and without `optimizer` in its `carry`"
        )
    if before["names"] != now["names"]:
        theirs, ours = (set(chain.from_iterable(told["names"])) for told in (before, now))
        found = (
            f"{len(ours - theirs)} are new and {len(theirs - ours)} are gone" if ours != theirs else "they are grouped otherwise"
        )
        raise ValueError(
            f"the parameters whose optimizer state is in the checkpoint are not those of this run: {found}. Resume with the same "
            "model and groups, or begin a new run with --model.start.checkpoint, which goes by names"
        )


def ask_again(optimizer: torch.optim.Optimizer, before: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """After a checkpoint was loaded: settings that are asked for differently now than then. The others stay as they were loaded."""
    for group, old, new in zip(optimizer.param_groups, before, now, strict=True):
        for key in (key for key in new if key in group and new[key] != old.get(key)):
            kind = type(group[key])
            group[key] = kind(new[key]) if kind in (tuple, list) else new[key]
            if f"initial_{key}" in group:
                group[f"initial_{key}"] = new[key]
