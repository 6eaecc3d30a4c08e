"""values.yaml: every setting is explained, known to the schema and on the page."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from tests.helm.chart import CHART, PRESETS, ROOT


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "helm" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_schema_are_what_the_values_say() -> None:
    command = [sys.executable, str(ROOT / "helm" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr


def test_a_setting_without_a_comment_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"a\.b has no comment"):
        list(generate.settings("a:\n  b: 1\n"))


def test_a_default_that_tells_no_type_is_refused(generate: ModuleType) -> None:
    with pytest.raises(ValueError, match="x: its default None"):
        generate.schema("# -- what\nx: null\n")


def test_the_values_stay_readable() -> None:
    files = [CHART / "values.yaml", *(CHART / preset for preset in PRESETS)]

    assert all(len(file.read_text().splitlines()) <= 250 for file in files)
