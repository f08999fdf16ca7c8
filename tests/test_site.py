"""The built site: every link and picture resolves, and a real browser finds no error and asks no
other machine for anything."""
import functools
import http.server
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SITE = ROOT/"_docs"


class Page(HTMLParser):
    "The links, resources and anchors of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.resources, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("img", "script", "source", "iframe") and a.get("src"):
            self.resources.append(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") in ("stylesheet", "icon", "preload",
                                                                "modulepreload"):
            self.resources.append(a["href"])


@pytest.fixture(scope="session")
def pages():
    if not SITE.exists(): subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, check=True)
    return {p.relative_to(SITE): Page(p.read_text(encoding="utf-8"))
            for p in sorted(SITE.rglob("*.html"))}


def broken(pages, site):
    "Links and resources that lead nowhere, and resources of other machines."
    bad = []
    for name, page in pages.items():
        for url in page.links + page.resources:
            parts = urlsplit(url)
            if parts.scheme in ("http", "https"):
                if url in page.resources: bad.append(f"{name} loads {url} from another machine")
                continue
            if parts.scheme or not (parts.path or parts.fragment): continue
            target = (site/unquote(parts.path).lstrip("/") if parts.path.startswith("/")
                      else site/name.parent/unquote(parts.path)) if parts.path else site/name
            if target.is_dir(): target = target/"index.html"
            if not target.exists(): bad.append(f"{name}: {url} leads nowhere")
            elif parts.fragment and target.suffix == ".html" and url in page.links:
                other = pages[target.resolve().relative_to(site.resolve())]
                if unquote(parts.fragment) not in other.ids:
                    bad.append(f"{name}: {url} has no such anchor")
    return bad


def test_links_and_pictures(pages): assert broken(pages, SITE) == []


def test_links_and_pictures_notices(tmp_path):
    (tmp_path/"b.html").write_text("<p id=here>")
    page = Page('<a href="b.html#here"><a href="b.html#there"><a href="c.html"><img '
                'src="x.png"><script src="https://cdn.example/x.js"></script>')
    pages = {Path("a.html"): page, Path("b.html"): Page("<p id=here>")}
    assert len(broken(pages, tmp_path)) == 4


def test_every_notebook_is_in_the_sidebar():
    listed = re.findall(r"[\w/]+\.ipynb", (ROOT/"_quarto.yml").read_text())
    there = [str(p.relative_to(ROOT/"nbs")) for p in (ROOT/"nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in p.parts]
    assert sorted(listed) == sorted(there)


def test_pages_show_the_taught_source(pages):
    text = (SITE/"3_model/attention.html").read_text(encoding="utf-8")
    assert "eager_attention" in text and "Exercises" in text


@pytest.fixture()
def served():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self):  # browsers ask for an icon on their own
            if self.path != "/favicon.ico": return super().do_GET()
            self.send_response(204)
            self.end_headers()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                             functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_browse(pages, browser, served):
    """Follow the whole sidebar, use the search; no console error, no request that leaves the
    machine."""
    page = browser.new_page(viewport=dict(width=1280, height=900))
    errors, away = [], []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: away.append(r.url) if r.url.startswith("http")
            and not r.url.startswith(served) else None)
    page.on("response", lambda r: errors.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.goto(f"{served}/index.html")
    assert "bantam" in page.title()
    hrefs = page.eval_on_selector_all("#quarto-sidebar a[href], .sidebar a[href], nav a[href]",
                                      "els => els.map(e => e.href)")
    rooms = sorted({h.split("#")[0] for h in hrefs if h.startswith(served)
                    and h.split("#")[0].endswith(".html")})
    assert len(rooms) >= 30, rooms
    for url in rooms:
        page.goto(url)
        assert page.locator("h1").first.inner_text().strip(), url
        page.evaluate("async () => { for (const i of document.images) { if (!i.complete) await new "
                      "Promise(r => { i.onload = i.onerror = r }) } }")
        dead = page.evaluate("() => [...document.images].filter(i => !i.naturalWidth).map(i => "
                             "i.src)")
        assert dead == [], url
    page.goto(f"{served}/index.html")
    page.keyboard.press("/")
    box = page.locator("input[type=search], input[type=text]").first
    box.wait_for(state="visible", timeout=5000)
    box.fill("rotary")
    page.wait_for_function("() => [...document.querySelectorAll('a[href*=rope]')].some(a => "
                           "a.offsetParent !== null)", timeout=10000)
    assert errors == [] and away == []
    page.close()
