"""Make the vocabulary that is shipped with bantam: python tools/make_default_tokenizer.py [FOLDER]

English and a little Python, from what needs no network: the offline corpus, and the help topics, docstrings and comments of CPython's standard
library. The same CPython gives the same bytes, whatever the machine and the number of cores; the shipped one names its own.
"""
import ast, platform, re, sys, sysconfig, warnings
from pathlib import Path

from bantam.data.offline import documents
from bantam.text.trainbpe import train_bpe

# Parts that some distributions leave out, or that hold no English
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip",
           "site-packages", "dist-packages"}
DOCUMENTED = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef


def stdlib():
    """The topics of `help()`, and of each module its docstrings and the comments that start with a
    word."""
    from pydoc_data.topics import topics
    yield from topics.values()
    top = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p for p in top.rglob("*.py") if not SKIPPED & {*p.relative_to(top).parts}):
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"): tree = ast.parse(source)
        yield from (doc for node in ast.walk(tree) if isinstance(node, DOCUMENTED)
                    and (doc := ast.get_docstring(node)))
        yield " ".join(re.findall(r"^\s*#+ ?([A-Za-z].*)$", source, re.M))


def offline(n):
    "The texts of the offline corpus, those of its conversations one by one."
    for d in documents(n):
        yield from [d["text"]] if "text" in d else (m["content"] for m in d["messages"])


def corpus():
    "Everything, without the lines that frame tables: each length of them would become a token."
    yield from (re.sub(r"[-+=|#*~^_.]{9,}", "", text) for text in stdlib())
    yield from offline(4000)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(
        __file__).parent.parent/"bantam/text/default"
    tok = train_bpe(corpus(), vocab_size=8192)
    tok.args["files"] = ["offline corpus, 4000 documents",
                         f"standard library of CPython {platform.python_version()}"]
    tok.save(folder)
    print(tok, {k: tok.args[k] for k in ("records", "characters")})
