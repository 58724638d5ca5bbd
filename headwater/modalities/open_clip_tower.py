"""open_clip's image and text towers as encoders, projected into their shared space by `pool`."""

from __future__ import annotations

from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater.modalities.image import ImageReader
from headwater.model import Encoder, Reader
from headwater.tokens import Pooled, Tokens, attention_mask, cat


class OpenClipTextReader(Reader):
    """A caption -> ids of open_clip's own tokenizer, cut after the end mark: its padding is never computed."""

    extensions = ("txt", "text", "caption")
    vocab: int

    def __init__(self, name: str) -> None:
        self.name = name
        self.vocab, self.end = int(self._tokenizer.vocab_size), int(self._tokenizer.eot_token_id)

    @cached_property
    def _tokenizer(self):
        import open_clip

        return open_clip.get_tokenizer(self.name)

    def decode(self, members: dict[str, bytes]) -> str:
        return members[str(self.member(members))].decode("utf-8")

    def tokens(self, signal: str, view: Tensor | None = None) -> Tokens:
        if not signal.strip():
            raise ValueError("the text is empty")
        ids = self._tokenizer([signal])[0]
        ids = ids[: int((ids == self.end).int().argmax()) + 1]
        return Tokens(ids, torch.arange(len(ids), dtype=torch.int32)[:, None])

    def restore(self, t: Tokens) -> str:
        marks = {self.end, int(self._tokenizer.sot_token_id)}
        return self._tokenizer.decode([i for i in t.x[0][t.real()[0]].tolist() if i not in marks]).strip()

    def example(self, n: int, seed: int) -> list[Tokens]:
        return [self.tokens(" ".join(["a", "dog", "on", "a", "boat"][: 2 + (seed + k) % 4])) for k in range(n)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}


class OpenClipImage(Encoder):
    """The vision transformer of an open_clip model; pooled vectors are in the model's shared space.

    Args:
        name: open_clip's model name, such as ViT-B-32.
        weights: open_clip's tag of pretrained weights, or a file; None = untrained.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        import open_clip
        from open_clip.transformer import VisionTransformer

        super(Encoder, self).__init__()
        visual = open_clip.create_model(name, pretrained=weights).visual
        if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None:
            raise ValueError(f"the image tower of {name} is a {type(visual).__name__}; expected a plain ViT such as ViT-B-32")
        data = visual.preprocess_cfg
        self.tower = visual
        size = data["size"][0] if isinstance(data["size"], tuple | list) else data["size"]
        self.reader = ImageReader(size, visual.patch_size[0], "crop", 1.0, data["mean"], data["std"])
        self.width, self.dim = visual.conv1.out_channels, visual.output_dim
        self.features, self.vocab = self.reader.features, None
        self.spec["init_args"]["weights"] = None  # when it is built again, its weights come from the exported file

    def embed(self, raw: Tokens) -> Tokens:
        x = F.linear(raw.x, rearrange(self.tower.conv1.weight, "d c p q -> d (p q c)"))
        index = raw.position[..., 1].long() * self.tower.grid_size[1] + raw.position[..., 2].long() + 1
        return raw._replace(x=x + self.tower.positional_embedding[index])

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        if condition is not None or t.document is not None:
            raise ValueError(
                "an open_clip tower takes neither a condition nor packed rows; use headwater.modalities.Image for these"
            )
        rows = t.x.shape[0]
        mark = (self.tower.class_embedding + self.tower.positional_embedding[0]).expand(rows, 1, -1)
        valid = None if t.valid is None else t.valid.any(1, keepdim=True)
        t = cat([t, Tokens(mark.to(t.x.dtype), t.position.new_zeros(rows, 1, t.position.shape[-1]), valid)])
        mask = additive(attention_mask(t, t, causal).dense, t, self.tower.transformer.resblocks[0].attn.num_heads)
        return t._replace(x=self.tower.transformer(self.tower.ln_pre(t.x), attn_mask=mask))

    def pool(self, t: Tokens) -> Pooled:
        x = torch.cat([t.x[:, -1:], t.x[:, :-1]], 1)
        pooled, sample = self.tower._pool(x)[0], t.samples()
        return Pooled((pooled if self.tower.proj is None else pooled @ self.tower.proj)[sample], sample)

    def unembed(self, x: Tensor) -> Tensor:
        raise ValueError("an open_clip image tower has no head that generates; use headwater.modalities.Image")


class OpenClipText(Encoder):
    """The causal text transformer of an open_clip model; pooled vectors are in the model's shared space.

    Args:
        name: open_clip's model name, such as ViT-B-32.
        weights: open_clip's tag of pretrained weights, or a file; None = untrained.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        import open_clip

        super(Encoder, self).__init__()
        model = open_clip.create_model(name, pretrained=weights)
        if not isinstance(model, open_clip.CLIP) or model.text_pool_type not in ("argmax", "eos"):
            raise ValueError(f"the text tower of {name} is no plain CLIP text transformer; expected a model such as ViT-B-32")
        self.reader = reader = OpenClipTextReader(name)
        self.tokens, self.position = model.token_embedding, model.positional_embedding
        self.tower, self.norm, self.projection = model.transformer, model.ln_final, model.text_projection
        self.width, self.dim = self.tokens.embedding_dim, int(self.projection.shape[-1])
        self.features, self.vocab, self.start = 0, reader.vocab, reader.vocab - 2
        self.spec["init_args"]["weights"] = None

    def embed(self, raw: Tokens) -> Tokens:
        return raw._replace(x=self.tokens(raw.x) + self.position[raw.position[..., 0].long()])

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        """Always causal, as it was trained."""
        if condition is not None:
            raise ValueError("an open_clip tower takes no condition; use headwater.modalities.Text")
        mask = additive(attention_mask(t._replace(valid=t.real()), t, True).dense, t, self.tower.resblocks[0].attn.num_heads)
        return t._replace(x=self.norm(self.tower(t.x, attn_mask=mask)))

    def pool(self, t: Tokens) -> Pooled:
        """The vector at the end mark, the last real token of each sample."""
        real, sample = t.real(), t.sample()
        follows = F.pad((sample[:, 1:] == sample[:, :-1]) & real[:, 1:], (0, 1))
        last = real & ~follows
        order = sample[last].argsort()
        return Pooled((t.x[last] @ self.projection)[order], sample[last][order])

    def unembed(self, x: Tensor) -> Tensor:
        return x @ self.tokens.weight.T


def additive(dense: Tensor | None, t: Tokens, heads: int) -> Tensor | None:
    """A mask for torch's MultiheadAttention: (B * heads, N, N) with -inf where it may not look; padding looks at itself."""
    if dense is None:
        n = t.x.shape[1]
        return None if t.valid is None else t.x.new_zeros(n, n)
    see = dense[:, 0].expand(t.x.shape[0], t.x.shape[1], -1) | torch.eye(t.x.shape[1], dtype=torch.bool, device=t.x.device)
    return t.x.new_zeros(see.shape).masked_fill(~see, float("-inf")).repeat_interleave(heads, 0)


def make(name: str) -> Encoder:
    """ "ViT-B-32#image" or "ViT-B-32#text", untrained."""
    model, _, side = name.partition("#")
    if side not in ("image", "text"):
        raise ValueError(
            f"found open_clip/{name}; expected which tower is meant, such as open_clip/{model}#image or open_clip/{model}#text"
        )
    return OpenClipImage(model) if side == "image" else OpenClipText(model)


def towers(name: str, pretrained: bool) -> dict[str, Encoder | str]:
    """Modality -> encoder, for load_backbone. name: "MODEL" (its first published weights) or "MODEL:TAG"."""
    import open_clip

    model, _, tag = name.partition(":")
    if pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not tags:
            raise ValueError(f"open_clip publishes no weights for {model}; pass pretrained=False or open_clip/{model}:FILE")
        tag = tags[0]
    weights = tag if pretrained else None
    return {"image": OpenClipImage(model, weights), "text": OpenClipText(model, weights)}
