"""Does a modality teach anything? A few seconds of masked prediction on real signals, scored on others."""

import torch

from headwater import random
from headwater.datamodules.collate import collate
from headwater.model import Model
from headwater.objectives import Masked
from headwater.objectives.objective import squared_error


def descend(model, objective, batch, steps=50, rate=3e-3, again=False):
    """The loss of every step on one batch whose task is another one each time, or with `again` always the same."""
    rows, losses = len(next(iter(batch.values())).x), []
    optimizer = torch.optim.AdamW([*model.parameters(), *objective.parameters()], rate)
    for step in range(steps):
        task = objective.task(batch | {"seed": torch.arange(rows) + (0 if again else rows * step)})
        (term,) = objective(model, task).values()
        loss = term.total / term.number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learned(encoder, train, held, steps=300, rows=16, rate=6e-3, ratio=0.3):
    """Squared errors at hidden tokens of the held-out signals: of the trained model, and of the training mean of each slot."""
    model, reader = Model({"it": encoder}), encoder.reader
    seen, other = (reader.prepare(collate([{"it": reader.tokens(s)} for s in signals], ["it"])["it"]) for signals in (train, held))
    objective = Masked(model, "it", ratio=ratio, mode="substitute")
    weights = [*model.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for step in range(steps):
        seed = random.fold(torch.tensor(step), "step")
        chosen = (random.uniform(seed, (rows,), "rows") * len(seen.x)).long()
        batch = {"it": seen.map(lambda field, chosen=chosen: field[chosen]), "seed": random.fold(chosen, step)}
        term = objective(model, objective.task(batch))["masked"]
        optimizer.zero_grad()
        (term.total / term.number).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        batch = objective.task({"it": other, "seed": random.fold(torch.arange(len(other.x)), "held")})
        term = objective(model, batch)["masked"]
        mean = seen.x[seen.real()].nanmean(0)
        control = squared_error(mean.expand_as(other.x), other.x)[batch["hidden"]["it"]].mean()
    return (term.total / term.number).item(), control.item()
