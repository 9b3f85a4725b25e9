"""The core needs torch and safetensors only."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import gplq
foreign = ('mmengine', 'mmcv', 'mmdet', 'timm', 'torchvision', 'gplq.plugins', 'plugins', 'tools')
found = [name for name in sys.modules if name in foreign or name.startswith(tuple(f + '.' for f in foreign))]
print(found)
sys.exit(bool(found))
"""


def test_importing_gplq_imports_no_framework() -> None:
    process = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
