"""The server: OpenAI's own client, strangers' requests, a crowd, readers who leave, and its page in
a real browser."""
import asyncio
import contextlib
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings, strategies as st

from bantam import BantamConfig
from bantam.chat.answers import Served
from bantam.chat.batcher import Batch, Row
from bantam.chat.engine import Engine
from bantam.chat.server import listen, make_app
from bantam.decode.args import GenerationArgs
from bantam.decode.steps import Ends
from bantam.model.lm import BantamForCausalLM
from bantam.text.template import ChatTemplate
from bantam.text.tokenizer import BantamTokenizer
from conftest import until

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
TOK = BantamTokenizer.default()
torch.manual_seed(0)
SHAPE = dict(vocab_size=TOK.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
             num_attention_heads=2, num_key_value_heads=2, initializer_range=.5)
MODEL = BantamForCausalLM(BantamConfig(**SHAPE, max_position_embeddings=1024)).eval()
SERVED = Served("small", MODEL, TOK, ChatTemplate.named("bantam"),
                GenerationArgs(max_new_tokens=12, repetition_penalty=1., no_repeat_ngram_size=0))
HELLO = dict(model="small", messages=[dict(role="user", content="Hi")])
WEATHER = dict(type="function", function=dict(name="weather", description="Of a town.",
                                              parameters=dict(type="object", properties=dict(
                                                  town=dict(type="string")), required=["town"])))


# never says what ends an answer
ENDLESS = BantamForCausalLM(BantamConfig(**SHAPE, max_position_embeddings=1024)).eval()
ENDLESS.head = lambda h: BantamForCausalLM.head(ENDLESS, h).index_fill(
    -1, torch.tensor(SERVED.template.stop_ids(TOK)), -torch.inf)


def scripted(*parts):
    "A model that says the same whatever it is asked: texts, and names of control tokens."
    ids = [i for p in parts for i in ([TOK.id_of(f"<|{p}|>")] if re.fullmatch(r"[A-Z_]+", p)
                                      else TOK.encode(p))] + [TOK.id_of("<|AGENT_END|>")]
    model = BantamForCausalLM(BantamConfig(**SHAPE, max_position_embeddings=1024)).eval()
    start, states = {}, model.hidden_states
    def hidden_states(input_ids, attention_mask=None, cache=None, **how):
        h = states(input_ids, attention_mask=attention_mask, cache=cache, **how)
        # tokens of each row that were read
        model.at = cache.length if attention_mask is None else attention_mask.sum(1)
        return h
    def head(h):
        z = torch.zeros(len(h), TOK.vocab_size)
        at = torch.as_tensor(model.at).expand(len(h))
        for b in range(len(h)):
            z[b, ids[min(int(at[b]) - start.setdefault("n", int(at[b])), len(ids) - 1)]] = 1e4
        return z
    model.hidden_states, model.head, model.start = hidden_states, head, start
    return model


@contextlib.contextmanager
def running(model=MODEL, token=None, step=0., **how):
    "A real server in a thread, with uvicorn and a socket; `step` slows the model down, in seconds."
    import uvicorn
    served, engine = (Served("small", model, TOK, SERVED.template, SERVED.generation),
                      Engine(model, **how))
    one = engine.batch.step
    if step: engine.batch.step = lambda: (time.sleep(step), one())[1]
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(served, engine, token=token),
                                           log_level="warning", access_log=False, lifespan="off",
                                           timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]), daemon=True)
    thread.start()
    while not server.started: time.sleep(.005)
    engine.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try: yield engine
    finally:
        engine.close()
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def small():
    with running(seats=4, queue=16) as engine: yield engine


def client(engine, **how):
    return openai.OpenAI(base_url=engine.url + "/v1", api_key=how.pop("api_key", "none"),
                         max_retries=0, timeout=30, **how)


# --- OpenAI's client ------------------------------------------------------------------------------

def test_models(small):
    c = client(small)
    assert ([m.id for m in c.models.list()] == ["small"]
            and c.models.retrieve("small").owned_by == "bantam")
    with pytest.raises(openai.NotFoundError): c.models.retrieve("large")


def test_chat_whole_and_streamed(small):
    c = client(small)
    ask = dict(model="small", messages=[dict(role="system", content="Be kind."),
                                        dict(role="user", content="Hi")], seed=3, max_tokens=10,
               temperature=1)
    whole = c.chat.completions.create(**ask)
    assert (whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 10
            and whole.id.startswith("chatcmpl-"))
    chunks = list(c.chat.completions.create(**ask, stream=True,
                                            stream_options=dict(include_usage=True)))
    assert ("".join(k.choices[0].delta.content or "" for k in chunks if k.choices)
            == whole.choices[0].message.content)
    assert (chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
            and not chunks[-1].choices)
    assert [k.choices[0].finish_reason for k in chunks if k.choices][-1] == "length"
    assert c.chat.completions.create(**ask).choices == whole.choices
    assert c.chat.completions.create(**ask | dict(seed=4)).choices != whole.choices


def test_completions(small):
    c = client(small)
    whole = c.completions.create(model="small", prompt=["Once", "Twice upon"], n=2, seed=1,
                                 max_tokens=8, temperature=0)
    assert ([x.index for x in whole.choices] == [0, 1, 2, 3]
            and whole.choices[0].text == whole.choices[1].text != whole.choices[2].text)
    assert whole.usage.prompt_tokens == sum(len(TOK.encode(p, add_bos=True))
                                            for p in ("Once", "Twice upon"))
    streamed = list(c.completions.create(model="small", prompt="Once", seed=1, max_tokens=8,
                                         temperature=0, stream=True, echo=True))
    assert "".join(k.choices[0].text for k in streamed) == "Once" + whole.choices[0].text
    text = whole.choices[0].text
    stopped = c.completions.create(model="small", prompt="Once", max_tokens=8, temperature=0,
                                   stop=[text[4:8]])
    assert ((stopped.choices[0].text, stopped.choices[0].finish_reason)
            == (text[:text.index(text[4:8])], "stop"))


def test_same_as_generate(small):
    "What the server says is what `model.generate` says, with the extra rules as extra fields."
    ids = torch.tensor([TOK.encode("Once", add_bos=True)])
    for how in (dict(temperature=0, top_p=1., repetition_penalty=1., no_repeat_ngram_size=0),
                dict(temperature=1.2, top_p=.8, top_k=50, min_p=.01, repetition_penalty=1.3,
                     no_repeat_ngram_size=2)):
        ours = MODEL.generate(ids, max_new_tokens=9, seed=5, **how)[0, ids.shape[1]:].tolist()
        plain = {k: v for k, v in how.items() if k in ("temperature", "top_p")}
        said = client(small).completions.create(model="small", prompt="Once", max_tokens=9, seed=5,
                                                **plain, extra_body={
                                                    k: v for k, v in how.items() if k not in plain})
        assert said.choices[0].text == TOK.decode(ours, skip_special=True)


def test_tools_are_called_and_answered():
    call = '{"name": "weather", "arguments": {"town": "Ulm"}, "id": "c1"}'
    with running(scripted("THINK_START", "where?", "THINK_END", "Let me look.", "TOOL_CALL_START",
                          call, "TOOL_CALL_END"), seats=2) as engine:
        c, ask = client(engine), dict(model="small", messages=[dict(role="user", content="Ulm?")],
                                      tools=[WEATHER], tool_choice="auto", max_tokens=200,
                                      temperature=0)
        choice = c.chat.completions.create(**ask).choices[0]
        made = choice.message.tool_calls[0]
        assert (choice.finish_reason, made.id, made.function.name,
                json.loads(made.function.arguments)) == ("tool_calls", "c1", "weather",
                                                         dict(town="Ulm"))
        assert (choice.message.content == "Let me look."
                and choice.message.reasoning_content == "where?")
        engine.batch.model.start.clear()
        chunks = list(c.chat.completions.create(**ask, stream=True))
        deltas = [t for k in chunks for t in k.choices[0].delta.tool_calls or []]
        assert ([(t.index, t.id, t.function.arguments) for t in deltas]
                == [(0, "c1", made.function.arguments)]
                and chunks[-1].choices[0].finish_reason == "tool_calls")
        engine.batch.model.start.clear()
        back = ask["messages"] + [choice.message,
                                  dict(role="tool", tool_call_id="c1", content="rain")]
        # the client's own object goes back in
        assert c.chat.completions.create(**ask | dict(messages=back)).choices
        engine.batch.model.start.clear()
        # nothing was offered: text
        assert call in c.chat.completions.create(
            **{k: v for k, v in ask.items() if "tool" not in k}).choices[0].message.content


def test_answers_of_a_form(small):
    pytest.importorskip("llguidance")
    schema = dict(type="object", properties=dict(legs=dict(type="integer", minimum=0, maximum=9),
                                                 name=dict(enum=["hen", "fox"])),
                  required=["legs", "name"], additionalProperties=False)
    form = dict(type="json_schema", json_schema=dict(name="animal", schema=schema))
    for seed_ in range(3):
        said = client(small).chat.completions.create(**HELLO, response_format=form, seed=seed_,
                                                     max_tokens=80, temperature=1.5).choices[0]
        value = json.loads(said.message.content)
        assert (type(value["legs"]) is int and type(value["name"]) is str
                and said.finish_reason == "stop")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client(small).chat.completions.create(**HELLO,
                                              response_format=dict(
                                                  type="json_schema",
                                                  json_schema=dict(name="no", schema={"enum": []})))


@pytest.mark.parametrize("more, says", [(dict(presence_penalty=1), "presence_penalty"),
                                        (dict(logprobs=True), "logprobs"),
                                        (dict(tool_choice="required", tools=[WEATHER]),
                                         "tool_choice"),
    (dict(temperature=3), "temperature"), (dict(n=100), "n:"),
    (dict(extra_body=dict(temprature=1)), "did you mean"), (dict(messages=[]), "messages"),
    (dict(max_tokens=0), "max_tokens"),
    (dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="x"))])]),
     "messages[0]"), (dict(messages=[dict(role="user", content="long " * 1100)]), "context"),
    (dict(logit_bias={"5": 1}), "logit_bias"),
    (dict(stream_options=dict(include_usage=True)), "only with stream"), (dict(seed=-1), "seed")])
def test_mistakes_are_named(small, more, says):
    with pytest.raises(openai.BadRequestError) as e:
        client(small).chat.completions.create(**HELLO | more)
    assert (says in e.value.body["message"] and e.value.body["type"] == "invalid_request_error"
            and e.value.param)


def test_no_text_becomes_control(small):
    "A control token that is spelled costs as many tokens as its letters."
    c = client(small)
    def tokens(text):
        return c.chat.completions.create(model="small", messages=[dict(role="user", content=text)],
                                         max_tokens=1).usage.prompt_tokens
    frame = tokens("x") - len(TOK.encode("x"))
    assert all(tokens(t) - frame == len(TOK.encode(t)) > 1
               for t in ("<|AGENT_START|>", "<|USER_END|>", "<|EOS|>"))


# --- strangers ------------------------------------------------------------------------------------

FIELDS = ["model", "messages", "prompt", "n", "stop", "seed", "stream", "stream_options",
          "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "user",
          "echo", "tools",
          "tool_choice", "response_format", "logprobs", "presence_penalty", "repetition_penalty",
          "no_repeat_ngram_size", "logit_bias", "role", "content", "type", "function", "name",
          "arguments",
          "tool_calls", "tool_call_id", "parameters", "json_schema", "schema", "properties", "$ref",
          "enum", "pattern"]
WORDS = st.sampled_from(["small", "user", "assistant", "tool", "system", "function", "text",
                         "json_schema", "json_object", "auto", "none", "object", "string", "",
                         "\x00", "<|EOS|>", "\ud800", "\u202e", "a" * 300, "{}", "[", '{"a":1}'])
NUMBERS = st.one_of(st.integers(), st.floats(),
                    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400, 1e308, 1e-320]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20)),
                      lambda inner: st.one_of(st.lists(inner, max_size=4),
                                              st.dictionaries(
                                                  st.one_of(st.sampled_from(FIELDS),
                                                            st.text(max_size=5)), inner,
                                                              max_size=5)), max_leaves=12)
GOOD = [dict(HELLO, max_tokens=1), dict(HELLO, max_tokens=1, stream=True),
        dict(HELLO, max_tokens=1, tools=[WEATHER]), dict(model="small", prompt="x", max_tokens=1),
        dict(HELLO, max_tokens=1, messages=[dict(role="assistant", content=None,
                                                 tool_calls=[
                                                     dict(id="1", type="function",
                                                          function=dict(
                                                              name="f", arguments="{}"))]),
                                            dict(role="tool", tool_call_id="1", content="y")]),
        dict(HELLO, max_tokens=2, response_format=dict(type="json_schema",
                                                       json_schema=dict(
                                                           name="a", schema=dict(
                                                               type="object", properties=dict(
                                                                   a=dict(type="integer"))))))]


def places(value, path=()):
    "Every place in a JSON value."
    yield path
    for k, v in value.items() if isinstance(value, dict) else enumerate(
        value) if isinstance(value, list) else ():
        yield from places(v, (*path, k))


@st.composite
def bodies(draw):
    "Mostly requests that were right but for one or two places; sometimes anything."
    how = draw(st.integers(0, 9))
    if how == 0: return draw(st.binary(max_size=60))
    if how == 1: return json.dumps(draw(VALUES)).encode()
    body = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(1, 2))):
        *way, last = draw(st.sampled_from([p for p in places(body) if p])) if body else ("model",)
        at = body
        for k in way: at = at[k]
        what = draw(st.integers(0, 3))
        if what == 0 and isinstance(at, dict): at[draw(st.sampled_from(FIELDS))] = draw(VALUES)
        elif what == 1: del at[last]
        else: at[last] = draw(VALUES)
        if not body: break
    text = json.dumps(body)
    if how == 2: text = text[:draw(st.integers(0, len(text)))]
    return text.encode()


def test_a_thousand_malformed_requests_without_a_500():
    """The application is asked directly; an exception inside would come out here, and no answer may
    be a server's error."""
    # a request for 2**31 tokens gets 90
    model = BantamForCausalLM(BantamConfig(**SHAPE, max_position_embeddings=96)).eval()
    engine = Engine(model, seats=8, queue=64, run_seconds=20)
    app, seen = (make_app(Served("small", model, TOK, SERVED.template, SERVED.generation), engine),
                 {})
    loop = asyncio.new_event_loop()
    async def ask(path, body, headers):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app),
                                     base_url="http://localhost") as c:
            return await c.post(path, content=body, headers=headers)

    @seed(1)
    @settings(max_examples=1000, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(bodies(), st.sampled_from(["/v1/chat/completions"] * 4 + ["/v1/completions"] * 2),
           st.sampled_from(["application/json"] * 12 + ["text/plain", "",
                                                        "application/json; charset=utf-16",
                                                        "application/json;charset=UTF-8"]))
    def strange(body, path, kind):
        r = loop.run_until_complete(ask(path, body, {"content-type": kind}))
        seen[r.status_code] = seen.get(r.status_code, 0) + 1
        assert r.status_code in (200, 400, 404, 415), (r.status_code, r.text, body)
        if r.status_code != 200:
            assert (set(r.json()["error"]) == {"message", "type", "param", "code"}
                    and len(r.json()["error"]["message"]) < 1000), body
        elif "event-stream" not in r.headers["content-type"]: assert r.json()["choices"]

    try: strange()
    finally: engine.close(); loop.close()
    assert sum(seen.values()) >= 1000 and seen[400] > 500 and seen.get(200, 0) > 20, seen
    assert engine.health()["failed"] <= seen[400] and engine.health()["running"] == 0


def raw(engine, text):
    "Bytes to the socket, bytes back."
    host, port = engine.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall(text)
        s.settimeout(5)
        out = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while more := s.recv(65536): out += more
        return out


def test_bytes_that_are_no_http(small):
    for text in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\nConnection: close\r\n\r\n",
                 b"GET /v1/models HTTP/1.0\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                 b"application/json\r\nContent-Length: 9999999\r\nConnection: close\r\n\r\n",
                 b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                 b"application/json\r\nContent-Length: -1\r\nConnection: close\r\n\r\n"):
        assert re.match(rb"HTTP/1.1 4\d\d ", raw(small, text)), text
    chunk = b"186A0\r\n" + b" " * 100_000 + b"\r\n"
    head = (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n")
    text = head + chunk*11 + b"0\r\n\r\n"
    # no length was promised, and it is counted all the same
    assert raw(small, text).startswith(b"HTTP/1.1 413 ")


def test_statuses(small):
    def status(method, path, body=None, **headers):
        return httpx.request(method, small.url + path, content=body,
                             headers={"content-type": "application/json"} | headers).status_code
    assert (status("GET", "/v1/chat/completions") == status("PUT", "/v1/completions")
            == status("POST", "/") == status("OPTIONS", "/v1/models") == 405)
    assert status("GET", "/v1/none") == status("GET", "/page.css/") == status(
        "GET", "/../etc/passwd") == 404
    assert status("POST", "/v1/completions", b"{}",
                  **{"content-type": "application/x-www-form-urlencoded"}) == 415
    assert status("POST", "/v1/completions", b"[" * 500_000) == status(
        "POST", "/v1/completions", b"nope") == 400
    assert status("POST", "/v1/completions", b" " * 1_000_001) == 413
    assert status("GET", "/health") == 200


# --- who may speak --------------------------------------------------------------------------------

HERE = dict(host="127.0.0.1:80")
DOORS = [({}, 200), (dict(host="localhost"), 200), (dict(host="[::1]:9"), 200),
         (dict(host="evil.example"), 403), (dict(host="evil.example:8000"), 403),
         (dict(host="127.0.0.1.evil.example"), 403),
         (dict(host="localhost.evil.example"), 403), (dict(host="10.0.0.7"), 403),
         (dict(host="LOCALHOST"), 200), (HERE | dict(origin="http://127.0.0.1:80"), 200),
         (HERE | dict(origin="http://127.0.0.1:81"), 403),
         (HERE | dict(origin="https://evil.example"), 403), (HERE | dict(origin="null"), 403),
         (HERE | dict(origin="http://127.0.0.1:80.evil.example"), 403),
         ({"sec-fetch-site": "cross-site"}, 403), ({"sec-fetch-site": "same-site"}, 403),
         ({"sec-fetch-site": "same-origin"}, 200)]


@pytest.mark.parametrize("headers, status", DOORS, ids=[",".join(f"{k}={v}" for k, v in h.items())
                                                        or "plain" for h, _ in DOORS])
def test_hosts_and_origins(small, headers, status):
    r = httpx.get(small.url + "/v1/models", headers=headers)
    assert r.status_code == status and not any(h.startswith("access-control") for h in r.headers)
    assert ("frame-ancestors 'none'" in r.headers["content-security-policy"]
            and r.headers["x-content-type-options"] == "nosniff")


def test_a_token():
    with running(token="open-sesame") as engine:
        assert [m.id for m in client(engine, api_key="open-sesame").models.list()] == ["small"]
        with pytest.raises(openai.AuthenticationError):
            client(engine, api_key="open-sesam").models.list()
        for value in ("open-sesame", "Basic open-sesame", "Bearer", "Bearer open-sesame x",
                      "Bearer \u00e9".encode()):
            r = httpx.post(engine.url + "/v1/chat/completions", json=HELLO,
                           headers={"authorization": value})
            assert r.status_code == 401 and r.headers["www-authenticate"] == "Bearer", value
        assert httpx.get(engine.url + "/").status_code == httpx.get(
            engine.url + "/health").status_code == 200


# --- a crowd --------------------------------------------------------------------------------------

def test_batched_is_alone():
    "40 rows of all sorts join and leave at random steps, and say what they say alone."
    r, rows, waiting = random.Random(0), [], []
    sorts = [dict(temperature=0.), dict(temperature=0., repetition_penalty=1.,
                                        no_repeat_ngram_size=0), {},
             dict(temperature=1.5, top_p=1., min_p=.02),
             dict(temperature=1., top_k=9, no_repeat_ngram_size=2)]
    for i in range(40):
        ids = [r.randrange(80, TOK.vocab_size) for _ in range(r.choice([1, 3, 20, 90]))]
        rows.append(Row(ids, GenerationArgs(max_new_tokens=r.randint(1, 30), **sorts[i % 5]),
                        Ends({TOK.eos_id}, ("e",), TOK).watch(), seed=i))
    batch, waiting = Batch(MODEL, seats=8, chunk=32), list(rows)
    while waiting or batch.rows or batch.reading:
        while waiting and batch.free and r.random() < .6: batch.add(waiting.pop(0))
        batch.step()
    for row in rows:
        alone = MODEL.steps(torch.tensor([row.ids]), row.args, stop_ids={TOK.eos_id}, stop=("e",),
                            tokenizer=TOK, seed=row.seed)
        assert row.said == [s.ids_B.item() for s in alone]


def test_a_crowd_hears_what_each_hears_alone(small):
    asks = [dict(HELLO, messages=[dict(role="user", content=f"{i} hens " * (1 + i % 7))], seed=i,
                 max_tokens=5 + i % 20, temperature=(0, 1.)[i % 2]) for i in range(16)]
    heard = [None]*len(asks)
    def one(i):
        heard[i] = client(small).chat.completions.create(**asks[i]).choices[0].message.content
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(asks))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert heard == [client(small).chat.completions.create(**a).choices[0].message.content
                     for a in asks] and len(set(heard)) > 10


def crowd(engine, n, **more):
    "Statuses and Retry-After of n requests at once."
    async def go():
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=n)) as c:
            return await asyncio.gather(
                *[c.post(engine.url + "/v1/chat/completions",
                         json=dict(HELLO, max_tokens=40, temperature=1) | more) for _ in range(n)])
    return [(r.status_code, r.headers.get("retry-after"), r.json().get("error", {}).get("type"))
            for r in asyncio.run(go())]


def test_a_full_queue_says_429_and_goes_on():
    with running(ENDLESS, seats=2, queue=3, step=.01) as engine:
        heard = crowd(engine, 12)
        assert (sorted(set(heard)) == [(200, None, None), (429, "1", "rate_limit_error")]
                and heard.count((200, None, None)) >= 5), heard
        assert crowd(engine, 1, max_tokens=1) == [(200, None, None)]
        # four choices and five places, three of them taken
        with pytest.raises(openai.RateLimitError):
            threading.Thread(target=crowd, args=(engine, 3)).start()
            until(lambda: engine.health()["running"] == 2)
            client(engine).chat.completions.create(**HELLO, n=4)


def test_too_long_a_wait_says_503_and_too_long_an_answer_504():
    with running(ENDLESS, seats=1, queue=9, step=.02, wait_seconds=.4) as engine:
        heard = crowd(engine, 4)
        assert (heard.count((200, None, None)) == 1
                and heard.count((503, "5", "server_error")) == 3), heard
    with running(ENDLESS, seats=1, step=.01, run_seconds=.1) as engine:
        assert crowd(engine, 1, max_tokens=300) == [(504, None, "server_error")]
        with pytest.raises(openai.APIError, match="0.1 seconds"):
            list(client(engine).chat.completions.create(**HELLO, max_tokens=300, stream=True))
        assert engine.health()["running"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_seat(stream):
    with running(ENDLESS, seats=1, queue=1, step=.005) as engine:
        host = engine.url.removeprefix("http://")
        c = http.client.HTTPConnection(host, timeout=5)
        c.request("POST", "/v1/chat/completions", json.dumps(
            dict(HELLO, max_tokens=900, stream=stream)), {"content-type": "application/json"})
        if stream: assert c.getresponse().read(20)
        else: until(lambda: engine.health()["running"] == 1)
        c.sock.shutdown(socket.SHUT_RDWR)
        c.close()
        until(lambda: engine.health()["cancelled"] == 1 and not engine.health()["running"], 3)
        assert crowd(engine, 1, max_tokens=2) == [(200, None, None)]


def test_stopping_tells_everybody():
    with running(ENDLESS, seats=1, queue=9, step=.01) as engine:
        out = []
        t = threading.Thread(target=lambda: out.extend(crowd(engine, 3, max_tokens=900)))
        t.start()
        until(lambda: sum(engine.health()[k] for k in ("running", "waiting")) == 3)
        engine.close()
        t.join(5)
        assert ([o[0] for o in out] == [503]*3
                and httpx.get(engine.url + "/health").status_code == 503)


# --- from the command line ------------------------------------------------------------------------

def test_the_verb_serves_and_ends_with_ctrl_c(tmp_path):
    import bantam.model.files  # noqa: F401  (adds save_pretrained)
    MODEL.save_pretrained(tmp_path/"hen")
    TOK.save(tmp_path/"hen")
    p = subprocess.Popen([sys.executable, "-m", "bantam", "serve", "--model", tmp_path/"hen",
                          "--port", "0", "--max-batch", "2"], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    try:
        line = p.stdout.readline()
        url = re.search(r"^hen: (http://127\.0\.0\.1:\d+) ", line)[1]
        stream = openai.OpenAI(base_url=url + "/v1", api_key="none",
                               max_retries=0).chat.completions.create(
                                   model="hen", messages=HELLO["messages"], max_tokens=900,
                                   stream=True)
        assert next(iter(stream)).choices
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=20)
    finally: p.kill()
    assert p.returncode == 0 and out.strip() == "stopped" and not err.strip(), (out, err)


# --- the page -------------------------------------------------------------------------------------

EVIL = ("Hi <script>document.title='bad'</script> <img src=x onerror=\"document.title='bad'\"> "
        "\x1b[31mred\x1b[0m &amp; **b**")


@pytest.fixture()
def tab(browser):
    page = browser.new_page(viewport=dict(width=900, height=760))
    page.errors, page.away = [], []
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    yield page
    page.close()


def comes(tab, expression):
    """Wait until it is true in the page, which lets nobody evaluate texts inside: we ask from
    without."""
    end = time.monotonic() + 10
    while not tab.evaluate(expression):
        assert time.monotonic() < end, expression
        tab.wait_for_timeout(10)


def test_page_shows_words_as_words(tab):
    with running(scripted(EVIL), seats=2) as engine:
        tab.on("request", lambda r: None if r.url.startswith(engine.url)
               else tab.away.append(r.url))
        tab.goto(engine.url)
        comes(tab, "document.getElementById('model').textContent === 'small'")
        tab.keyboard.type("Hello <b>you</b>")  # the box has the focus from the beginning
        tab.keyboard.press("Enter")
        words = tab.locator("li.assistant .words")
        comes(tab, "!document.querySelector('.writing') && document.querySelector('li.assistant "
                   ".words')?.textContent.length > 20")
        assert (words.inner_text() == EVIL.replace("\x1b", "\u241b")
                and tab.locator("li.user .words").inner_text() == "Hello <b>you</b>")
        assert tab.title() == "bantam" and tab.locator(
            "#talk script, #talk img, #talk b b, .words *").count() == 0
        assert tab.errors == [] and tab.away == []


def test_page_streams_stops_and_goes_on(tab):
    with running(ENDLESS, seats=2, step=.02) as engine:
        tab.goto(engine.url)
        tab.keyboard.type("Tell me a story")
        tab.keyboard.press("Enter")
        comes(tab, "document.querySelector('li.assistant .words')?.textContent.length > 10")
        assert tab.locator("#stop").is_visible() and tab.locator(".writing").count() == 1
        tab.keyboard.press("Escape")
        tab.wait_for_selector("text=stopped")
        until(lambda: engine.health()["cancelled"] == 1 and not engine.health()["running"], 3)
        tab.locator("summary").press("Enter")
        tab.fill("#most", "5")
        tab.fill("#system", "Be brief.")
        tab.fill("#words", "And now?")
        tab.locator("#send").press("Enter")
        comes(tab, "document.querySelectorAll('li.assistant').length === 2 && "
                   "!document.querySelector('.writing')")
        assert (tab.locator("li.assistant .note").all_inner_texts()[1].startswith("cut")
                and engine.health()["served"] == 1)
        assert tab.evaluate("document.activeElement.id") == "words" and tab.errors == []
        tab.locator("#fresh").click()
        assert tab.locator("#talk li").count() == 0


def test_page_asks_for_the_token(tab):
    with running(token="open-sesame", seats=1) as engine:
        tab.goto(engine.url)
        tab.wait_for_selector("#trouble:not([hidden])")
        assert ("token" in tab.locator("#trouble").inner_text()
                and tab.evaluate("document.activeElement.id") == "token")
        tab.keyboard.type("open-sesame")
        tab.keyboard.press("Tab")
        comes(tab, "document.getElementById('model').textContent === 'small'")
        assert tab.locator("#trouble").is_hidden()
