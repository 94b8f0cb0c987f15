"""examples/first_scores.ipynb runs, and its outputs say what those say that are kept in it.

``python tests/test_notebook.py`` runs it and keeps what comes out.
"""

import json
import re
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_scores.ipynb"


def execute(notebook, folder):
    """Run it in a kernel of this environment."""
    return nbclient.NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()


def printed(cell):
    return "".join("".join(o.get("text", "")) for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")


def words(text):
    """``text`` with every number as one sign: other processors round, and sample, differently."""
    return re.sub(r"\s+", " ", re.sub(r"\[[^\]]*\]", "#", re.sub(r"-?\d+(?:\.\d+)?", "#", text)))


def test_the_notebook_runs_and_scores(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("matplotlib")
    kept = nbformat.read(NOTEBOOK, as_version=4)
    done = execute(nbformat.from_dict(json.loads(json.dumps(kept))), tmp_path)
    code = [(old, new) for old, new in zip(kept.cells, done.cells, strict=True) if old.cell_type == "code"]
    assert not [o for _, cell in code for o in cell.outputs if o.output_type == "error"]
    for old, new in code:
        assert bool(printed(old)) == bool(printed(new)), old.source
        if "for c in sorted" not in old.source and "decode(out[0" not in old.source and "best.best.text" not in old.source:
            assert words(printed(old)) == words(printed(new)), old.source
    everything = "\n".join(printed(cell) for _, cell in code)
    assert "steps: [" in everything and "the same answer: True" in everything
    ranked = next(printed(cell) for _, cell in code if "for c in sorted" in cell.source).splitlines()
    scores = [float(line.split()[0]) for line in ranked]
    assert len(scores) == 8 and scores == sorted(scores, reverse=True) and 0 <= scores[-1] <= scores[0] < 1
    shown = next(cell for _, cell in code if cell.source == "best")
    assert shown.outputs[0].output_type == "execute_result"
    stream, finished = (float(n) for n in re.findall(r"(?:decoding|text):\s+([\d.]+)", everything))
    assert stream == pytest.approx(finished, abs=1e-4)


def test_what_is_kept_reads_well():
    kept = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(kept)
    code = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(c.outputs for c in code[1:]), "every cell but the first one shows something"
    assert not [o for c in code for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 500_000, "GitHub shows no large notebooks"
    assert not re.search(r"(?:/home|/root|/tmp|/work|/Users)/", NOTEBOOK.read_text(encoding="utf-8")), "paths of the machine that ran it"
    assert any("image/png" in o.get("data", {}) for c in code for o in c.outputs)


def write():
    """Run the notebook and keep its outputs, without what is of this machine alone."""
    with tempfile.TemporaryDirectory() as folder:
        done = execute(nbformat.read(NOTEBOOK, as_version=4), folder)
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.metadata.clear()
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and not any("widget" in kind for kind in o.get("data", ()))]
    done.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    nbformat.write(done, NOTEBOOK)


if __name__ == "__main__":
    write()
