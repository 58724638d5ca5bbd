"""docs/objectives.md is up to date and complete."""

import pytest

from headwater import objectives
from headwater.tools import methods


def test_the_page_is_up_to_date():
    text = methods.PAGE.read_text("utf-8")
    assert methods.page(text) == text, "run `python -m headwater.tools.methods`"


def test_every_objective_and_every_recipe_is_on_the_page():
    text = methods.PAGE.read_text("utf-8")
    for name in set(objectives.__all__) - {"Objective", "Term"}:
        assert f"\n| `{name}` |" in text, name
    for path in methods.CONFIGS.glob("*.yaml"):
        assert f"[{path.stem}](../headwater/configs/{path.name})" in text, path.name
    for cell in ("`HashDrop`", "[2406.10209]", "| `Shape` | `Tempered` |"):
        assert cell in text


def test_every_objective_of_a_recipe_is_known():
    known = {cls.__name__ for cls in methods.classes()}
    for path in methods.CONFIGS.glob("*.yaml"):
        one = methods.recipe(path)
        assert one.mechanisms
        assert any(name in known for name in one.classes), path.name


def test_a_recipe_tells_its_mechanisms_and_nested_classes(tmp_path):
    path = tmp_path / "mine.yaml"
    asked = "{class_path: Weighted, init_args: {parts: {x: {class_path: my.Own}}, turns: [{class_path: Draw}, {class_path: Draw}]}}"
    path.write_text(f"# Mine | yours\n# mechanism: a-b, c (arXiv:1234.56789)\n# more\nmodel: {{objective: {asked}}}\n")
    expected = methods.Recipe("mine", "Mine | yours", ("a-b", "c"), ("Weighted", "Own", "Draw"), ("1234.56789",))
    assert methods.recipe(path) == expected
    path.write_text("# Mine\nmodel: {}\n")
    with pytest.raises(ValueError, match=r"mine.yaml: expected two comment lines.*mechanism"):
        methods.recipe(path)
    with pytest.raises(ValueError, match="no place for the tables"):
        methods.page("no marks")
