"What a stranger's program may try, and that the chat goes on."
import os
import resource
import time

import pytest

from bantam.chat.tools import ToolBox
from bantam.core import BantamError

pytest.importorskip("pydantic_monty", reason="the sandbox needs pydantic-monty (bantam-lm[tools])")
from bantam.chat.sandbox import MAX_CODE, Sandbox, python_tool  # noqa: E402

ATTACKS = {
    # files
    "read a file": "open('/etc/passwd').read()",
    "write a file": "open('/tmp/bantam-escape', 'w').write('x')",
    "pathlib": "from pathlib import Path\nPath('/etc/passwd').read_text()",
    "list a folder": "import os\nos.listdir('/')",
    "delete": "import os\nos.remove('/tmp/bantam-escape')", "its own code": "open(__file__).read()",
    "proc": "open('/proc/self/environ').read()",
    "shutil": "import shutil\nshutil.rmtree('/')",
    "tempfile": "import tempfile\ntempfile.mkstemp()",
    "sqlite": "import sqlite3\nsqlite3.connect('/tmp/bantam-escape')",
    # network
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', 22))",
    "urllib": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
    "http": "import http.client",
    "requests": "import requests\nrequests.get('http://127.0.0.1')",
    "asyncio network": "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 22))",
    # processes
    "os.system": "import os\nos.system('touch /tmp/bantam-escape')",
    "subprocess": "import subprocess\nsubprocess.run(['ls'])",
    "fork": "import os\nwhile True: os.fork()", "kill": "import os\nos.kill(os.getppid(), 9)",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "multiprocessing": "import multiprocessing", "ctypes": "import ctypes\nctypes.string_at(0)",
    "environment": "import os\nos.environ['PATH']",
    "getenv": "import os\nos.getenv('HOME').upper()", "signal": "import signal",
    "importlib": "import importlib\nimportlib.import_module('os').system('ls')",
    "builtins": "import builtins\nbuiltins.open('/etc/passwd')",
    # walks
    "subclasses": "().__class__.__bases__[0].__subclasses__()",
    "globals of a function": "(lambda: 0).__globals__",
    "getattr": "getattr((), '__cl' + 'ass__').__mro__",
    "format": "'{0.__class__.__mro__}'.format(())",
    "import function": "__import__('os').system('ls')",
    "frame": "try:\n    1/0\nexcept Exception as e:\n    e.__traceback__.tb_frame.f_globals",
    "generator frame": "(x for x in ()).gi_frame.f_builtins",
    "code object": "(lambda: 0).__code__.co_consts", "globals": "globals()['__builtins__']",
    "eval a walk": "eval('().__class__.__mro__')", "exec an import": "exec('import socket')",
    "metaclass": "class M(type):\n    def __call__(cls): return cls.__subclasses__()\nclass "
                 "A(metaclass=M): pass\nA()",
                 "pickle": "import pickle\npickle.loads(b\"cos\\nsystem\\n(S'ls'\\ntR.\")",
    # time
    "endless loop": "while True: pass", "endless generator": "sum(1 for _ in iter(int, 1))",
    "endless comprehension": "[0 for _ in range(10**12) if False]",
    "factorial": "import math\nmath.factorial(10**7)",
    "swallowed limits": "while True:\n    try:\n        while True: "
                        "pass\n    except BaseException: pass",
                        "sort": "class C:\n    def __lt__(self, o):\n        while True: "
                                "pass\nsorted([C(), C()])",
    # memory
    "10 GB string": "'a' * 10**10", "10 GB bytes": "bytes(10**10)", "10 GB list": "[0] * 10**10",
    "growing list": "x = []\nwhile True: x.append('x' * 9999)",
    "doubling": "x = 'x'\nwhile True: x += x",
    "growing dict": "{i: i for i in range(10**9)}", "join": "','.join(['b' * 10**6] * 10**5)",
    "huge int": "9**9**9", "huge shift": "1 << 10**11", "huge format": "f'{1:>10000000000}'",
    "huge percent": "'%1000000000d' % 1",
    "replace": "('a' * 10**6).replace('a', 'b' * 10**6)", "answer of 3 GB": "['a' * 10**6] * 3000",
    "nested answer": "x = 'a' * 1000\n[[x] * 1000] * 1000", "int to text": "str(10**(10**6))",
    "text to int": "int('9' * 10**6)",
    # depth
    "recursion": "def f(): return f()\nf()", "mutual recursion": "def f(): return g()\ndef g(): "
                                                                 "return f()\nf()",
                                                                 "deep source": "(" * 3000,
                                                                 "deep minus": "-" * 7000 + "1",
                                                                 "deep eval": "eval('(' * 10**5)",
    "deep json": "import json\njson.loads('[' * 10**6)",
    "deep list": "x = []\nfor _ in range(10**6): x = [x]\nx",
    # output, text
    "flood of output": "while True: print('x' * 999)",
    "flood of lines": "for i in range(10**9): print(i)", "flood at once": "print('x' * 10**6)",
    "regex bomb": "import re\nre.match('(a|a)*(a|a)*\\\\1$', 'a' * 5000 + 'b')\n1/0",
    "long program": "x = 1\n" * MAX_CODE, "null byte": "\0", "lone surrogate": "'\ud800' + 1",
    "exit": "raise SystemExit", "interrupt": "raise KeyboardInterrupt", "input": "input()",
    "breakpoint": "breakpoint()",
}
BOX = ToolBox([python_tool(seconds=1, memory_mb=32)])


def ask(code): return BOX.run(dict(name="python", arguments=dict(code=code), id="1"))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_or_ended(name):
    began = time.monotonic()
    answer = ask(ATTACKS[name])
    assert {*answer} == {"id", "error"}, answer
    assert len(answer["error"]) < 2000 and "root:" not in answer["error"]
    assert time.monotonic() - began < 20  # a second of its own, its process, and a busy machine


def test_there_are_enough_of_them(): assert len(ATTACKS) >= 30


def test_nothing_was_written_and_nothing_grew():
    ask(ATTACKS["write a file"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("answer of 3 GB", "nested answer", "flood of output"): ask(ATTACKS[name])
    assert not os.path.exists("/tmp/bantam-escape")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_sleeping_costs_no_time():
    began = time.monotonic()
    Sandbox(seconds=1).run("import time\nfor _ in range(10): time.sleep(60)")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("code,out", [("1 + 1", "2\n"), ("print('a')\nprint('b')", "a\nb\n"),
                                      ("x = 3", "(no output)"),
                                      ("import math\nmath.sqrt(16)", "4.0\n"),
                                      ("sorted({3, 1, 2})", "[1, 2, 3]\n"),
                                      ("def f(n): return 1 if n < 2 else n * f(n - "
                                       "1)\nf(20)", "2432902008176640000\n"),
                                      ("'caf\\u00e9'", "'caf\u00e9'\n"),
                                      ("import re\nre.findall('[0-9]+', 'a1b22')",
                                       "['1', '22']\n")])
def test_honest_programs_run(code, out): assert Sandbox().run(code) == out


def test_one_run_leaves_nothing_for_the_next():
    sandbox = Sandbox()
    sandbox.run("x = 1")
    with pytest.raises(BantamError, match="NameError"): sandbox.run("x")


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr("bantam.chat.sandbox.find_spec", lambda name: None)
    with pytest.raises(BantamError, match=r"pip install 'bantam-lm\[tools\]'"): Sandbox()
