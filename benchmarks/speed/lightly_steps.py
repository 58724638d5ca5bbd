"""Training steps of MAE and DINO beside those that lightly's own parts make, on equal weights.

Theirs are written as lightly's examples are (https://docs.lightly.ai/self-supervised-learning/examples/mae.html and dino.html):
its modules around timm's vision transformer, its losses, its moving average. Losses and gradients of both sides are compared
before anything is timed. Both have a ViT-Ti of patch 8 at 64 pixels, with a class token and sines as fixed positions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks.speed.race import OURS, Step, medians, product_rate, race, stepping, verdict
from benchmarks.speed.stopwatch import ratio
from headwater import random
from headwater.hub.timm_export import to_timm
from headwater.init import Normal
from headwater.modalities import Image
from headwater.modalities.image import grid
from headwater.model import Model
from headwater.objectives import Masked, SelfDistillation
from headwater.objectives.comparison import Prototypes
from headwater.objectives.objective import Batch, weighted_sum
from headwater.objectives.targets.target import Values
from headwater.position import Learned, Position, Sincos
from headwater.pretrainer import Pretrainer, count
from headwater.tokens import Tokens
from headwater.training.groups import Groups
from headwater.trunk import Trunk

Found = dict[str, Any]
WIDTH, SIZE, PATCH = 192, 64, 8
SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.05}
HEAD, PROTOTYPES = (512, 512, 64), 2048  # as lightly's example has them
LARGES, SMALLS, MOMENTUM = 2, 4, 0.996


def pictures(rows: int, size: int, number: int = 0) -> Tensor:
    """(rows, 3, size, size), the same for the same number."""
    return random.normal(torch.tensor(number), (rows, 3, size, size), "pictures")


def tokens(x: Tensor) -> Tokens:
    """Prepared pictures as patches, as our reader cuts them."""
    side = x.shape[-1] // PATCH
    cut = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH, q=PATCH)
    return Tokens(cut, grid(1, side, side).repeat(len(x), 1, 1))


def tower(depth: int, position: Position) -> Model:
    """Our encoder of pictures."""
    return Model({"image": Image(Trunk(WIDTH, depth, position=position, registers=1), SIZE, PATCH, pooling="class")})


def backbone(model: Model, sizes: bool) -> Any:
    """The same weights in lightly's vision transformer. sizes: it takes pictures of several sizes."""
    import timm
    from lightly.models.modules import MaskedVisionTransformerTIMM

    same: Any = to_timm(model)
    vit: Any = timm.create_model(same.exported["architecture"], **same.exported["model_args"], dynamic_img_size=sizes)
    vit.load_state_dict(same.state_dict())
    vit.pos_embed.requires_grad = False
    return MaskedVisionTransformerTIMM(vit, weight_initialization="skip", pos_embed_initialization="skip").train()


def ours(trained: Pretrainer, batch: Batch) -> dict[str, Step]:
    """Our step, and with the kernel that updates all parameters at once."""
    twin = copy.deepcopy(trained)
    optimizers = [torch.optim.AdamW(Groups().of(p), **SETTINGS, fused=p is twin) for p in (trained, twin)]
    return {OURS: stepping(trained, batch, optimizers[0]), f"{OURS}, fused AdamW": stepping(twin, batch, optimizers[1])}


def agree(trained: Pretrainer, batch: Batch, model: Any, encoder: Any, score: Callable[[Batch], Tensor]) -> None:
    """In double precision both losses are equal, and their gradients at both ends of the encoder.

    model: theirs, with its encoder. score: its loss, given what our `hide` returned.
    """
    for side in (trained, model):
        side.double()
    task = trained.hide({key: t._replace(x=t.x.double()) if isinstance(t, Tokens) else t for key, t in batch.items()})
    own, other = weighted_sum(trained.ask(task), count([trained.objective.numbers(task)]), 1), score(task)
    (own + other).backward()
    torch.testing.assert_close(own, other, rtol=1e-6, atol=0.0)
    trunk, vit = trained.backbone.encoder("image").trunk, encoder.vit
    for mine, theirs in ((trunk.norm.weight.grad, vit.norm.weight.grad), (trunk.registers.grad, vit.cls_token.grad[0])):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
    for side in (trained, model):
        side.zero_grad()
        side.float()
    print(f"equal weights: loss {own.item():.8f}, theirs {other.item():.8f}, and equal gradients")


def timed(name: str, peer: str, target: float, steps: dict[str, Step], repeats: int, rows: int, work: tuple[float, float]) -> Found:
    """Race, verdict and figures. work: floating-point operations of matrix products per sample, and how many run per second."""
    timings = race(steps, repeats, 1, rows)
    share = {row: round(t.median * work[0] / work[1], 3) for row, t in timings.items()}
    found: Found = {"samples/s": {row: round(t.median, 2) for row, t in timings.items()}, "share_of_matrix_product": share}
    print(f"{name}: of the bare matrix product's rate: {', '.join(f'{row} {s:.2f}' for row, s in share.items())}")
    if peer not in timings:
        print(f"{name}: {medians(timings)}")
        return found
    fused = ratio(timings[f"{OURS}, fused AdamW"], timings[peer])
    return {"ratio": verdict(name, timings, peer, target), "fused": round(fused, 3), **found}


def beside(steps: dict[str, Step], peer: str, make: Callable[[], Step]) -> Found:
    """Add the peer's step, or say why it is left out."""
    try:
        steps[peer] = make()
    except ModuleNotFoundError as error:
        print(f"{peer}: left out, {error}")
        return {"left_out": {peer: str(error)}}
    return {}


# --- MAE


def mae(quick: bool, repeats: int) -> tuple[dict[str, float], Found]:
    """With the decoder of lightly's example, whose ratio counts, and with the narrow one of our recipe."""
    found = {f"decoder {width}": step_of_mae(width, quick, repeats) for width in ((64,) if quick else (64, 512))}
    counts = found["decoder 64" if quick else "decoder 512"]
    return ({"lightly_mae": counts["ratio"]} if "ratio" in counts else {}), found


def step_of_mae(width: int, quick: bool, repeats: int) -> Found:
    """From prepared pictures to new weights; three quarters of the patches are hidden. width: of the decoder, of one block."""
    rows, depth = (8, 2) if quick else (64, 12)
    x, seed = pictures(rows, SIZE), torch.arange(rows)
    trained = Pretrainer(
        tower(depth, Sincos()), partial(Masked, target=partial(Values, normalize=True), width=width), init=Normal()
    )
    batch = {"image": tokens(x), "seed": seed, "sample": seed}
    steps = ours(trained, batch)
    left_out = beside(steps, "lightly_mae", lambda: their_mae(trained, batch, x, width))
    every = (SIZE // PATCH) ** 2
    seen = every // 4 + 1
    flops = 6 * 12 * (seen * depth * WIDTH**2 + (every + 1) * width**2)
    work = flops, product_rate(rows * seen, WIDTH)
    return timed(f"mae, decoder {width}", "lightly_mae", 1.05, steps, repeats, rows, work) | left_out


class MAE(nn.Module):
    """lightly's example, with the pixels of a patch normalised as in the paper."""

    def __init__(self, encoder: Any, width: int) -> None:
        super().__init__()
        from lightly.models.modules import MAEDecoderTIMM

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lightly is about to give the example's decoder another name
            sizes = {"embed_dim": WIDTH, "decoder_embed_dim": width, "decoder_num_heads": width // 64}
            self.decoder = MAEDecoderTIMM((SIZE // PATCH) ** 2, PATCH, decoder_depth=1, **sizes)
        self.backbone = encoder

    def forward(self, x: Tensor, keep: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and wanted pixels of hidden patches, (B, K, 192). Both indices count from the class token on."""
        from lightly.models import utils

        encoded = self.decoder.embed(self.backbone.encode(x, idx_keep=keep))
        masked = utils.repeat_token(self.decoder.mask_token, (len(x), self.backbone.sequence_length))
        decoded = self.decoder.decode(utils.set_at_index(masked, keep, encoded.type_as(masked)))
        predicted = self.decoder.predict(utils.get_at_index(decoded, hidden))
        wanted = utils.get_at_index(utils.patchify(x, PATCH), hidden - 1)
        return predicted, utils.normalize_mean_var(wanted)


def their_mae(trained: Pretrainer, batch: Batch, x: Tensor, width: int) -> Step:
    """lightly's step on our weights, which first agrees with ours where our mask is drawn."""
    from lightly.models import utils

    objective: Any = trained.objective
    model = MAE(backbone(trained.backbone, sizes=False), width)
    parts = {"decoder_embed": objective.way.enter["image"], "decoder_pred": objective.out["image"]}
    state = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}
    state |= {f"decoder_{key}": value for key, value in objective.way.decoder.state_dict().items()}
    code = objective.way.decoder.position.add(tokens(x[:1]))
    state |= {"mask_token": objective.way.mask["image"][None, None], "decoder_pos_embed": nn.functional.pad(code, (0, 0, 1, 0))}
    model.decoder.load_state_dict(state)
    score = nn.MSELoss()

    def with_our_mask(task: Batch) -> Tensor:
        keep, hidden = (task[key]["image"].column + 1 for key in ("kept", "places"))
        return score(*model(x.double(), nn.functional.pad(keep, (1, 0)), hidden))

    agree(trained, batch, model, model.backbone, with_our_mask)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def step() -> Tensor:
        optimizer.zero_grad()
        keep, hidden = utils.random_token_mask((len(x), model.backbone.sequence_length), mask_ratio=0.75)
        loss = score(*model(x, keep, hidden))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# --- DINO


def dino(quick: bool, repeats: int) -> tuple[dict[str, float], Found]:
    """Two large views and four of half the side."""
    rows, depth = (8, 2) if quick else (64, 12)
    views = [pictures(rows, SIZE if k < LARGES else SIZE // 2, k) for k in range(LARGES + SMALLS)]
    trained, batch = distilled(depth, Sincos(), views)
    steps = ours(trained, batch)
    left_out = beside(steps, "lightly_dino", lambda: their_dino(trained, depth, views))
    large, small = (LARGES * ((SIZE // PATCH) ** 2 + 1), SMALLS * ((SIZE // PATCH // 2) ** 2 + 1))
    block, head = depth * 12 * WIDTH**2, sum(a * b for a, b in zip((WIDTH, *HEAD), (*HEAD, PROTOTYPES), strict=True))
    flops = 6 * ((large + small) * block + (LARGES + SMALLS) * head) + 2 * (large * block + LARGES * head)
    work = flops, product_rate(rows * large, WIDTH)
    found = timed("dino", "lightly_dino", 1.12, steps, repeats, rows, work) | left_out
    return ({"lightly_dino": found["ratio"]} if "ratio" in found else {}), found


def distilled(depth: int, position: Position, views: list[Tensor]) -> tuple[Pretrainer, Batch]:
    """Our model with its objective and a batch of views."""
    compare = partial(Prototypes, prototypes=PROTOTYPES, sizes=HEAD)
    objective = partial(SelfDistillation, compare=compare, larges=LARGES, smalls=SMALLS, momentum=MOMENTUM)
    trained = Pretrainer(tower(depth, position), objective, init=Normal())
    trained.objective.start(trained.backbone)
    seed = torch.arange(len(views[0]))
    named = {key: tokens(x) for key, x in zip(trained.objective.needs, views, strict=True)}
    return trained, {**named, "seed": seed, "sample": seed}


class DINO(nn.Module):
    """lightly's example."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        from lightly.models.modules import DINOProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch is about to give weight_norm another name
            heads = [DINOProjectionHead(WIDTH, HEAD[0], HEAD[-1], PROTOTYPES) for _ in range(2)]
        self.student_backbone, self.student_head = encoder, heads[0]
        self.teacher_backbone, self.teacher_head = copy.deepcopy(encoder), heads[1]
        deactivate_requires_grad(self.teacher_backbone)
        deactivate_requires_grad(self.teacher_head)

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x).flatten(start_dim=1))

    def forward_teacher(self, x: Tensor) -> Tensor:
        """Without gradient, since no parameter has one."""
        return self.teacher_head(self.teacher_backbone(x).flatten(start_dim=1))

    def loss(self, score: nn.Module, views: list[Tensor]) -> Tensor:
        """Of large views, then small ones."""
        return score([self.forward_teacher(x) for x in views[:LARGES]], [self(x) for x in views], epoch=0)


def twin(trained: Pretrainer) -> tuple[DINO, Any]:
    """lightly's model with our weights, and its loss."""
    from lightly.loss import DINOLoss

    model, head = DINO(backbone(trained.backbone, sizes=True)), trained.objective.compare.head
    state = {f"layers.{key}": value for key, value in head.mlp.state_dict().items()}
    state |= {"last_layer.weight_g": torch.ones(PROTOTYPES, 1), "last_layer.weight_v": head.prototypes.weight}
    for theirs in (model.student_head, model.teacher_head):
        theirs.load_state_dict(state)
    return model, DINOLoss(PROTOTYPES)


def their_dino(trained: Pretrainer, depth: int, views: list[Tensor]) -> Step:
    """lightly's step on our weights. That both agree is seen without positions: timm resamples its table for small pictures,
    where our sines count patches."""
    from lightly.models.utils import update_momentum

    same, batch = distilled(depth, Learned((SIZE // PATCH, SIZE // PATCH)), views)
    position: Any = same.backbone.encoder("image").trunk.position
    nn.init.zeros_(position.table)
    same.objective.start(same.backbone)
    model, score = twin(same)
    agree(same, batch, model, model.student_backbone, lambda _: model.loss(score, [x.double() for x in views]))
    model, score = twin(trained)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)

    def step() -> Tensor:
        update_momentum(model.student_backbone, model.teacher_backbone, m=MOMENTUM)
        update_momentum(model.student_head, model.teacher_head, m=MOMENTUM)
        optimizer.zero_grad()
        loss = model.loss(score, views)
        loss.backward()
        model.student_head.cancel_last_layer_gradients(current_epoch=0)
        optimizer.step()
        return loss.detach()

    return step
