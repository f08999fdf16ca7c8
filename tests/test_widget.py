"The chat in a notebook: threads, escaping, and two real front ends in a real browser."
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings, strategies as st
from conftest import FLAGS, until
from widget_talk import CALL, EVIL, STORY, TOK, Scripted

from bantam.chat.calculator import calculator
from bantam.chat.chat import BantamChat
from bantam.chat.parts import NAMES, part_html
from bantam.chat.terminal import harmless
from bantam.chat.widget import OPEN, ChatCell, chat_cell, close_all, opened
from bantam.core import BantamError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def nothing_stays_open():
    yield
    close_all()
    assert OPEN == [] and not [t for t in threading.enumerate() if t.name == "bantam chat"]


def talk(*answers, tools=(), context=512, pace=0, **options):
    return BantamChat(Scripted(*answers, context=context, pace=pace), TOK, tools=tools, **options)


def ask(cell, text):
    cell.entry.value = text
    cell.send_button.click()
    assert cell.worker.wait(20)


def kinds(cell): return [p.kind for p in cell.parts]


# --- what is shown is text ------------------------------------------------------------------------

class Tags(HTMLParser):
    "What a browser would see."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data): self.text += data


FRAME = {k: ["div", "details", "summary"] if k in ("call", "result", "trace") else ["div"]
         for k in NAMES}
anything = st.text(st.characters(codec=None), max_size=40) | st.sampled_from(
    [EVIL, "</div></details>", '" onclick="x', "&lt;script&gt;", "<!--", "]]>"])
as_call = anything.map(lambda s: json.dumps(dict(name=s, arguments={s: s}, id=s)))
as_result = anything.map(lambda s: json.dumps(dict(id=s, content=s)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(NAMES)), anything | as_call | as_result)
def test_no_text_makes_a_tag_or_an_attribute(kind, text):
    seen = Tags(part_html(kind, text))
    assert seen.tags == FRAME[kind]
    assert ({k for k, _ in seen.attributes} == {"class", "role", "aria-label"}
            and [v for k, v in seen.attributes if k == "aria-label"] == [NAMES[kind]])
    assert seen.text.endswith(harmless(text))  # nothing of it is lost


def test_nothing_that_is_said_is_html():
    "User, thought, call, result, answer, error, note and status, in a whole talk."
    def page(): "Attacks."; return EVIL
    def fails(): raise RuntimeError(EVIL)
    named = ["TOOL_CALL_START", json.dumps(dict(name="page", arguments={}, id=EVIL)),
             "TOOL_CALL_END", "AGENT_END"]
    cell = chat_cell(talk(["THINK_START", EVIL, "THINK_END", EVIL, *named], [EVIL, "AGENT_END"],
                          [EVIL, fails], tools=[page], context=4096, system=EVIL,
                          show_thinking=True))
    ask(cell, EVIL)
    ask(cell, EVIL)
    cell.tell(EVIL)
    assert kinds(cell) == ["user", "think", "text", "call", "result", "text", "user", "text",
                           "error", "trace"]
    for view in (*cell.log.children, cell.status):
        assert (not re.search(r"<(script|img|b)\b", view.value) and "\x1b" not in view.value
                and ("&lt;script" in view.value))


# --- threads --------------------------------------------------------------------------------------

def test_a_handler_returns_while_the_model_speaks():
    go, here = threading.Event(), []
    cell = chat_cell(talk([lambda: here.append(threading.current_thread()), lambda: go.wait(20),
                           "Done.", "AGENT_END"]))
    cell.entry.value = "Go"
    cell.send_button.click()
    assert cell.worker.busy and not cell.stop_button.disabled and cell.send_button.disabled
    go.set()
    assert (cell.worker.wait(20) and here != [threading.current_thread()]
            and cell.parts[-1].text == "Done.")


def test_stop_ends_a_running_answer_at_the_next_token():
    cell = chat_cell(talk(STORY, ["Here.", "AGENT_END"], pace=.002))
    cell.send("Tell me a story")
    model = cell.chat.model.model
    until(lambda: model.said > 20)
    cell.stop_button.click()
    said = model.said
    assert (cell.worker.wait(20) and model.said <= said + 2
            and kinds(cell) == ["user", "text", "note"])
    assert cell.chat.history[1]["content"] == cell.parts[1].text and not cell.chat.finished
    ask(cell, "And now?")
    assert cell.parts[-1].text == "Here." and cell.chat.finished


def test_stop_ends_a_model_that_says_nothing_and_a_tool_when_it_returns():
    cell = chat_cell(talk(["PAD"]*30 + [lambda: cell.stop_button.click()] + ["PAD"]*10_000))
    ask(cell, "Hello?")
    assert cell.chat.model.said < 35 and cell.entry.value == "Hello?" and cell.chat.history == []
    def slow(): "Takes its time."; cell.stop_button.click(); return "done"
    named = ["TOOL_CALL_START", '{"name": "slow", "arguments": {}, "id": "1"}', "TOOL_CALL_END"]
    cell = chat_cell(talk([*named, *CALL], ["Never.", "AGENT_END"], tools=[slow, calculator]))
    ask(cell, "Go")
    assert kinds(cell) == ["user", "call", "call", "result", "note"]
    assert ([m.get("error", m.get("content")) for m in cell.chat.history[2:]]
            == ["done", "stopped by the user"])


def test_a_second_message_is_refused_and_kept():
    go = threading.Event()
    cell = chat_cell(talk([lambda: go.wait(20), "One.", "AGENT_END"], ["Two.", "AGENT_END"]))
    cell.send("first")
    for _ in range(3): cell.entry.value = "second"; cell.send_button.click()
    assert "Still answering" in cell.status.value and cell.entry.value == "second"
    go.set()
    assert cell.worker.wait(20) and kinds(cell) == ["user", "text"]
    cell.send_button.click()
    assert cell.worker.wait(20) and cell.chat.history[-1]["content"] == "Two."


def test_many_clicks_at_once_start_one_answer():
    chat = talk(*[["Yes.", "AGENT_END"]]*9, pace=.01)
    cell = chat_cell(chat)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cell.send(f"message {n}"), range(8)))
    assert cell.worker.wait(20) and chat.turns == 1 and kinds(cell) == ["user", "text"]


def test_updates_are_few():
    """300 tokens in less than a second are some twenty messages, not hundreds; the last one is
    complete."""
    cell = chat_cell(talk(["tick "]*150 + ["AGENT_END"], pace=.001))
    seen = []
    add = cell.add
    cell.add = lambda kind, text: (
        add(kind, text), cell.parts[-1].view.observe(lambda c: seen.append(c["new"]), "value"))
    began = time.monotonic()
    ask(cell, "Count")
    assert len(seen) <= 5 + 20*(time.monotonic() - began) and cell.chat.model.said > 150
    assert "tick " * 150 in seen[-1]


def test_closing_and_running_again_end_the_worker():
    chat = talk(STORY, ["Here.", "AGENT_END"], pace=.005)
    first = opened(ChatCell(chat), ("a cell", "run 1"))
    first.send("A story")
    until(lambda: len(first.parts) > 1)
    second = opened(ChatCell(chat), ("a cell", "run 2"))
    second.send("Are you there?")
    assert first.worker.wait(20) and first.closed and second.worker.wait(20)
    assert ([m["content"] for m in chat.history][-2:] == ["Are you there?", "Here."]
            and isinstance(chat.model, Scripted))
    first.send("Not any more")
    assert not first.worker.busy and len(chat.history) == 4


def test_reset_in_the_middle_forgets_all():
    cell = chat_cell(talk(STORY, ["Here.", "AGENT_END"], pace=.005, system="Be kind."))
    cell.send("A story")
    until(lambda: len(cell.parts) > 1)
    cell.reset_button.click()
    assert cell.worker.wait(20)
    until(lambda: not cell.parts)
    assert (cell.chat.history == [dict(role="system", content="Be kind.")]
            and cell.log.children == ())


# --- what is told ---------------------------------------------------------------------------------

def test_every_failure_is_a_line():
    def quits(): raise SystemExit(3)
    cell = chat_cell(talk(["Well", quits], ["Fine.", "AGENT_END"], context=64))
    ask(cell, "much too long " * 99)
    assert ("shorten it" in cell.parts[-1].text and cell.entry.value.startswith("much")
            and isinstance(cell.error, BantamError))
    ask(cell, "Hi")
    assert (cell.parts[-2].text == "SystemExit: 3" and "quits" in cell.parts[-1].text
            and kinds(cell)[-1] == "trace")
    ask(cell, "Hi")
    assert cell.parts[-1].text == "Fine." and cell.error is None


def test_settings_reach_the_model_and_what_is_dropped_is_said():
    gone = []
    cell = chat_cell(talk(*[["Yes.", "AGENT_END"]]*12, context=64, on_drop=gone.extend))
    cell.temperature.value, cell.top_p.value, cell.max_new_tokens.value = .25, .5, 7
    for n in range(12): ask(cell, f"Is it message {n}?")
    assert ({(a.temperature, a.top_p, a.max_new_tokens) for a in cell.chat.model.asked}
            == {(.25, .5, 7)})
    assert cell.chat.generation.temperature == .7  # the chat's own settings are not touched
    told = [int(re.search(r"oldest (\d+) messages", p.text)[1])
            for p in cell.parts if p.kind == "note"]
    assert sum(told) == len(cell.chat.dropped) == len(gone) > 8
    pale = {p.turn for p in cell.parts if "bantam-forgotten" in p.view._dom_classes}
    assert pale == set(range(1, len(gone)//2 + 1)) and f"{len(gone)} older" in cell.status.value


def test_a_folder_is_a_cell(tmp_path):
    from bantam.model.lm import BantamForCausalLM
    import bantam.model.files  # noqa: F401  (adds save_pretrained)
    BantamForCausalLM(Scripted().config).save_pretrained(tmp_path)
    TOK.save(tmp_path)
    cell = chat_cell(tmp_path, device="cpu", seed=0, system="Be brief.")
    cell.max_new_tokens.value = 3
    ask(cell, "Hi")
    assert (cell.error is None and cell.chat.history[0]["content"] == cell.system.value
            == "Be brief.")
    with pytest.raises(BantamError): chat_cell(tmp_path/"nowhere")


# --- a kernel -------------------------------------------------------------------------------------

def notebook(*cells):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata.kernelspec = dict(name="python3", display_name="Python 3", language="python")
    return nb


@pytest.fixture()
def environment(tmp_path, monkeypatch):
    "Jupyter's own files go to the test's folder; the kernel finds `widget_talk`."
    env = {f"JUPYTER_{n}_DIR": str(tmp_path/n.lower()) for n in ("CONFIG", "DATA", "RUNTIME")}
    env |= ({f"JUPYTERLAB_{n}_DIR": str(tmp_path/n.lower()) for n in ("SETTINGS", "WORKSPACES")}
            | dict(PYTHONPATH=f"{HERE}{os.pathsep}{HERE.parent}",
                   IPYTHONDIR=str(tmp_path/"ipython")))
    for k, v in env.items(): monkeypatch.setenv(k, v)
    return env


def test_it_runs_in_a_kernel_without_a_browser(environment):
    "As nbconvert does it: the worker's updates reach the state that is saved with the notebook."
    import nbclient
    nb = notebook("from widget_talk import cell\nshown = cell()\nshown",
                  "shown.entry.value = 'What is 6 times "
                  "7?'\nshown.send_button.click()\nshown.worker.wait(60)")
    nbclient.NotebookClient(nb, timeout=120, kernel_name="python3").execute()
    assert nb.cells[1].outputs[0].data["text/plain"] == "True"
    assert "application/vnd.jupyter.widget-view+json" in nb.cells[0].outputs[0].data
    state = nb.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    values = " ".join(str(s["state"].get("value", "")) for s in state)
    assert "It is 42, &lt;b&gt;not&lt;/b&gt; 43." in values and "<script" not in values


# --- browsers -------------------------------------------------------------------------------------

@contextlib.contextmanager
def served(command, env, folder):
    "A server on a free port; its log is shown when it does not come up."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(folder/"server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}",
                                   "--no-browser"], env=os.environ | env, cwd=folder,
                                  stdout=log, stderr=log)
    def up():
        if server.poll() is not None:
            raise AssertionError((folder/"server.log").read_text()[-2000:])
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
    try:
        until(up, 60)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def browse(path, site, visit):
    """Call `visit(page)` in a thread of its own, since another test may hold a browser in this one;
    what would leave the machine is noted and stopped."""
    def run():
        from playwright.sync_api import sync_playwright
        away, errors = [], []
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=path, headless=True, args=FLAGS)
            page = browser.new_page(viewport=dict(width=1000, height=820))
            page.set_default_timeout(60_000)
            page.route(lambda url: url.startswith("http") and not url.startswith(site),
                       lambda route: (away.append(route.request.url), route.abort()))
            page.on("pageerror", lambda e: errors.append(str(e)))
            try: visit(page)
            except Exception as e:
                raise AssertionError(
                    f"{e}\nThe page said:\n{page.locator('body').inner_text()[-2000:]}") from e
            browser.close()
        return away, errors
    with ThreadPoolExecutor(1) as pool: return pool.submit(run).result()


def says(page, text):
    page.wait_for_function("t => document.querySelector('.bantam-log').innerText.includes(t)",
                           arg=text)


def rests(page):
    page.wait_for_function("() => document.querySelector('.bantam-status').innerText.includes('the "
                           "model sees')")


def converse(page):
    "Type, read, stop in the middle, go on; all by what a user sees."
    box, button = (page.get_by_role("textbox", name="Message"),
                   lambda name: page.get_by_role("button", name=name, exact=True))
    box.click()
    page.keyboard.type("What is 6 times 7?")
    page.keyboard.press("Enter")
    says(page, "<script>document.title = 'stolen'</script>")  # as text
    rests(page)
    assert (box.input_value() == "" and "stolen" not in page.title()
            and "A product" not in page.locator(".bantam-log").inner_text())
    assert page.locator(".bantam-log script, .bantam-log img, .bantam-log b").count() == 0
    box.fill("Tell me a story")
    button("Send").click()
    says(page, "another sentence")
    page.locator("summary").first.click()
    early = page.locator(".bantam-text").last.inner_text()
    # it streams
    page.wait_for_function(
        "n => [...document.querySelectorAll('.bantam-text')].at(-1).innerText.length > n",
        arg=len(early))
    assert page.locator("details[open]").count() == 1  # what was opened stays open while it streams
    page.keyboard.press("Tab")
    box.fill("Too early")
    box.press("Enter")
    page.wait_for_function("() => document.querySelector('.bantam-chat').innerText.includes('Still "
                           "answering')")
    button("Stop").click()
    says(page, "stopped")
    rests(page)
    assert (page.locator(".bantam-text").last.inner_text().count("sentence") < 400
            and button("Stop").is_disabled())
    below = page.locator(".bantam-log").evaluate("e => Math.abs(e.scrollTop)")
    assert below < 2  # the end is in sight


def go_on(page):
    "The second turn, with the message that was refused still in its box."
    box = page.get_by_role("textbox", name="Message")
    assert box.input_value() == "Too early"
    box.fill("Are you there?")
    box.press("Enter")
    says(page, "Yes, I am here.")
    rests(page)
    page.get_by_text("Settings").last.click()
    page.get_by_label("Show thoughts").check()
    says(page, "A product; a tool knows.")
    assert (page.get_by_label("Temperature").input_value() == "0.7"
            and page.get_by_label("System prompt").input_value() == "Be kind.")


def test_in_jupyterlab(chromium, environment, tmp_path):
    "Type, stream, stop, second turn; a cell that is run again stops its answer; a picture."
    (tmp_path/"config"/"labconfig").mkdir(parents=True)
    (tmp_path/"config/labconfig/page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    (tmp_path/"nb").mkdir()
    nbformat.write(notebook("from widget_talk import cell\nshown = cell()\nshown"),
                   tmp_path/"nb/talk.ipynb")
    picture = Path(os.environ.get("BANTAM_PICTURES", tmp_path))/"chat_cell.png"
    def visit(page):
        page.goto(f"{site}/lab/tree/talk.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
        def run():
            page.locator(".jp-Notebook .cm-content").first.click()
            page.keyboard.press("Control+Enter")
        started = lambda: page.locator(".jp-InputPrompt").first.inner_text().strip() not in (
            "", "[ ]:")
        for _ in range(20):  # a notebook that has just been opened may not listen yet
            run()
            page.wait_for_timeout(1000)
            if started(): break
        page.get_by_role("textbox", name="Message").wait_for()
        converse(page)
        page.locator(".bantam-chat").screenshot(path=picture)
        go_on(page)
        page.get_by_role("textbox", name="Message").fill("Another story")
        page.get_by_role("button", name="Send", exact=True).click()
        says(page, "Another story")
        run()  # while it answers
        page.wait_for_function("() => document.querySelector('.bantam-log') && "
                               "!document.querySelector('.bantam-log').innerText.includes('story')")
        page.locator(".jp-Notebook .cm-content").first.click()
        page.keyboard.press("Control+A")
        page.keyboard.type("import threading; sum(t.name == 'bantam chat' for t in "
                           "threading.enumerate())")
        page.keyboard.press("Control+Enter")
        page.wait_for_selector(".jp-OutputArea-output:not(:has(.bantam-chat)) pre")
        assert page.locator(".jp-OutputArea-output pre").last.inner_text().strip() == "0"
    command = ["jupyter", "lab", "--ip=127.0.0.1", "--allow-root", "--IdentityProvider.token=",
               "--ServerApp.password=", f"--ServerApp.root_dir={tmp_path/'nb'}",
               "--LabApp.extension_manager=readonly", "--LabApp.news_url=None"]
    with served(command, environment, tmp_path) as site:
        away, errors = browse(chromium, site, visit)
    assert away == [] and errors == []
    assert picture.stat().st_size > 10_000


def test_in_voila(chromium, environment, tmp_path):
    "The same talk on a page without a notebook."
    pytest.importorskip("voila")
    nbformat.write(notebook("from widget_talk import cell\nshown = cell()\nshown"),
                   tmp_path/"talk.ipynb")
    def visit(page):
        page.goto(f"{site}/", wait_until="commit")
        page.get_by_role("textbox", name="Message").wait_for()
        converse(page)
        go_on(page)
    with served(["voila", "talk.ipynb", "--Voila.ip=127.0.0.1"], environment, tmp_path) as site:
        away, errors = browse(chromium, site, visit)
    # Voila's own page asks for its icons; the cell works without
    assert errors == [] and all("/fontawesome-free@" in url for url in away)
