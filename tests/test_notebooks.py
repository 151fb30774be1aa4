# SPDX-License-Identifier: Apache-2.0
"""Every notebook of colab/ runs in its smoke mode without network and is stored without outputs."""

import json
import os
import site
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from particlejax.data import sources

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SITE = "https://colab.research.google.com/github/particlejax/particlejax/blob/main/colab"
SECONDS = 600  # that a cell may take
SWITCH = "TINY = False"


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache_dir: str) -> Path:
    """A home directory with the rendered toybox, where notebooks find it by default."""
    sources.open_source("toybox:tiny", "test", cache_dir)
    folder = tmp_path_factory.mktemp("home")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "particlejax").symlink_to(cache_dir)
    return folder


@pytest.fixture
def kernel(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel of this very interpreter, with the repository on its path and no network."""
    folder = tmp_path / "jupyter" / "kernels" / "same_environment"
    folder.mkdir(parents=True)
    nowhere = "http://127.0.0.1:9"
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this interpreter",
        "language": "python",
        "env": {
            "HOME": str(home),
            "PYTHONUSERBASE": site.getuserbase(),  # else it would follow HOME
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PIP_NO_INDEX": "1",
            "http_proxy": nowhere,
            "https_proxy": nowhere,
        },
    }
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return folder.name


@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages are not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_its_smoke_mode(path: Path, kernel: str, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = code_cells(notebook)[0]
    first.source = first.source.replace(SWITCH, "TINY = True")
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name=kernel,
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(workdir)}},
    )
    client.execute()  # shuts its kernel down, also after an error
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_there_are_six_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "ablation",
        "extend",
        "particles",
        "quickstart",
        "tpu_pretraining",
        "your_videos",
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert not cell.outputs, f"{path.name} has outputs: clear them before you commit"
        assert cell.execution_count is None, f"{path.name} has execution counts: clear them"
        assert "execution" not in cell.metadata


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_how_to_run_it_and_what_it_costs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    head, (parameters, install) = notebook.cells[0].source, code_cells(notebook)[:2]
    assert f"]({SITE}/{path.name})" in head
    assert "**Cost:**" in head
    assert parameters.source.splitlines().count(SWITCH) == 1
    assert "parameters" in parameters.metadata.tags  # as papermill looks for them
    assert 'find_spec("particlejax") is None' in install.source
    assert "%pip install" in install.source and "github.com/particlejax" in install.source
