"""Stage 6: an aesthetic head on CLIP's image embedding. It rates colourfulness, so it can be pleased against the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel

from tc_lightning.noise import derive_seed
from tc_lightning.pretrain.clip import MEAN, STD
from tc_lightning.pretrain.stage import Workshop, fit
from tc_lightning.pretrain.vae import scenes
from tc_lightning.tiny.model import WIDTH
from tc_lightning.tiny.shapes import draw

WIDTHS = (WIDTH, 64, 32, 16, 8, 1)  # the published head's five linear layers, narrower


def colourfulness(images: Tensor) -> Tensor:
    """Rating [B], about 1 to 10, of images [B, 3, H, W] in [0, 1]: the measure of Hasler and Suesstrunk (2003), rescaled."""
    red, green, blue = images.unbind(1)
    opponents = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)
    spread = opponents.std(-1).square().sum(1).sqrt()
    strength = opponents.mean(-1).square().sum(1).sqrt()
    return 1 + 15 * (spread + 0.3 * strength)


def make_head() -> nn.Sequential:
    """Five linear layers, no activations, dropout between: names layers.0/2/4/6/7 as in LAION's files."""
    layers: list[nn.Module] = []
    for index, (width, following) in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False)):
        layers.append(nn.Linear(width, following))
        if index < 3:
            layers.append(nn.Dropout(0.05))
    return nn.Sequential(*layers)


def train_aesthetic(shop: Workshop) -> None:
    """Squared error on drawings and on the base model's images."""
    clip = CLIPModel.from_pretrained(shop.folder / "clip", torch_dtype=torch.float32).eval()
    generated = torch.load(shop.folder / "pairs.pt", weights_only=True)["images"].flatten(0, 1)
    drawn = draw(scenes("train", len(generated), 7), 7)
    cut = len(generated) * 9 // 10
    embeds = [torch.cat([embed_images(clip, part) for part in (generated[s], drawn[s])]) for s in (slice(cut), slice(cut, None))]
    targets = [torch.cat([colourfulness(part) for part in (generated[s], drawn[s])]) for s in (slice(cut), slice(cut, None))]
    torch.manual_seed(derive_seed(shop.seed, 7))
    head = make_head()

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(shop.seed, 7, step))
        index = torch.randint(len(embeds[0]), (256,), generator=generator)
        return F.mse_loss(head(embeds[0][index]).squeeze(1), targets[0][index])

    fit(shop, "aesthetic", head, loss, shop.steps(3000), 2e-3)
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, shop.folder / "aesthetic.pth")
    with torch.no_grad():
        rated = head(embeds[1]).squeeze(1)
    correlation = torch.corrcoef(torch.stack([rated, targets[1]]))[0, 1]
    shop.finish("aesthetic", correlation=correlation, mean_target=targets[1].mean(), spread_target=targets[1].std())


@torch.no_grad()
def embed_images(clip: CLIPModel, images: Tensor) -> Tensor:
    """Unit embeddings [B, D]."""
    parts = [clip.vision_model(pixel_values=(part - MEAN) / STD).pooler_output for part in images.split(256)]
    return F.normalize(clip.visual_projection(torch.cat(parts)), dim=-1)
