"""timm's vision transformers as encoders: token by token, subsets allowed, pooled as timm pools them."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from headwater.modalities.image import ImageReader
from headwater.model import Encoder
from headwater.tokens import Pooled, Tokens, attention_mask, cat


class TimmImage(Encoder):
    """Any model of timm's VisionTransformer class (vit_*, deit_*, dinov2, siglip image towers).

    Args:
        name: timm's model name, such as vit_base_patch16_224.
        pretrained: fetch timm's weights.
    """

    reader: ImageReader

    def __init__(self, name: str, pretrained: bool = False) -> None:
        import timm
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import VisionTransformer

        super(Encoder, self).__init__()
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
        if type(model) is not VisionTransformer or type(model.patch_embed) is not PatchEmbed:
            raise ValueError(
                f"timm's {name} is a {type(model).__name__} on a {type(getattr(model, 'patch_embed', None)).__name__}; "
                "expected a plain VisionTransformer such as vit_tiny_patch16_224"
            )
        data = timm.data.resolve_model_data_config(model)
        self.tower, (patch, _) = model, model.patch_embed.patch_size
        self.reader = ImageReader(data["input_size"][-1], patch, "crop", data["crop_pct"], data["mean"], data["std"])
        self.width = self.dim = model.num_features
        self.features, self.vocab = self.reader.features, None
        self.spec["init_args"]["pretrained"] = False  # when it is built again, its weights come from the exported file

    def embed(self, raw: Tokens) -> Tokens:
        model = self.tower
        x = F.linear(raw.x, rearrange(model.patch_embed.proj.weight, "d c p q -> d (p q c)"), model.patch_embed.proj.bias)
        x = model.patch_embed.norm(x)
        if model.pos_embed is not None:
            side = self.reader.size // self.reader.patch
            skipped = 0 if model.no_embed_class else model.num_prefix_tokens
            index = raw.position[..., 1].long() * side + raw.position[..., 2].long() + skipped
            x = x + model.pos_embed[0][index]
        return raw._replace(x=x)

    def forward(self, t: Tokens, causal: bool = False, condition: Tensor | None = None) -> Tokens:
        if condition is not None or t.document is not None:
            raise ValueError("a timm tower takes neither a condition nor packed rows; use headwater.modalities.Image for these")
        t = cat([t, self._prefix(t)]) if self.tower.num_prefix_tokens else t
        mask = attention_mask(t, t, causal).dense
        x = self.tower.norm_pre(t.x)
        for block in self.tower.blocks:
            x = block(x, attn_mask=mask)
        return t._replace(x=self.tower.norm(x))

    def _prefix(self, t: Tokens) -> Tokens:
        """Class and register tokens of every row, (B, R, D)."""
        model = self.tower
        tokens = [p for p in (model.cls_token, model.reg_token) if p is not None]
        x = torch.cat([p[0] for p in tokens])
        if model.pos_embed is not None and not model.no_embed_class:
            x = x + model.pos_embed[0][: len(x)]
        rows = t.x.shape[0]
        position = t.position.new_zeros(rows, len(x), t.position.shape[-1])
        valid = None if t.valid is None else t.valid.any(1, keepdim=True).expand(rows, len(x))
        return Tokens(x.to(t.x.dtype).expand(rows, -1, -1), position, valid)

    def pool(self, t: Tokens) -> Pooled:
        prefix = self.tower.num_prefix_tokens
        x = torch.cat([t.x[:, t.x.shape[1] - prefix :], t.x[:, : t.x.shape[1] - prefix]], 1)
        sample = t.samples()
        return Pooled(self.tower.forward_head(x, pre_logits=True)[sample], sample)

    def unembed(self, x: Tensor) -> Tensor:
        raise ValueError("a timm tower has no head that generates; use headwater.modalities.Image for causal prediction or flow")


def make(name: str) -> Encoder:
    """The tower of that name, untrained."""
    return TimmImage(name)


def towers(name: str, pretrained: bool) -> dict[str, Encoder | str]:
    """Modality -> encoder, for load_backbone."""
    return {"image": TimmImage(name, pretrained)}
