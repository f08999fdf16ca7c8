"""Work on notebooks as text and run them, around nbdev 2.4.14.

python tools/nb.py text nbs/00_core.ipynb > X.py     # a notebook as editable text (py:percent)
python tools/nb.py put X.py nbs/00_core.ipynb        # text back into the notebook (new or updated), export, run, clean
python tools/nb.py run [nbs/00_core.ipynb ...]       # execute, keep the outputs, clean the metadata
python tools/nb.py test [nbs/00_core.ipynb ...]      # execute only, one process a notebook
"""
import os, subprocess, sys, time
from pathlib import Path

PLAIN = ["--opt", "notebook_metadata_filter=-all", "--opt", "cell_metadata_filter=-all"]


def shrink(nb):
    "Pictures with a palette of 256 colours: a third of the size, no difference to the eye."
    import base64, io
    from PIL import Image
    for out in (o for c in nb.cells if c.cell_type == "code" for o in c.get("outputs", [])):
        png = out.get("data", {}).get("image/png")
        if not png: continue
        im, small = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
        if im.mode == "P": continue
        im.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        out["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()


def run_one(fn, save=True):
    """Run `fn` as `nbdev_test` does; with `save`, write the cleaned outputs back. True when every
    cell ran."""
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastcore.xtras import working_directory
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    from nbdev.process import NBProcessor
    fn = Path(fn).absolute()
    cfg = get_config(path=fn.parent)
    sys.path.insert(0, str(cfg.config_path))
    os.environ["IN_TEST"] = "1"
    skip = set(cfg.tst_flags.split())
    dirs = [getattr(c, "directives_", {}) or {} for c in NBProcessor(fn, process=True).nb.cells]
    nb = read_nb(fn)

    def no_eval(cell):
        d = dirs[cell.idx_]
        return (cell.cell_type != "code" or "nbdev_export(" in cell.source or bool(skip & d.keys())
                or d.get("eval:", [""])[0].lower() == "false")

    for c in nb.cells:
        if not no_eval(c): c.outputs = []
    k, ok = CaptureShell(fn), True
    try:
        with working_directory(fn.parent): k.run_all(nb, exc_stop=True, preproc=no_eval)
    except BaseException:
        ok = False
        sys.stderr.write(k.prettytb(fname=fn) + "\n")
    if ok and save:
        clean_nb(nb, clean_ids=True)
        shrink(nb)
        write_nb(nb, fn)
    return ok


def put(text, nb):
    """Write `text` into `nb` (cell ids and outputs of unchanged cells are kept) and export its
    module."""
    from nbdev.config import get_config
    from nbdev.export import nb_export
    Path(nb).parent.mkdir(parents=True, exist_ok=True)
    how = (["--update", "--to", "ipynb"] if Path(nb).exists()
           else ["--to", "ipynb", "--set-kernel", "python3"])
    subprocess.run([sys.executable, "-m", "jupytext", "-q", *how, "-o", str(nb), str(text)],
                   check=True)
    nb_export(Path(nb).absolute(), lib_path=get_config(path=Path(nb).parent).lib_path)


def main(cmd, *files):
    if cmd == "text":
        return subprocess.run([sys.executable, "-m", "jupytext", "-q", "--to", "py:percent", *PLAIN,
                               files[0], "-o", "-"]).returncode
    if cmd == "put":
        put(*files)
        cmd, files = "run", files[1:]
    files = [Path(f) for f in files] or sorted(
        p for p in Path("nbs").rglob("[!_.]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    bad = []
    for f in files:
        t = time.time()
        rc = subprocess.run([sys.executable, __file__, "_" + cmd, str(f)]).returncode
        print(f"{'ok  ' if rc == 0 else 'FAIL'} {f} {time.time() - t:.1f}s", flush=True)
        if rc: bad.append(f)
    print(f"{len(files) - len(bad)} passed, {len(bad)} failed")
    return bool(bad)


if __name__ == "__main__":
    cmd, *files = sys.argv[1:] or ["help"]
    if cmd.lstrip("_") not in ("text", "put", "run", "test"): sys.exit(__doc__)
    if cmd[0] == "_": sys.exit(not run_one(files[0], save=cmd == "_run"))
    sys.exit(main(cmd, *files))
