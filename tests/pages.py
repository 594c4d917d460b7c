"""Pages of the documentation, as tests run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_CALL = "import sys; from tersor.cli import main; sys.exit(main())"
_FUNCTIONS = f"""\
python() {{ {sys.executable} "$@"; }}
tersor() {{ python -c '{_CALL}' "$@"; }}
"""


def blocks(page: str | Path, language: str) -> list[str]:
    """The code in a language on a page, given by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shell(commands: str, folder: Path, timeout: float = 300) -> str:
    """What commands print in a folder; each must succeed. `tersor` and `python` are those of this test."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _FUNCTIONS + commands],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
