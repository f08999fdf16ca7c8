"""The live plot in a real Jupyter kernel."""
import base64
from pathlib import Path

CELL = '''
from types import SimpleNamespace
from bantam.train.report import LivePlot
from bantam.train.track import full_row
rows = []
trainer = SimpleNamespace(log=SimpleNamespace(rows=rows), total_steps=3)
plot = LivePlot(every=0)
for s in range(1, 4):
    rows.append(full_row(dict(step=s, loss=3/s)))
    plot.on_step(trainer, rows[-1])
'''


def test_one_picture_that_is_replaced(monkeypatch):
    import nbclient
    import nbformat
    from bantam.train.report import loss_curve, png
    from bantam.train.track import full_row, progress_line
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    shown = [o for o in nb.cells[0].outputs if o.output_type == "display_data"]
    assert len(shown) == 1 == len(nb.cells[0].outputs)
    rows = [full_row(dict(step=s, loss=3/s)) for s in range(1, 4)]
    assert base64.b64decode(shown[0].data["image/png"]) == png(
        loss_curve(rows, title=progress_line(rows[-1], 3)))
