"""README.md from nbs/index.ipynb. `python tools/readme.py` writes it, `--check` fails when the two
differ."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def fence(lang, text): return f"```{lang}\n{text.strip()}\n```"


def readme():
    """The index as GitHub Markdown: hidden cells left out, text outputs below their cell, pictures
    by their place in the repository."""
    parts = []
    for c in json.loads((ROOT/"nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]:
        src = "".join(c["source"])
        if re.match(r"#\|\s*hide\b", src) or not src.strip(): continue
        if c["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\(((?!https?:|#)[^)]+)\)", lambda m: f"](nbs/{m[1]})", src))
            continue
        if not re.match(r"#\|\s*echo:\s*false", src):
            parts.append(fence("python", re.sub(r"^#\|.*\n?", "", src, flags=re.M)))
        out = "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", ""))
                      for o in c["outputs"])
        if out.strip(): parts.append(fence("text", out))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    file, text = ROOT/"README.md", readme()
    if "--check" in sys.argv:
        sys.exit(0 if file.exists() and file.read_text(encoding="utf-8") == text
                 else "README.md differs from nbs/index.ipynb; run `make readme`")
    file.write_text(text, encoding="utf-8")
