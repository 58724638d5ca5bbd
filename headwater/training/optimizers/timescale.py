"""Over how much of the data AdamW's weights are an average, and the weight decay that gives so much."""

from __future__ import annotations


def timescale(rate: float, decay: float, batch: float, data: float) -> float:
    """Share of the data within which a step's trace in AdamW's weights falls to 1 / e: B / (lr wd D).

    AdamW keeps (1 - lr wd) of its weights in each step, so they are a moving average over 1 / (lr wd) steps (Wang and Aitchison
    2024, arXiv:2405.13698; as a share of the data Bergsma et al. 2025, arXiv:2505.13738). batch, data: in one unit, samples or
    tokens.
    """
    _check(rate=rate, decay=decay, batch=batch, data=data)
    return batch / (rate * decay * data)


def decay_for(share: float, rate: float, batch: float, data: float) -> float:
    """The weight decay whose timescale is this share of the data: what to change when batch, rate or amount of data changes."""
    _check(share=share, rate=rate, batch=batch, data=data)
    return batch / (rate * share * data)


def _check(**numbers: float) -> None:
    if bad := {name: x for name, x in numbers.items() if x <= 0}:
        raise ValueError(f"found {', '.join(f'{name} {x}' for name, x in bad.items())}; expected numbers above 0")
