"""The embedded model's rewards: the published rewards' own classes on the small checkpoints that ship in the package."""

from tc_lightning.backbone import TINY
from tc_lightning.rewards.aesthetic import Aesthetic
from tc_lightning.rewards.clip import CLIPScore
from tc_lightning.rewards.pickscore import PickScore


def tiny_clip(weight: float = 1.0) -> CLIPScore:
    """The CLIP whose text tower conditions the embedded model: cosine in [-1, 1]."""
    return CLIPScore(TINY / "clip", weight=weight, name="tiny_clip")


def tiny_preference(weight: float = 1.0) -> PickScore:
    """CLIP fine-tuned on pairs of the embedded model's own images, the better one named by the oracle (PickScore's way)."""
    return PickScore(TINY / "preference", processor=TINY / "preference", weight=weight, name="tiny_preference")


def tiny_aesthetic(weight: float = 1.0) -> Aesthetic:
    """A head on CLIP's image embedding that rates colourfulness from 1 to 10; it never sees the prompt."""
    return Aesthetic(TINY / "aesthetic.pth", clip=TINY / "clip", weight=weight, name="tiny_aesthetic")
