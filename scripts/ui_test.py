#!/usr/bin/env python3
"""Opens the live page of a real cluster in headless Chromium, checks it, and takes screenshots.

    python3 scripts/ui_test.py --perigee target/release/perigee --model models/….gguf --to FOLDER

Starts `perigee up` and sends requests, of which the page must show one within a second. Light and dark, at 1280×800 and as on a phone:
nothing may be written to the console, nothing may be wider than the screen, and a request's way must open by keyboard alone.
Needs `chromium`, which is spoken to over pipes, and nothing else beside Python.
"""

import argparse
import base64
import itertools
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

SCREENS = {"desktop": (1280, 800, False), "phone": (390, 844, True)}
PATIENCE_SECONDS = 30
# Two snapshots per second, and the way to the screen.
SHOWN_WITHIN_SECONDS = 1.0
SYSTEM = "You are a helpful assistant of a small observatory. Answer in one short sentence, and name the planet that is meant. " * 6


def say(text):
    print(f"ui_test: {text}", file=sys.stderr, flush=True)


class Browser:
    """Chromium, spoken to over its debugging pipes."""

    def __init__(self, folder):
        to_browser, from_us = os.pipe()
        from_browser, to_us = os.pipe()

        def move():
            # The browser reads commands from descriptor 3 and writes answers to 4.
            os.dup2(to_browser, 103)
            os.dup2(to_us, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
                   "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, preexec_fn=move, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(to_us)
        self.write, self.read = from_us, from_browser
        self.buffer, self.numbers, self.said = b"", itertools.count(1), []
        self.session = None

    def message(self, until):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, until - time.monotonic()))
            if not ready:
                return None
            self.buffer += os.read(self.read, 1 << 16)
        text, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(text)

    def call(self, method, **parameters):
        number = next(self.numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            message = self.message(until)
            if message is None:
                raise SystemExit(f"ui_test: no answer to {method}")
            if message.get("id") == number:
                if "error" in message:
                    raise SystemExit(f"ui_test: {method}: {message['error']}")
                return message["result"]
            self.hear(message)

    def hear(self, message):
        """Keeps what a page says that it should not."""
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.said.append(json.dumps(parameters["exceptionDetails"])[:600])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.said.append(json.dumps(parameters["args"])[:600])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.said.append(json.dumps(parameters["entry"])[:600])

    def open(self, url, width, height, mobile, scheme):
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)

    def value(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise SystemExit(f"ui_test: {expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, what, expression):
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            value = self.value(expression)
            if value:
                return value
            time.sleep(0.02)
        raise SystemExit(f"ui_test: waited for {what} in vain")

    def key(self, key, code, number, text=None):
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number, **more)

    def screenshot(self, path, whole):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        more = {"captureBeyondViewport": True, "clip": clip} if whole else {}
        data = self.call("Page.captureScreenshot", format="png", **more)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=PATIENCE_SECONDS)


def ask(url, model, text, max_tokens, **more):
    body = {"model": model, "max_tokens": max_tokens, "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
            "ttft_slo_ms": 8000, "ignore_eos": True, **more}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
            return answer.headers["x-request-id"]
    except urllib.error.HTTPError as error:
        # A rejection is something to be shown, too.
        return error.headers["x-request-id"]


def check(browser, url, model, name, scheme, folder):
    width, height, mobile = SCREENS[name]
    browser.open(f"{url}/ui", width, height, mobile, scheme)
    browser.wait("news", "document.getElementById('connection')?.dataset.state === 'live'")
    took = None
    if (name, scheme) == ("desktop", "dark"):
        rows = browser.value("document.querySelectorAll('#requests tr').length && document.querySelector('#requests tr td').textContent") or ""
        began = time.monotonic()
        sent = threading.Thread(target=ask, args=(url, model, "Which planet has rings?", 40))
        sent.start()
        browser.wait("the request", f"document.querySelector('#requests td.id') && document.querySelector('#requests td.id').textContent !== '{rows}'")
        took = time.monotonic() - began
        sent.join()
        if took > SHOWN_WITHIN_SECONDS:
            raise SystemExit(f"ui_test: a request showed after {took:.2f} s")
        browser.wait("its end", "document.querySelector('#requests .state').textContent === 'finished'")
    wide = browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    if wide > 0:
        raise SystemExit(f"ui_test: {name}: {wide} pixels are beyond the screen")
    time.sleep(1.5)
    browser.screenshot(folder / f"{name}-{scheme}.png", whole=mobile)
    browser.value("document.querySelector('#requests tr').focus()")
    browser.key("Enter", "Enter", 13, "\r")
    browser.wait("the way of a request", "document.getElementById('detail').open && document.querySelectorAll('#detail-way .row').length > 5")
    browser.screenshot(folder / f"{name}-{scheme}-request.png", whole=False)
    browser.key("Escape", "Escape", 27)
    browser.wait("the dialog's end", "!document.getElementById('detail').open")
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--perigee", required=True, type=pathlib.Path)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--to", required=True, type=pathlib.Path)
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [arguments.perigee, "up", "-o", "json", "--model", arguments.model, "--http-port", "0", "--grpc-port", "0",
                   "--prefill", "1", "--decode", "2", "--kv-memory", "128MiB", "--threads", "1", "--set", f"kv.disk_path={scratch}/disk",
                   "--set", "kv.disk_capacity=256MiB", "--set", "router.local_prefill_tokens_max=64"]
        log = open(pathlib.Path(scratch) / "up.log", "w")
        up = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        browser = None
        try:
            ready = json.loads(up.stdout.readline())
            url = ready["http"]
            with urllib.request.urlopen(f"{url}/v1/models") as models:
                model = json.load(models)["data"][0]["id"]
            # Something to look at: a shared prefix, tenants of latency, and some at a time.
            questions = [f"Question {number}: which planet is number {number}?" for number in range(6)]
            threads = [threading.Thread(target=ask, args=(url, model, question, 24)) for question in questions]
            for thread in threads:
                thread.start()
                time.sleep(0.3)
            for thread in threads:
                thread.join()
            ask(url, model, "Too much to ask", 8, ttft_slo_ms=1)
            browser = Browser(pathlib.Path(scratch) / "profile")
            result = {}
            for scheme in ("dark", "light"):
                for name in SCREENS:
                    took = check(browser, url, model, name, scheme, arguments.to)
                    if took is not None:
                        result["shown_after_seconds"] = round(took, 3)
                    say(f"{name}, {scheme}: well")
            if browser.said:
                raise SystemExit("ui_test: the page said:\n" + "\n".join(browser.said))
            print(json.dumps(result))
        finally:
            if browser:
                browser.close()
            up.terminate()
            up.wait(timeout=60)


if __name__ == "__main__":
    main()
