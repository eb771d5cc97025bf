"""The notebooks run from top to bottom, draw, and are committed without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_nothing_of_a_machine_is_committed(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what jupyter says of itself
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_it_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    read = nbformat.read(notebook, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(read, timeout=280, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in read.cells for output in cell.get("outputs", ())]
    shown = "".join(output.text for output in outputs if output.output_type == "stream")
    for name in ("rope", "carope", "alibi"):
        assert f"{name}: " in shown
    assert "fastest: " in shown
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 3
    errors = [output.text for output in outputs if output.get("name") == "stderr"]
    assert errors == []
