"""The server under a crowd: 32 streams at once against one, on the `tiny` shape, through HTTP.

    python benchmarks/server.py [--quick] [--json FILE] [--seconds 120] [--streams 32] [--threads 2]

`bantam-cli serve` runs in a process of its own, its readers in this one; both share the machine's cores. Each reader asks for a streamed chat answer, reads it to `[DONE]`, and asks again, with another prompt,
seed and length. Tokens are those that the server counts (`usage`). The model is untrained and all its tokens are about as likely, so nothing is cut off (`top_p` 1): there is no
small head of a distribution to find, as there is in a trained one. One reader alone comes first, for a sixth of the time, then all of them. Any status but 200, an error in a stream or a stream without its
end is an error, and one error means that the target is missed. There is no peer to run beside: the measure is the server itself with one reader. The last line is one JSON object.
"""
import argparse, asyncio, os, re, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path

from _common import machine, report, versions

TARGET = 4.


async def reader(client, url, number, end, out):
    "One reader, until the time is over."
    turn = 0
    while time.perf_counter() < end:
        turn += 1
        body = dict(
            model="tiny", messages=[
                dict(role="user", content="Tell me about the hens. "[:8 + 5*(number % 4)])],
                    stream=True, stream_options=dict(include_usage=True),
                    max_tokens=64 + 8*(number % 4), seed=1000*number + turn, temperature=1, top_p=1)
        begin, first, held, tokens, why = time.perf_counter(), None, b"", 0, None
        try:
            async with client.stream("POST", url + "/v1/chat/completions", json=body) as r:
                if r.status_code != 200: why = f"status {r.status_code}"
                async for chunk in r.aiter_raw():
                    if first is None: first = time.perf_counter() - begin
                    held = held[-400:] + chunk
                    if b'data: {"error":' in chunk: why = chunk[:200].decode(errors="replace")
            usage = re.search(rb'"completion_tokens":(\d+)', held)
            if not held.endswith(b"data: [DONE]\n\n") or usage is None: why = why or "no end"
            else: tokens = int(usage[1])
        except Exception as e: why = f"{type(e).__name__}: {e}"
        out.append((tokens, first, why))


async def crowd(url, streams, seconds):
    "Tokens per second, answers, errors, and seconds to the first piece."
    import httpx
    out, begin = [], time.perf_counter()
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(
        max_connections=streams, max_keepalive_connections=streams)) as client:
        await asyncio.gather(
            *[reader(client, url, n, begin + seconds, out) for n in range(streams)])
    took = time.perf_counter() - begin
    first = sorted(f for _, f, _ in out if f is not None) or [float("nan")]
    return dict(streams=streams, seconds=took, answers=len(out), tokens=sum(t for t, _, _ in out),
                rate=sum(t for t, _, _ in out)/took, errors=[w for _, _, w in out if w],
                first_median=statistics.median(first), first_worst=first[-1])


def serve(folder, streams, threads):
    "The server's process and its address."
    env = os.environ | dict(OMP_NUM_THREADS=str(threads))
    p = subprocess.Popen([sys.executable, "-m", "bantam", "serve", "--model", str(folder), "--name",
                          "tiny", "--port", "0", "--max-batch", str(streams)],
                         stdout=subprocess.PIPE, text=True, env=env)
    found = re.search(r"http://\S+:\d+", p.stdout.readline())
    if not found: sys.exit("the server did not start")
    return p, found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true"); parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=120.)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    seconds = 6. if args.quick else args.seconds
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/"tiny"
        subprocess.run([sys.executable, "-m", "bantam", "init", "--preset", "tiny", "--out",
                        str(folder)], check=True, stdout=subprocess.DEVNULL)
        p, url = serve(folder, args.streams, args.threads)
        try:
            asyncio.run(crowd(url, 2, 1.))  # warm
            rows = [asyncio.run(crowd(url, n, s))
                    for n, s in ((1, seconds/6), (args.streams, seconds))]
        finally:
            p.send_signal(signal.SIGINT)
            code = p.wait(30)
    ratio, errors = rows[1]["rate"]/rows[0]["rate"], sum(len(r["errors"]) for r in rows)
    print(f"{'streams':>8} {'seconds':>8} {'answers':>8} {'tokens':>8} {'tokens/s':>9} "
          f"{'first piece, median':>20} {'worst':>8} {'errors':>7}")
    for r in rows:
        print(f"{r['streams']:8} {r['seconds']:8.1f} {r['answers']:8} {r['tokens']:8} "
              f"{r['rate']:9.0f} {r['first_median']*1e3:17.0f} ms {r['first_worst']*1e3:5.0f} ms "
              f"{len(r['errors']):7}")
    for r in rows:
        for why in dict.fromkeys(r["errors"]): print("error:", why)
    print(f"{ratio:.2f} times the tokens of one stream (target {TARGET:g}); "
          f"the server ended with status {code}")
    name = f"{args.streams} streams over one"
    out = dict(name="server", ratios={name: round(ratio, 3)}, targets={name: TARGET},
               met=bool(ratio >= TARGET and not errors and code == 0), errors=errors, rows=rows,
               seconds=seconds,
               machine=machine(threads=args.threads),
               versions=versions("torch", "starlette", "uvicorn"))
    report(out, args.json)


if __name__ == "__main__": main()
