"""Generate with a backbone: `headwater generate runs/caption/000/backbone --image dog.png`."""

from __future__ import annotations

from typing import Any, Literal


def generate(
    backbone: str,
    to: str = "text",
    text: str | None = None,
    image: str | None = None,
    audio: str | None = None,
    video: str | None = None,
    action: str | None = None,
    given: dict[str, str] | None = None,
    out: str | None = None,
    way: Literal["causal", "flow", "diffusion"] | None = None,
    layout: Literal["causal", "prefixed", "denoising", "interleaved"] = "causal",
    length: int | None = None,
    begin: int | None = None,
    seed: int = 0,
    samples: int = 1,
    guidance: float = 1.0,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    choices: list[str] | None = None,
) -> None:
    """Make texts, pictures, sounds, films or actions with a backbone, given others or their own beginning.

    Args:
        backbone: a backbone folder, or what else `load_backbone` takes.
        to: the modality that is made. What is given of it is the beginning of what is made.
        text: a text.
        image, audio, video, action: a file.
        given: files, or texts, of modalities with other names: --given.label 3.cls.
        out: the file to write; texts are printed without it. Several samples get a number each.
        way: token by token (causal), out of noise (flow) or out of hidden ids (diffusion).
        layout: where what is given stood in training; see headwater.generate.
        length: the most tokens.
        begin: how many tokens of a given beginning are kept.
        seed: of all draws.
        samples: how many are made.
        guidance: how strongly the others are followed; 1 = as they were learned.
        steps: of flow and diffusion.
        temperature: 0 = the likeliest.
        top_k: only so many ids are drawn from.
        top_p: only the likeliest ids that have this probability together are drawn from.
        beams: above 1, the likeliest of so many sequences that are kept.
        choices: one of these is said.
    """
    from pathlib import Path

    from headwater import hub
    from headwater.generation import Settings, stream
    from headwater.generation.files import load, save
    from headwater.generation.signals import alone

    loaded = hub.load_backbone(backbone)
    named = {"text": text, "image": image, "audio": audio, "video": video, "action": action, **(given or {})}
    told = {name: value for name, value in named.items() if value is not None}
    if stray := {to, *told} - set(loaded.reader):
        raise ValueError(f"found {', '.join(sorted(stray))}; the modalities of this backbone are {', '.join(loaded.reader)}")
    settings = Settings(
        way=way,
        layout=layout,
        length=length,
        begin=begin,
        seed=seed,
        samples=samples,
        guidance=guidance,
        steps=steps,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        beams=beams,
        choices=choices,
    )
    encoder, screen = loaded.model.encoder(to), Printer()
    made: Any = None
    for made in stream(loaded, to, settings, {name: [load(value, loaded.reader[name])] for name, value in told.items()}):
        if samples == 1 and encoder.reader.end is not None:
            screen.show(encoder.restore(alone(made, 0)))
    signals = [encoder.restore(alone(made, row)) for row in range(samples)]
    screen.finish(signals)
    if out is None and isinstance(signals[0], str):
        return
    target = Path(out or f"generated-{to}")
    for number, signal in enumerate(signals):
        name = target.with_stem(f"{target.stem}-{number}") if samples > 1 else target
        print(save(signal, encoder.reader, name))


class Printer:
    """Prints a text while it grows."""

    def __init__(self) -> None:
        self.printed = ""

    def show(self, text: Any) -> None:
        """What the text is so far. A letter that is not whole yet waits for its other bytes."""
        if isinstance(text, str) and text.startswith(self.printed) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            print(text.removeprefix(self.printed), end="", flush=True)
            self.printed = text

    def finish(self, signals: list[Any]) -> None:
        """The rest of the only text, or all of several."""
        texts = [signal for signal in signals if isinstance(signal, str)]
        if self.printed:
            print(texts[0].removeprefix(self.printed))
        else:
            for text in texts:
                print(text)
