from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code in a bare process, since a process imports mmcv.ops once."""
    command = [sys.executable, '-c', code, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_missing_operator_names_itself_and_the_way_out(tmp_path: Path) -> None:
    code = """
import gplq.plugins.detection, torch
from mmcv.ops import box_iou_rotated
box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5))
"""
    done = run(code, tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('NotImplementedError')
    assert '`box_iou_rotated`' in last
    assert 'pip uninstall mmcv-lite' in last


def test_steps_aside_for_compiled_operators(tmp_path: Path) -> None:
    code = """
import importlib.machinery, sys, types
import mmcv

class Compiled:
    # An mmcv that finds a compiled module of this name.
    def find_spec(self, name, path=None, target=None):
        if name == 'mmcv._ext':
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: 'compiled ' + name
        return module
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Compiled())
import gplq.plugins.detection as detection
assert not detection.install_operators()
from mmcv.ops.nms import ext_module
assert ext_module.nms == 'compiled nms'
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_environment_report_says_whose_operators_these_are(tmp_path: Path) -> None:
    code = 'import gplq.plugins.detection; from mmcv.ops import get_compiler_version as v; print(v())'
    done = run(code, tmp_path)
    assert done.stdout.strip() == 'not compiled (operators by gplq)', done.stderr


def test_missing_mmdet_is_one_sentence(tmp_path: Path) -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == 'mmdet' else find(name, package)
import gplq.plugins.detection
"""
    done = run(code, tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('ImportError: gplq.plugins.detection needs mmdet.')
    assert "pip install '.[detection]'" in last


@pytest.mark.parametrize('launcher', [False, True])
def test_launcher_runs_programs_that_import_operators_early(launcher: bool, tmp_path: Path) -> None:
    (tmp_path / 'helper.py').write_text('WORD = "from beside the script"\n')
    script = tmp_path / 'program.py'
    script.write_text(
        'import sys\nfrom mmcv.ops import nms\nimport helper\n'
        'assert __name__ == "__main__"\nprint(sys.argv[1:], helper.WORD)\n'
    )
    prefix = [sys.executable, '-m', 'gplq.plugins.detection'] if launcher else [sys.executable]
    command = [*prefix, str(script), 'a', '--b', 'c']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path.parent, timeout=120)
    if launcher:
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "['a', '--b', 'c'] from beside the script"
    elif done.returncode == 0:
        pytest.skip('mmcv has its own operators here')
    else:
        assert 'mmcv._ext' in done.stderr


def test_launcher_explains_itself(tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'gplq.plugins.detection']
    done = subprocess.run([*command, '--help'], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0
    assert 'python -m gplq.plugins.detection path/to/mmdetection/tools/test.py' in done.stdout
    done = subprocess.run([*command, 'none.py'], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert done.stderr.strip() == 'gplq.plugins.detection: there is no script none.py'
