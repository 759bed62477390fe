"""The page in headless Chromium, by the keyboard: skipped where chromedriver is not installed."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

import pytest
from test_page import HOSTILE, content, folders  # noqa: F401

from runtime import page

pytestmark = pytest.mark.skipif(
    shutil.which("chromedriver") is None or shutil.which("chromium") is None,
    reason="chromium and chromium-driver are not installed",
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
]  # fmt: skip
TAB, ENTER, ESCAPE, LEFT, RIGHT, DOWN = "\ue004", "\ue007", "\ue00c", "\ue012", "\ue014", "\ue015"


class Browser:
    """A session of chromedriver, which speaks JSON over HTTP."""

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"

    def call(self, method: str, path: str, **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data=data, method=method)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str):
        return self.call("POST", "/execute/sync", script=script, args=[])

    def press(self, *keys: str) -> None:
        events = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": events}]
        self.call("POST", "/actions", actions=actions)


@contextlib.contextmanager
def browser(size: tuple[int, int], dark: bool, profile):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [*FLAGS, f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    wanted = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    session = Browser(port)
    try:
        for attempt in range(100):
            with contextlib.suppress(OSError):
                session.call("GET", "/status")
                break
            assert attempt < 99
            time.sleep(0.1)
        opened = session.call("POST", "/session", capabilities={"alwaysMatch": wanted})
        session.address += f"/session/{opened['sessionId']}"
        yield session
        session.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait()


@pytest.fixture(
    params=[((1280, 900), False), ((500, 800), True)], ids=["wide and light", "narrow and dark"]
)
def opened(request, content, tmp_path):  # noqa: F811
    """A page with all that it can have, in a browser."""
    png = base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
        "gg=="
    )
    sections = [
        {"title": "Result", "table": [["", "KL"], [HOSTILE, "1"]]},
        {"title": "Curves", "image": f"data:image/png;base64,{base64.b64encode(png).decode()}"},
        {"title": "Start", "text": HOSTILE, "blocks": {"kept": [0, 2], "of": 4}},
    ]
    page.write(tmp_path / "page.html", HOSTILE, content[0], sections)
    size, dark = request.param
    with browser(size, dark, tmp_path / "profile") as session:
        session.call("POST", "/url", url=(tmp_path / "page.html").as_uri())
        yield session, content[0]["windows"], dark
        assert session.call("POST", "/se/log", type="browser") == []
        fetched = session.run("return performance.getEntriesByType('resource').map(x => x.name)")
        assert all(name.startswith("data:") for name in fetched)


def test_a_page_renders(opened):
    session, windows, dark = opened
    counted = sum(sum(window["mask"]) for window in windows)
    assert session.run("return document.querySelectorAll('.t').length") == counted
    assert session.run("return document.querySelectorAll('#bars i').length") == 40
    assert session.run("return document.querySelectorAll('#worst a').length") > 2
    assert session.run("return document.querySelectorAll('.blocks .kept').length") == 2
    shown = session.run("return document.querySelector('h1').textContent")
    assert shown == HOSTILE  # and no script of it ran: the log is empty, nothing asks
    paper = session.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper.removeprefix("rgb(").removesuffix(")").split(", "))) < 150) == dark
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert session.run(wide) == 0


def test_a_page_is_walked_by_the_keyboard(opened):
    session, windows, _ = opened
    focused = "return document.activeElement.id"
    for _ in range(20):
        session.press(TAB)
        if session.run("return document.activeElement.id") == "threshold":
            session.press(*[RIGHT] * 180)
        if session.run("return document.activeElement.className").startswith("t"):
            break
    below = session.run("return document.querySelectorAll('.t.off').length")
    assert 0 < below < session.run("return document.querySelectorAll('.t').length")
    assert session.run(focused) == "t0-1"
    session.press(RIGHT, RIGHT, LEFT)
    assert session.run(focused) == "t0-2"
    card = "const card = document.getElementById('card'); return card.hidden ? null : "
    assert session.run(card + "card.querySelectorAll('li').length") == 10
    text = session.run(card + "card.innerText")
    window = windows[0]
    for figure in (window["kl"][1], window["ce"][1], window["teacher_ce"][1]):
        assert f"{figure:.2f}" in text
    session.press(DOWN)
    assert session.run("return !document.activeElement.classList.contains('off')")
    session.press(ENTER)
    assert session.run("return document.activeElement.getAttribute('aria-pressed')") == "true"
    session.press(ESCAPE)
    assert session.run(card + "0") is None
    session.run("document.querySelector('#worst a').focus()")
    session.press(ENTER)
    assert session.run("return document.activeElement.className").startswith("t")
    assert session.run(card + "1") == 1
    top = session.run("return document.activeElement.getBoundingClientRect().top")
    assert 0 < top < 900
