"""The page of all settings says what the classes say."""

import runpy
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "write_configuration.py"


def test_the_page_is_up_to_date() -> None:
    names = runpy.run_path(str(TOOL))
    assert names["PAGE"].read_text(encoding="utf-8") == names["page"](), "run python tools/write_configuration.py"
