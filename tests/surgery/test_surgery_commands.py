from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

import headwater
from headwater.cli import recipe_path
from headwater.hub import save_backbone
from headwater.modalities import Text
from headwater.model import Model
from headwater.surgery import combined
from headwater.tools.surgery import soup, surgery
from headwater.trunk import Trunk


@pytest.fixture
def small(tmp_path):
    torch.manual_seed(0)
    model = Model({"text": Text(Trunk(64, 2, position="rotary"), length=64)}).eval()
    save_backbone(model, tmp_path / "small")
    return tmp_path / "small", model


def test_a_recipe_is_operated_on_and_exported(small, tmp_path, capsys):
    folder, model = small
    recipe = yaml.safe_load(Path(recipe_path("grown")).read_text())
    text = recipe["model"]["backbone"]["encoders"]["text"]
    text["init_args"]["encoder"]["init_args"]["encoder"] = {
        "class_path": "headwater.hub.pretrained",
        "init_args": {"name": str(folder)},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    surgery(str(path), str(tmp_path / "large"))
    backbone = headwater.load_backbone(tmp_path / "large")
    large = backbone.model.encoder("text")
    assert (large.width, len(large.trunk.blocks)) == (128, 4)
    assert backbone.card["operations"]["encoders"]["text"]["class_path"] == "headwater.surgery.deeper"
    assert "new" in backbone.card["became"]["text"]
    assert backbone.card["became"]["text"] in capsys.readouterr().out
    t = headwater.load_backbone(folder).batch({"text": ["the same words"]})["text"]
    small_text = model.encoder("text")
    with torch.no_grad():
        a, b = (e.unembed(e(e.embed(t), True).x) for e in (small_text, large))
    assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="already"):
        surgery(str(path), str(tmp_path / "large"))
    with pytest.raises(ValueError, match="operates on none"):
        surgery("lm", str(tmp_path / "none"))


def test_a_soup_is_exported(small, tmp_path):
    folder, model = small
    other = deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    save_backbone(other, tmp_path / "other")
    soup([str(folder), str(tmp_path / "other")], str(tmp_path / "soup"), weights=[0.25, 0.75])
    backbone = headwater.load_backbone(tmp_path / "soup")
    assert_close(backbone.model.state_dict(), combined([model.state_dict(), other.state_dict()], [0.25, 0.75]))
    assert backbone.card["merged"]["weights"] == [0.25, 0.75]
