"""What every benchmark says about itself: the machine, the versions, and the last line. A script's
folder is on its path, so `from _common import machine` finds this file."""
import json, os, platform, subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine(device="cpu", **more):
    """What a figure depends on: processor, cores, system, wait policy, GPU; `more` is what a
    benchmark adds."""
    about = dict(processor=processor(), cores=cores(), system=platform.system(),
                 OMP_WAIT_POLICY=os.environ.get("OMP_WAIT_POLICY", "default"))
    if str(device).startswith("cuda"):
        import torch
        about["gpu"] = torch.cuda.get_device_name()
    return about | more


def processor():
    "The processor's name: Linux tells it in a file, elsewhere Python must do."
    try:
        return next(l.split(":")[1].strip() for l in open("/proc/cpuinfo")
                    if l.startswith("model name"))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def cores():
    "Cores that this process may use, which a container may have limited."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(*packages):
    "Versions of Python, bantam and the packages that took part; what is not installed is left out."
    found = dict(python=platform.python_version())
    for name in ("bantam-lm", *packages):
        try: found[name] = version(name)
        except PackageNotFoundError: pass
    return found


def commit():
    "What was measured: the commit, and `-dirty` where more than results differ from it."
    def git(*words):
        try: done = subprocess.run(["git", *words], cwd=Path(__file__).parent.parent,
                                   capture_output=True, text=True)
        except FileNotFoundError: return "" # a machine without git
        return done.stdout.strip()
    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "-dirty"*bool(changed)


def report(result, file=None, **rows):
    "Write `result`, the commit and all `rows` to `file`, and print it alone as the last line."
    result = result | dict(commit=commit())
    if file:
        Path(file).absolute().parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(json.dumps(result | rows, indent=2) + "\n")
    print(json.dumps(result))
