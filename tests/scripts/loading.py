# SPDX-License-Identifier: Apache-2.0
"""Import a script, which is no module of a package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def script_module(name: str) -> ModuleType:
    """Run ``scripts/<name>.py`` as a module of that name."""
    path = Path(__file__).resolve().parents[2] / "scripts" / f"{name}.py"
    if str(path.parent) not in sys.path:  # where Python finds what a script imports from beside it
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
