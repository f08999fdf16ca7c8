"""Preparing data through kills, full disks and bad input: what a cell cannot say."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bantam.core import BantamError, sha256_file
from bantam.data.pack import Shards
from bantam.data.plan import DataPlan
from bantam.data.prepare import prepare

ROOT = Path(__file__).parent.parent
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")
WORDS = ("the hen egg straw nest fox barn rain seed wing dawn sat on under over with six two red "
         "and then").split()


def corpus(folder, n=700, seed=0):
    "Stories with duplicates, short ones and conversations, and a plan that uses every gate."
    rng = random.Random(seed)
    story = lambda: " ".join(rng.choices(WORDS, k=rng.randrange(12, 50)))
    stories = [story() for _ in range(n)]
    lines = [dict(text=t) for t in stories + stories[:n//10] + ["Hm."]*7]
    rng.shuffle(lines)
    talks = [dict(messages=[dict(role="user", content=story()),
                            dict(role="assistant", content=story())]) for _ in range(n//5)]
    for name, rows in (("stories", lines), ("talks", talks)):
        (folder/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder/"data.yaml").write_text("""
data_args: {out_dir: mix, valid_fraction: 0.1, max_shard_tokens: 3000, num_workers: 0}
sources:
  - {path: stories.jsonl, name: stories, weight: 3}
  - {path: talks.jsonl, name: talks}
clean: {min_chars: 10}
dedup: {num_perm: 64}
""")
    return folder/"data.yaml"


def files(folder):
    return {str(p.relative_to(folder)): sha256_file(p)
            for p in sorted(folder.rglob("*")) if p.is_file()}


def start(config, out, workers=0, before=""):
    "`data prepare` in a process of its own; it says when it has read its plan."
    run = (f"{before}\nfrom bantam.data.plan import DataPlan\nfrom bantam.data.prepare import "
           "prepare\nimport sys\n"
           "plan = DataPlan.from_yaml(sys.argv[1], "
           "[f'data_args.num_workers={sys.argv[3]}'])\nprint('ready', flush=True)\nprepare(plan, "
           "sys.argv[2])")
    return subprocess.Popen([sys.executable, "-c", run, str(config), str(out), str(workers)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- kills ----------------------------------------------------------------------------------------

DRIVER = """
import os, sys
import datasketch
from bantam.data.plan import DataPlan
from bantam.data.prepare import prepare
for line in sys.stdin:
    out, workers = line.split()
    pid = os.fork()
    if not pid:
        plan = DataPlan.from_yaml(sys.argv[1], [f'data_args.num_workers={workers}'])
        print(os.getpid(), flush=True)
        prepare(plan, out)
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


class Driver:
    """Starts `prepare` in a fork of a process that has imported everything, so that twenty starts
    take no minute."""
    def __init__(self, config):
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER, str(config)], cwd=ROOT,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, out, workers=0, kill_after=None, since=None):
        """How it ended (9: killed) and how long it took; `kill_after` seconds, counted from the
        start, or from when `since()` holds."""
        print(out, workers, file=self.process.stdin, flush=True)
        pid, begun = int(self.process.stdout.readline()), time.monotonic()
        if kill_after is not None:
            while since and not since() and Path(f"/proc/{pid}").exists(): time.sleep(.001)
            time.sleep(kill_after)
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        return (-os.waitstatus_to_exitcode(int(self.process.stdout.readline())),
                time.monotonic() - begun)

    def close(self): self.process.stdin.close(); self.process.wait(); self.process.stdout.close()


def test_twenty_kills_end_in_the_same_bytes(tmp_path):
    """SIGKILL at 20 random moments, with and without worker processes; each new start goes on, and
    what was finished is not made again."""
    config = corpus(tmp_path)
    driver, rng, partial, out = (Driver(config), random.Random(0), tmp_path/"out.partial",
                                 tmp_path/"out")

    def finished():
        "The shards that the journal calls finished."
        journal = partial/"journal.json"
        return json.loads(journal.read_text())["train"]["shards"] if journal.exists() else []

    code, took = driver.run(tmp_path/"whole")
    whole, kills, goes_on, left = files(tmp_path/"whole"), 0, 0, {}
    assert code == 0 and len(whole) > 12
    for turn in range(60):
        # every third kill waits until one shard more is finished, however long that takes
        late = turn % 3 == 2
        code, _ = driver.run(out, workers=int(turn % 8 == 7),
                             kill_after=rng.random()*took*(.2 if late else .9),
                             since=(lambda: len(finished()) > len(left)) if late else None)
        assert code in (0, 9)
        kills += code == 9
        now = out if out.exists() else partial
        assert all((now/f).stat().st_mtime_ns == t for f, t in left.items()), "made again"
        goes_on += len(left) > 0
        assert all(sha256_file(partial/s["file"]) == s["sha256"] == whole[s["file"]]
                   for s in finished())
        left = {s["file"]: (partial/s["file"]).stat().st_mtime_ns for s in finished()}
        if out.exists(): # it got to its end: once more from the beginning
            assert files(out) == whole and not partial.exists()
            shutil.rmtree(out)
        if kills == 20: break
    assert kills == 20 and goes_on > 3, "kills came too late or too early"
    assert driver.run(out)[0] == 0 and files(out) == whole and not partial.exists()
    driver.close()


def test_a_killed_master_leaves_no_process(tmp_path):
    "The workers see that the pipe is closed, and end."
    config = corpus(tmp_path, n=4000)
    p = start(config, tmp_path/"out", workers=2)
    p.stdout.readline()
    children, end = [], time.monotonic() + 20
    while len(children) < 2 and time.monotonic() < end:
        time.sleep(.05)
        children = [int(c) for t in Path(f"/proc/{p.pid}/task").glob("*/children")
                    for c in t.read_text().split()]
    assert len(children) >= 2
    p.kill(); p.communicate()
    alive = lambda c: Path(f"/proc/{c}").exists() and "bantam.data.work" in Path(
        f"/proc/{c}/cmdline").read_text()
    while any(map(alive, children)) and time.monotonic() < end: time.sleep(.1)
    assert not any(map(alive, children))


@settings(max_examples=6)
@given(workers=st.integers(0, 2), most=st.integers(1, 400))
def test_any_number_of_workers_and_groups(tmp_path_factory, workers, most):
    from bantam.data import prepare as room
    from bantam.data.work import groups
    tmp = tmp_path_factory.mktemp("work")
    config = corpus(tmp, n=200)
    prepare(DataPlan.from_yaml(config), tmp/"whole")
    try:
        room.groups = lambda stream: groups(stream, most)
        prepare(DataPlan.from_yaml(config, [f"data_args.num_workers={workers}"]), tmp/"other")
    finally: room.groups = groups
    assert files(tmp/"other") == files(tmp/"whole")


# --- a full disk ----------------------------------------------------------------------------------

def test_a_full_disk_keeps_the_finished_shards(tmp_path):
    """The limit of the operating system on file sizes is the disk: too small for a shard, then for
    the journal when it has grown."""
    config = corpus(tmp_path)
    config.write_text(config.read_text().replace("dedup: {num_perm: 64}", ""))
    assert start(config, tmp_path/"whole").wait() == 0
    whole = files(tmp_path/"whole")
    limit = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, "
             "signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))")
    for size, finished in ((3000, 0), (6500, 1)):
        p = start(config, tmp_path/"out", before=limit.format(size))
        _, err = p.communicate()
        assert p.returncode == 1 and "BantamError: cannot write" in err, err
        journal = tmp_path/"out.partial/journal.json"
        shards = json.loads(journal.read_text())["train"]["shards"] if journal.exists() else []
        assert len(shards) >= finished and all(
            sha256_file(tmp_path/"out.partial"/s["file"]) == whole[s["file"]] for s in shards)
    assert start(config, tmp_path/"out").wait() == 0
    assert files(tmp_path/"out") == whole


# --- what is refused ------------------------------------------------------------------------------

def bad_line(folder):
    (folder/"stories.jsonl").write_text('{"text": "The hen sat on six eggs and then on '
                                        'two."}\n{"text": \n')
def empty(folder): (folder/"stories.jsonl").write_text("")
def binary(folder): (folder/"stories.jsonl").write_bytes(b'{"text": "a\x00b"}\n')
def latin(folder): (folder/"stories.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1"))
def no_field(folder): (folder/"stories.jsonl").write_text('{"body": "x"}\n')
def wrong_type(folder): (folder/"stories.jsonl").write_text('{"text": 17}\n')
def bad_role(folder):
    (folder/"talks.jsonl").write_text('{"messages": [{"role": "narrator", "content": "Meanwhile, '
                                      'in the barn"}]}\n')
def bad_gz(folder): (folder/"stories.jsonl.gz").write_bytes(b"no gzip")
def gone(folder): (folder/"stories.jsonl").unlink()
def occupied(folder): (folder/"mix").mkdir(); (folder/"mix"/"mine.txt").write_text("x")
def a_file(folder): (folder/"mix.partial").write_text("x")
def nothing(folder): pass


CASES = {
    "malformed JSON on line 2": (bad_line, [], "stories.jsonl:2 is not JSON"),
    "missing field": (no_field, [], "stories.jsonl:1 has no field 'text'"),
    "wrong type": (wrong_type, [], "field 'text' is a int"),
    "empty file": (empty, [], "stories.jsonl is empty"),
    "binary file": (binary, [], "has a zero byte"),
    "not UTF-8": (latin, [], "is not UTF-8"),
    "missing path": (gone, [], "does not exist"),
    "unreadable gz": (bad_gz, ["sources=[{path: stories.jsonl.gz}]"], "cannot unpack"),
    "unknown role": (bad_role, ["data_args.valid_fraction=0.0"], "talks.jsonl:1: message 0"),
    "unknown section": (nothing, ["cleaning.min_chars=3"],
                        "unknown key 'cleaning', did you mean 'clean'"),
    "unknown key": (nothing, ["data_args.valid_share=0.1"], "unknown key 'valid_share'"),
    "unknown key of a source": (nothing, ["sources=[{path: stories.jsonl, wieght: 2}]"],
                                "did you mean 'weight'"),
    "no source": (nothing, ["sources=[]"], "at least one source"),
    "sources not a list": (nothing, ["sources=stories.jsonl"], "must be a list"),
    "source that is two things": (nothing, ["sources=[{path: stories.jsonl, corpus: "
                                            "offline}]"], "path"),
    "two sources of one name": (nothing, ["sources=[{path: stories.jsonl}, {path: stories.jsonl}]"],
                                "two sources are called"),
    "unknown corpus": (nothing, ["sources=[{corpus: ofline}]"], "ofline"),
    "negative weight": (nothing, ["sources=[{path: stories.jsonl, weight: -1}]"], "weight"),
    "weights in a wrong unit": (nothing, ["data_args.unit=words"], "unit = 'words'"),
    "valid_fraction of 1": (nothing, ["data_args.valid_fraction=1.0"],
                            "valid_fraction must be from 0 to below 1"),
    "number as text": (nothing, ["data_args.max_shard_tokens=many"], "max_shard_tokens = 'many'"),
    "no room in a shard": (nothing, ["data_args.max_shard_tokens=0"],
                           "max_shard_tokens must be above 0"),
    "unknown template": (nothing, ["data_args.template=llama9"], "template = 'llama9'"),
    "missing tokenizer": (nothing, ["data_args.tokenizer=nowhere"], "nowhere"),
    "threshold above 1": (nothing, ["dedup.threshold=1.5"], "threshold must be"),
    "cleaner that keeps nothing": (nothing, ["clean.max_chars=5"],
                                   "min_chars 10 is above max_chars 5"),
    "bits per byte without a model": (nothing, ["clean.max_bits_per_byte=3"],
                                      "nothing scores them"),
    "everything dropped": (nothing, ["clean.min_chars=100000"],
                           "no document is left on the 'valid' side"),
    "negative workers": (nothing, ["data_args.num_workers=-2"], "num_workers must be 0 or more"),
    "folder that is no shard folder": (occupied, [], "has no manifest.json"),
    "file in the way": (a_file, [], "cannot make"),
    "no place": (nothing, ["data_args.out_dir=null"], "out_dir is not set"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(case, tmp_path):
    "Refused with a message that names it; what was in the folder before is there after."
    config = corpus(tmp_path, n=30)
    spoil, changes, message = CASES[case]
    spoil(tmp_path)
    raw = {f: h for f, h in files(tmp_path).items() if ".partial" not in f}
    with pytest.raises(BantamError) as e: prepare(DataPlan.from_yaml(config, changes))
    assert message in str(e.value) and len(str(e.value).splitlines()) <= 5, str(e.value)
    assert {f: h for f, h in files(tmp_path).items() if ".partial" not in f} == raw


def test_a_mended_line_goes_on(tmp_path):
    "What broke is mended behind the place that was reached: the work goes on from there."
    config = corpus(tmp_path)
    text = (tmp_path/"stories.jsonl").read_text()
    prepare(DataPlan.from_yaml(config), tmp_path/"whole")
    lines = text.splitlines(keepends=True)
    (tmp_path/"stories.jsonl").write_text("".join(lines[:-3] + ['{"text": 5}\n'] + lines[-2:]))
    from bantam.data import prepare as room
    from bantam.data.work import groups
    try:
        room.groups = lambda stream: groups(stream, 50)
        with pytest.raises(BantamError, match="field 'text' is a int"):
            prepare(DataPlan.from_yaml(config))
    finally: room.groups = groups
    done = json.loads((tmp_path/"mix.partial/journal.json").read_text())["train"]["shards"]
    assert done
    (tmp_path/"stories.jsonl").write_text(text)
    prepare(DataPlan.from_yaml(config))
    assert files(tmp_path/"mix") == files(tmp_path/"whole")


def test_two_tokenizers_on_one_shard(tmp_path):
    config = corpus(tmp_path, n=40)
    plan = DataPlan.from_yaml(config, ["data_args.valid_fraction=0.0"])
    prepare(plan)
    class Other: fingerprint, vocab_size = "f"*64, plan.tokenizer.vocab_size
    with pytest.raises(BantamError, match="was made with tokenizer"): Shards(tmp_path/"mix", Other)
    for change, message in ((lambda f: f.write_bytes(f.read_bytes()[:-2]), "its manifest says"),
                            (lambda f: f.write_bytes(b"\x01" + f.read_bytes()[1:]), "was altered")):
        f = tmp_path/"mix"/"shard-00000.bin"
        good = f.read_bytes()
        change(f)
        with pytest.raises(BantamError, match=f"shard-00000.bin.*{message}"):
            Shards(tmp_path/"mix", plan.tokenizer)
        f.write_bytes(good)
    Shards(tmp_path/"mix", plan.tokenizer)


def test_one_at_a_time(tmp_path):
    from bantam.core import locked
    config = corpus(tmp_path, n=30)
    (tmp_path/"mix.partial").mkdir()
    with locked(tmp_path/"mix.partial"):
        with pytest.raises(BantamError, match="another process is preparing"):
            prepare(DataPlan.from_yaml(config))
    prepare(DataPlan.from_yaml(config))


def test_another_exam_is_noticed(tmp_path):
    "What is forbidden is read, not its name: neither a half nor a whole folder mixes two exams."
    config = corpus(tmp_path, n=100)
    text = (tmp_path/"stories.jsonl").read_text()
    exams = ["\n".join(text.splitlines()[i:i+20]) + "\n" for i in (0, 50)]
    def run(exam, stories=text):
        (tmp_path/"exam.jsonl").write_text(exam)
        (tmp_path/"stories.jsonl").write_text(stories)
        return prepare(DataPlan.from_yaml(config, ["data_args.contamination=exam.jsonl"]))
    with pytest.raises(BantamError, match="not JSON"): run(exams[0], text + "{")
    assert (tmp_path/"mix.partial"/"journal.json").exists()
    with pytest.raises(BantamError, match="other settings .content.contamination"): run(exams[1])
    made = run(exams[0])
    assert run(exams[0]) == made and made["dropped"]["contaminated"]
    with pytest.raises(BantamError, match="other settings .content.contamination"): run(exams[1])


def test_a_dataset_lies_beside_the_settings(tmp_path, monkeypatch):
    import datasets
    home, away = tmp_path/"home", tmp_path/"away"
    for place, word in ((home, "home"), (away, "away")):
        datasets.Dataset.from_list([dict(text=f"{word} is where the hen sat on egg {i}")
                                    for i in range(40)]).save_to_disk(place/"hens")
    (home/"data.yaml").write_text("data_args: {valid_fraction: 0, num_workers: 0}\n"
                                  "sources: [{hf_name: hens}]\n")
    monkeypatch.chdir(away)
    plan = DataPlan.from_yaml(home/"data.yaml")
    assert {r.text[:4] for _, r in plan.mixture("train")} == {"home"}
    assert [s.label for s in plan.sources] == ["hens"]
