"""What README says can be typed, can be typed."""

import re

import pytest
import torch


def code(root, language):
    return re.findall(rf"```{language}\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.full
def test_its_python_runs(root):
    (block,) = code(root, "python")
    names = {}
    exec(block, names)  # noqa: S102
    assert names["images"].shape == (1, 3, 32, 32) and names["images"].isfinite().all()
    assert isinstance(names["module"], torch.nn.Module)


def test_its_links_lead_somewhere(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    places = [place for place in re.findall(r"\]\(([^)#]+)", text) if "://" not in place]
    assert places and [place for place in places if not (root / place).exists()] == []
