"""open_clip's image and text towers as encoders, projected into their shared space by `pool`."""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from headwater.modalities.timm_tower import PictureTower, TokenTower, picture_reader, token_by_token
from headwater.modalities.tower import Alone, Tower
from headwater.model import Encoder, Reader
from headwater.pooling import last_pool
from headwater.tokens import Pooled, Tokens, append, attention_mask
from headwater.view import View


class OpenClipTextReader(Reader):
    """A caption -> ids of open_clip's own tokenizer.

    Args:
        name: open_clip's model name.
        vocab: number of ids of its text tower.
        padded: keep the padding up to the model's context length, because it was trained to look at it (SigLIP). Otherwise the
            text is cut after its end mark, and padding is never computed.
    """

    extensions = ("txt", "text", "caption")
    vocab: int

    def __init__(self, name: str, vocab: int = 49408, padded: bool = False) -> None:
        self.name, self.vocab, self.padded = name, vocab, padded

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        return open_clip.get_tokenizer(self.name)

    @property
    def _marks(self) -> tuple[int | None, int]:
        """The ids of the marks at the start and at the end."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is not None:
            return inner.bos_token_id, int(inner.eos_token_id)
        return int(self._tokenizer.sot_token_id), int(self._tokenizer.eot_token_id)

    def decode(self, members: dict[str, bytes]) -> str:
        return members[str(self.member(members))].decode("utf-8")

    def tokens(self, signal: str, view: View | None = None) -> Tokens:
        if not isinstance(signal, str) or not signal.strip():
            raise ValueError(f"found {signal!r}; expected a text that is not empty")
        ids = self._tokenizer([signal])[0]
        ids = ids if self.padded else ids[: int((ids == self._marks[1]).int().argmax()) + 1]
        return Tokens(ids, torch.arange(len(ids), dtype=torch.int32)[:, None])

    def restore(self, t: Tokens) -> str:
        ids, (start, end) = t.x[0][t.real()[0]].tolist(), self._marks
        ids = ids[: ids.index(end)] if end in ids else ids
        return self._tokenizer.decode([i for i in ids if i != start]).strip()

    def example(self, n: int, seed: int) -> list[Tokens]:
        return [self.tokens(" ".join(["a", "dog", "on", "a", "boat"][: 2 + (seed + k) % 4])) for k in range(n)]

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}


class OpenClipImage(Tower):
    """open_clip's own vision transformer, with class token or attention pooling (CLIP, CoCa); subsets allowed.

    Args:
        name: open_clip's model name, such as ViT-B-32.
        weights: open_clip's tag of pretrained weights, or a file; None = untrained.
    """

    own = 1

    def __init__(self, name: str, weights: str | None = None) -> None:
        visual = created(name, weights).visual
        if not own_transformer(visual) or getattr(visual, "attn_pool_contrastive", None) is not None:
            raise ValueError(
                f"the image tower of {name} is a {type(visual).__name__}; expected open_clip's own ViT such as ViT-B-32. "
                f"Write open_clip/{name}#image, which finds the right adapter"
            )
        super().__init__(picture_reader(pictures_of(visual), visual.patch_size[0]), visual.conv1.out_channels, visual.output_dim)
        self.tower = visual
        self.spec["init_args"]["weights"] = None  # when it is built again, its weights come from the exported file

    def embed(self, raw: Tokens) -> Tokens:
        x = F.linear(raw.x, rearrange(self.tower.conv1.weight, "d c p q -> d (p q c)"))
        index = raw.position[..., 1].long() * self.tower.grid_size[1] + raw.position[..., 2].long() + 1
        return raw._replace(x=x + self.tower.positional_embedding[index])

    def contextual(self, t: Tokens, causal: bool) -> Tokens:
        t = append(t, (self.tower.class_embedding + self.tower.positional_embedding[0])[None])
        mask = additive(attention_mask(t, t, causal).dense, t, self.tower.transformer.resblocks[0].attn.num_heads)
        return t._replace(x=self.tower.transformer(self.tower.ln_pre(t.x), attn_mask=mask))

    def pooled(self, alone: Alone) -> Tensor:
        tower, x = self.tower, torch.cat([alone.own, alone.given], 1)
        if alone.valid is None or (tower.attn_pool is None and tower.pool_type == "tok"):
            pooled = tower._pool(x)[0]
        elif tower.attn_pool is not None:
            pool, k = tower.attn_pool, tower.attn_pool.ln_k(x)
            q = pool.ln_q(pool.query).expand(len(x), -1, -1)
            hidden = ~F.pad(alone.valid, (1, 0), value=True)
            pooled = tower._global_pool(tower.ln_post(pool.attn(q, k, k, key_padding_mask=hidden, need_weights=False)[0]))[0]
        elif tower.final_ln_after_pool:
            pooled = tower.ln_post(super().pooled(alone))
        else:
            pooled = super().pooled(alone._replace(given=tower.ln_post(alone.given)))
        return pooled if tower.proj is None else pooled @ tower.proj


class OpenClipTokens(TokenTower):
    """An open_clip image tower that is one of timm's transformers (SigLIP, EVA02, PE); subsets allowed. Arguments as above."""

    def __init__(self, name: str, weights: str | None = None) -> None:
        visual = created(name, weights).visual
        super().__init__(visual.trunk, pictures_of(visual))
        self.last = nn.Sequential(visual.trunk.head, visual.head)
        visual.trunk.head = nn.Identity()
        with torch.no_grad():
            self.dim = self.last(next(visual.trunk.parameters()).new_zeros(1, self.width)).shape[-1]
        self.spec["init_args"]["weights"] = None

    def pooled(self, alone: Alone) -> Tensor:
        return self.last(super().pooled(alone))


class OpenClipPicture(PictureTower):
    """An open_clip image tower that sees whole pictures: ResNets and timm's conv nets. Arguments as above."""

    def __init__(self, name: str, weights: str | None = None) -> None:
        visual = created(name, weights).visual
        super().__init__(visual, pictures_of(visual))
        self.spec["init_args"]["weights"] = None

    def map_of(self, pictures: Tensor) -> Tensor:
        if hasattr(self.tower, "trunk"):
            return self.tower.trunk.forward_features(pictures)
        for name in ("stem", "layer1", "layer2", "layer3", "layer4"):
            pictures = getattr(self.tower, name)(pictures)
        return pictures

    def head_of(self, found: Tensor) -> Tensor:
        if hasattr(self.tower, "trunk"):
            return self.tower.head(self.tower.trunk.forward_head(found))
        return self.tower.attnpool(found)


class OpenClipText(Tower):
    """The text transformer of an open_clip model, causal (CLIP) or not (SigLIP).

    Args:
        name: open_clip's model name, such as ViT-B-32.
        weights: open_clip's tag of pretrained weights, or a file; None = untrained.
    """

    reader: OpenClipTextReader

    def __init__(self, name: str, weights: str | None = None) -> None:
        model = created(name, weights)
        text = getattr(model, "text", model)
        pooling = getattr(text, "pool_type", getattr(text, "text_pool_type", None))
        causal = getattr(text, "attn_mask", None) is not None
        known = pooling in (("argmax", "eos") if causal else ("last",)) and getattr(text, "cls_emb", None) is None
        if not known or not hasattr(text, "token_embedding"):
            raise ValueError(
                f"the text tower of {name} is a {type(text).__name__} that pools by {pooling!r}; expected a plain CLIP or "
                "SigLIP text transformer such as that of ViT-B-32 or ViT-B-16-SigLIP"
            )
        width, projection = text.token_embedding.embedding_dim, text.text_projection
        dim = (
            width
            if projection is None
            else projection.weight.shape[0]
            if isinstance(projection, nn.Linear)
            else projection.shape[1]
        )
        vocab = text.token_embedding.num_embeddings
        super().__init__(OpenClipTextReader(name, vocab, padded=not causal), width, dim)
        self.tokens, self.position, self.start = text.token_embedding, text.positional_embedding, vocab - 2
        self.tower, self.norm, self.projection = text.transformer, text.ln_final, projection
        self.spec["init_args"]["weights"] = None

    def embed(self, raw: Tokens) -> Tokens:
        return raw._replace(x=self.tokens(raw.x) + self.position[raw.position[..., 0].long()])

    def contextual(self, t: Tokens, causal: bool) -> Tokens:
        """A tower that was trained to be causal always is."""
        t = t if t.valid is not None else t._replace(valid=t.real())
        see = attention_mask(t, t, causal or not self.reader.padded).dense
        return t._replace(x=self.norm(self.tower(t.x, attn_mask=additive(see, t, self.tower.resblocks[0].attn.num_heads))))

    def pool(self, t: Tokens) -> Pooled:
        """From the last token: the end mark, or the last padding of a tower that looks at padding."""
        pooled = last_pool(t)
        if self.projection is None:
            return pooled
        linear = isinstance(self.projection, nn.Linear)
        return pooled._replace(x=self.projection(pooled.x) if linear else pooled.x @ self.projection)

    def unembed(self, x: Tensor) -> Tensor:
        """By the token embedding itself; no such head was trained."""
        return x @ self.tokens.weight.T


def created(name: str, weights: str | None) -> Any:
    """open_clip's model; ValueError for names that it lacks."""
    import open_clip

    if open_clip.get_model_config(name) is None:
        raise ValueError(f"open_clip has no model {name!r}; expected a name of open_clip.list_models() such as ViT-B-32")
    return open_clip.create_model(name, pretrained=weights)


def own_transformer(visual: Any) -> bool:
    """Whether an image tower is open_clip's own vision transformer."""
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer)


def pictures_of(visual: Any) -> dict[str, Any]:
    """How an image tower's pictures are prepared, as timm words it."""
    data = visual.preprocess_cfg
    size = data["size"] if isinstance(data["size"], tuple | list) else (data["size"], data["size"])
    mode = {"shortest": "center", "squash": "squash", "longest": "border"}[data.get("resize_mode") or "shortest"]
    interpolation = data.get("interpolation", "bicubic")
    return {
        "input_size": (3, *size),
        "crop_pct": 1.0,
        "crop_mode": mode,
        "interpolation": interpolation,
        "mean": data["mean"],
        "std": data["std"],
    }


def additive(dense: Tensor | None, t: Tokens, heads: int) -> Tensor | None:
    """A mask for torch's MultiheadAttention: (B * heads, N, N) with -inf where it may not look; padding looks at itself."""
    if dense is None:
        return None
    see = dense[:, 0].expand(t.x.shape[0], t.x.shape[1], -1) | torch.eye(t.x.shape[1], dtype=torch.bool, device=t.x.device)
    return t.x.new_zeros(see.shape).masked_fill(~see, float("-inf")).repeat_interleave(heads, 0)


def image_tower(name: str, weights: str | None = None) -> Encoder:
    """The adapter that fits the model's image tower."""
    import open_clip

    vision = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
    if vision.get("timm_model_name"):
        return OpenClipTokens(name, weights) if token_by_token(vision["timm_model_name"]) else OpenClipPicture(name, weights)
    return OpenClipPicture(name, weights) if isinstance(vision.get("layers"), list) else OpenClipImage(name, weights)


def make(name: str) -> Encoder:
    """ "ViT-B-32#image" or "ViT-B-32#text", untrained."""
    model, _, side = name.partition("#")
    if side not in ("image", "text"):
        raise ValueError(
            f"found open_clip/{name}; expected which tower is meant, such as open_clip/{model}#image or open_clip/{model}#text"
        )
    return image_tower(model) if side == "image" else OpenClipText(model)


def towers(name: str, pretrained: bool) -> dict[str, Encoder | str]:
    """Modality -> encoder, for load_backbone. name: "MODEL" (its first published weights) or "MODEL:TAG".

    A text tower that has no adapter is left out with a warning.
    """
    import open_clip

    model, _, tag = name.partition(":")
    if pretrained and not tag:
        tags = open_clip.list_pretrained_tags_by_model(model)
        if not tags:
            raise ValueError(f"open_clip publishes no weights for {model}; pass pretrained=False or open_clip/{model}:FILE")
        tag = tags[0]
    weights = tag if pretrained else None
    found: dict[str, Encoder | str] = {"image": image_tower(model, weights)}
    try:
        found["text"] = OpenClipText(model, weights)
    except ValueError as error:
        warnings.warn(f"{error}. Only the image tower is loaded", stacklevel=2)
    return found
