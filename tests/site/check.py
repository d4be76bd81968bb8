# SPDX-License-Identifier: MIT OR Apache-2.0
"""Opens each page of the site in Chromium, and exits with status 1 if a page is broken.

    check.py SITE [--pictures FOLDER]

Expect of each page: no error on the console, no request to another machine, each internal
link resolves, each picture loads. Expect of each page that Sphinx makes, also: it is
readable without JavaScript, and no screen from 360 to 1280 pixels has to scroll sideways.
Expect that the search finds pages.
"""

import argparse
import base64
import functools
import http.server
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import websocket

WIDTHS = (1280, 768, 360)

# Debian's package of the theme has this error: the table of contents beside the text does not
# follow the reader. Nothing else depends on it.
KNOWN = "TypeError: Gumshoe is not a constructor"

# What is broken in the document at hand.
LOOK = """
(() => {
    const problems = [];
    for (const image of document.images)
        if (!image.complete || image.naturalWidth === 0)
            problems.push("the picture does not load: " + image.src);
    const root = document.documentElement;
    if (root.scrollWidth > root.clientWidth) {
        const wide = [...document.querySelectorAll("article *")]
            .find(e => e.getBoundingClientRect().right > root.clientWidth);
        problems.push("wider than the screen: " + (wide ? wide.outerHTML.slice(0, 80) : ""));
    }
    const title = document.querySelector("h1");
    if (!title || title.getBoundingClientRect().height === 0)
        problems.push("no title is shown");
    return problems;
})()
"""

REFERENCES = """
({
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.links].map(a => a.href),
    loaded: performance.getEntriesByType("resource").map(e => e.name),
})
"""


class Browser:
    """A headless Chromium, by the DevTools protocol."""

    def __init__(self, profile):
        arguments = [
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync",
            "disable-dev-shm-usage", "no-proxy-server", "remote-debugging-port=0", f"user-data-dir={profile}",
        ]
        command = ["chromium-headless-shell", *(f"--{argument}" for argument in arguments)]
        # A session of its own, which close() ends: the command is a script that starts others.
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        port = pathlib.Path(profile, "DevToolsActivePort")
        end = time.monotonic() + 120
        while not (port.exists() and port.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > end:
                sys.exit("Chromium does not start")
            time.sleep(0.1)
        number, path = port.read_text().split()
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{number}{path}", timeout=120, suppress_origin=True
        )
        self.number, self.session, self.events = 0, None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message:
            self.events.append(message)
        return message

    def call(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def open(self, url):
        """Opens a page, and returns the errors on its console."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive()
        errors = []
        for event in self.events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                errors.append(details.get("exception", {}).get("description", details["text"]))
            elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return [error for error in errors if not error.startswith(KNOWN)]

    def width(self, pixels):
        metrics = {"width": pixels, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def scripts(self, on):
        self.call("Emulation.setScriptExecutionDisabled", value=not on)

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def serve(site):
    """Serves the site on this machine, and returns its address."""
    handler = functools.partial(Handler, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


class Check:
    def __init__(self, site, browser):
        self.site, self.browser = site, browser
        self.address = serve(site)
        self.problems = []
        self.ids, self.links = {}, {}

    def error(self, page, what):
        self.problems.append(f"{page.relative_to(self.site)}: {what}")

    def url(self, page):
        return self.address + urllib.parse.quote(page.relative_to(self.site).as_posix())

    def look(self, page, how):
        for problem in self.browser.run(LOOK):
            self.error(page, f"{how}: {problem}")

    def page(self, page):
        browser = self.browser
        browser.width(WIDTHS[0])
        for problem in browser.open(self.url(page)):
            self.error(page, problem)
        found = browser.run(REFERENCES)
        self.ids[page] = set(found["ids"])
        self.links[page] = found["links"]
        for url in found["loaded"]:
            if not url.startswith((self.address, "data:")):
                self.error(page, f"loads {url}")
        if page.relative_to(self.site).parts[0] in ("rust", "man", "search.html"):
            return
        for width in WIDTHS:
            browser.width(width)
            self.look(page, f"{width} pixels")
        browser.scripts(False)
        browser.open(self.url(page))
        self.look(page, f"{WIDTHS[-1]} pixels, without JavaScript")
        browser.scripts(True)

    def all_links(self):
        for page, links in self.links.items():
            for link in links:
                if not link.startswith(self.address):
                    continue
                url = urllib.parse.urlsplit(link)
                path = self.site / urllib.parse.unquote(url.path).lstrip("/")
                # rustdoc also encodes its ids.
                names = {url.fragment, urllib.parse.unquote(url.fragment)}
                if not path.is_file():
                    self.error(page, f"no such page: {link}")
                # A fragment like 10-20 is a range of lines in rustdoc's view of a source file.
                elif url.fragment and path in self.ids and not names & self.ids[path] and "src" not in path.parts:
                    self.error(page, f"no such place: {link}")

    def search(self):
        page = self.site / "search.html"
        self.browser.width(WIDTHS[0])
        self.browser.open(self.url(page) + "?q=barrier")
        end = time.monotonic() + 60
        found = []
        while not found and time.monotonic() < end:
            time.sleep(0.2)
            found = self.browser.run("[...document.querySelectorAll('#search-results li a')].map(a => a.href)")
        if not any("/barrier.html" in link for link in found):
            self.error(page, f"the search for barrier finds {found}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("site", type=pathlib.Path)
    parser.add_argument("--pictures", type=pathlib.Path, help="leave pictures of some pages here")
    args = parser.parse_args()
    site = args.site.resolve()
    pages = sorted(site.rglob("*.html"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            check = Check(site, browser)
            for page in pages:
                check.page(page)
            check.all_links()
            check.search()
            if args.pictures:
                args.pictures.mkdir(parents=True, exist_ok=True)
                for name in ("index", "start", "vmgenid", "dev-vmgenid", "benchmarks"):
                    for width in (WIDTHS[0], WIDTHS[-1]):
                        browser.width(width)
                        browser.open(check.url(site / f"{name}.html"))
                        browser.picture(args.pictures / f"{name}-{width}.png")
        finally:
            browser.close()
    for problem in check.problems:
        print(problem)
    links = sum(map(len, check.links.values()))
    print(f"{len(pages)} pages, {links} links, {len(check.problems)} problems")
    return 1 if check.problems or len(pages) < 20 else 0


if __name__ == "__main__":
    sys.exit(main())
