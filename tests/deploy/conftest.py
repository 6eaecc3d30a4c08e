"""Makes the training package of the built-in checkpoint importable, and renders its chat template."""

from __future__ import annotations

import sys
from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
sys.path.insert(0, str(MODELS))
