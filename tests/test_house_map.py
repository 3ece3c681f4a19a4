"""The map of CONTRIBUTING.md: it lists today's modules with today's first lines."""

import pytest

from tools import house_map


def test_the_map_is_of_today():
    text = house_map.PAGE.read_text(encoding="utf-8")
    assert house_map.rewritten(text) == text, "stale: `python -m tools.house_map` writes the map anew"


def test_every_module_is_listed_with_a_line():
    listed = {line.split()[0]: line.split(maxsplit=1)[1:] for line in house_map.house_map().splitlines()}
    for folder in ("trm_kernels", "hybrid", "bench", "examples", "tools"):
        for path in (house_map.ROOT / folder).rglob("*.py"):
            if path.name != "__init__.py":
                assert listed[path.name], f"{path}: expected a docstring"


def test_a_new_module_makes_it_stale(tmp_path):
    for name in house_map.FOLDERS:
        (tmp_path / name).mkdir()
    (tmp_path / "hybrid/rooms").mkdir()
    (tmp_path / "hybrid/rooms/__init__.py").write_text('"""Some rooms.\n\nNot shown.\n"""\n')
    (tmp_path / "hybrid/rooms/kitchen.py").write_text('"""Where it is cooked.\n\nNot shown.\n"""\n')
    (tmp_path / "hybrid/door.py").write_text('"""The way in"""\n')
    text = "before\n<!-- map -->\n```text\nold\n```\n<!-- end of map -->\nafter\n"
    lines = house_map.rewritten(text, tmp_path).splitlines()
    begin = lines.index("hybrid/")
    assert lines[begin + 1 : begin + 4] == [
        "  door.py  The way in",
        "  rooms/  Some rooms",
        "    kitchen.py  Where it is cooked",
    ]
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines


def test_refuses_a_page_without_a_map():
    with pytest.raises(ValueError, match="expected one map"):
        house_map.rewritten("<!-- map -->\n")
