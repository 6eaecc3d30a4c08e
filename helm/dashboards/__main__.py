"""Renders the dashboards to helm/mull/dashboards; with --check only says which file there is stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from helm.dashboards.engine import engine
from helm.dashboards.fleet import fleet
from helm.dashboards.service import service
from helm.dashboards.thinking import thinking

FOLDER = Path(__file__).parent.parent / "mull" / "dashboards"


def rendered() -> dict[Path, str]:
    """The text of each file."""
    boards = {"service": service(), "thinking": thinking(), "engine": engine(), "fleet": fleet()}
    return {FOLDER / f"{name}.json": _text(board) for name, board in boards.items()}


def _text(board: Dashboard) -> str:
    # Grafana shows panels in the order of their ids; the builders leave them out.
    for number, panel in enumerate(board.panels or [], start=1):
        panel.id_val = number
    return json.dumps(board, cls=JSONEncoder, sort_keys=True, indent=1) + "\n"


def main() -> int:
    files = rendered()
    stale = [file for file, text in files.items() if not file.exists() or file.read_text() != text]
    stale += sorted(set(FOLDER.glob("*.json")) - set(files))
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.name} in {FOLDER} is not what helm/dashboards says; run `make chart`", file=sys.stderr)
        return 1 if stale else 0
    for file in stale:
        if file in files:
            file.write_text(files[file])
        else:
            file.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
