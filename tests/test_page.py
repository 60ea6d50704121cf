"""The page in a real headless Chromium: what a person does with it, and that nothing is fetched from anywhere else.

Needs the extra `app`, `pip install playwright` and a Chromium: TC_CHROMIUM=<its path> where it is not on the PATH.
TC_SCREENSHOTS=<folder> keeps pictures of the page.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from test_ratings import evaluation
from tuned_runs import make_run

from tc_lightning.backbone import Backbone
from tc_lightning.ratings import read_answers

pytest.importorskip("gradio", reason="the page needs pip install 'tc_lightning[app]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="driving the page needs pip install playwright")
CHROMIUM = os.environ.get("TC_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 120_000  # ms
pytestmark = [pytest.mark.extended, pytest.mark.skipif(not CHROMIUM, reason="no Chromium: TC_CHROMIUM=<its path>")]


@pytest.fixture
def serve(tmp_path):
    """`serve("app", "run=...")` -> address; the page is ended with Ctrl-C, as a person does, and must end by itself."""
    running = []

    def start(verb, *settings):
        command = [sys.executable, "-m", "tc_lightning", verb, f"hydra.run.dir={tmp_path / 'page'}", *settings]
        log = (tmp_path / "log.txt").open("w+")
        # a test run in the background of a shell ignores Ctrl-C, and so would the page
        heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        running.append((subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, **heeding), log))
        for _ in range(1500):
            time.sleep(0.2)
            said = (tmp_path / "log.txt").read_text()
            if "page        " in said:
                return said.split("page        ")[1].split()[0]
            assert running[0][0].poll() is None, said
        raise AssertionError(f"no page after five minutes: {said}")

    yield start
    for process, log in running:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(180) == 0, (tmp_path / "log.txt").read_text()
        finally:
            process.kill()
            log.close()


@pytest.fixture
def browse(tmp_path):
    """`browse(address)` -> page, with `requests`, the hosts that were asked for anything."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS, viewport={"width": 1280, "height": 900}
        )

        def open_page(address):
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.hosts = set()
            page.on("request", lambda request: page.hosts.add(request.url.split("/")[2]) if "//" in request.url[:10] else None)
            page.goto(address)
            return page

        yield open_page
        browser.close()


def shot(page, name):
    if "TC_SCREENSHOTS" in os.environ:
        page.wait_for_timeout(700)
        page.screenshot(path=str(Path(os.environ["TC_SCREENSHOTS"]) / f"{name}.png"), full_page=True)


def source(page, number):
    """What the figure shows, as a data URL."""
    return page.get_attribute(f"#pictures figure:nth-child({number}) img", "src")


@pytest.mark.timeout(900)
def test_mixing(serve, browse, tmp_path):
    runs = [make_run(tmp_path / name, seed) for seed, name in enumerate(("bold", "calm"))]
    address = serve("app", f"run=[{runs[0]},{runs[1]}]", "chain.steps=4")
    assert address.startswith("http://127.0.0.1:")
    page = browse(address)
    message = page.locator("#status")

    page.click("#go")
    message.get_by_role("alert").wait_for()
    assert "The prompt is empty" in message.inner_text()
    shot(page, "empty_prompt")

    page.fill("#prompt textarea", "a red circle on the left")
    page.keyboard.press("Enter")
    page.get_by_text(re.compile(r"step \d of 4")).first.wait_for()  # busy: what is being done and how far it is
    page.wait_for_selector("#pictures figure:nth-child(2)")
    assert page.locator("#pictures figcaption").all_inner_texts() == ["original", "mixture"]
    scores = page.locator("#pictures figure:nth-child(2) dl").inner_text().split()
    assert {"tiny_preference", "tiny_clip", "tiny_aesthetic"} <= set(scores) and float(scores[1]) > 0
    original, mixture = source(page, 1), source(page, 2)
    assert original != mixture
    shot(page, "pictures")

    page.locator("#weight-0 input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("old => document.querySelector('#pictures figure:nth-child(2) img').src !== old", arg=mixture)
    assert source(page, 1) == original and "original 0.25" in page.inner_text("#rest")

    page.click("#strip")
    page.wait_for_selector("#pictures figure:nth-child(5)")
    assert page.locator("#pictures figcaption").all_inner_texts()[0] == "0 bold"
    shot(page, "strip")

    page.locator("#history button.thumbnail-item, #history .grid-container button").first.click()
    page.get_by_text("Back to number 1.").wait_for()
    assert source(page, 2) == mixture and "original 0.3 " in page.inner_text("#rest")
    shot(page, "back")

    page.fill("#mix-name textarea", "../mine")
    page.click("#save")
    message.get_by_text("Saved, mixed in weight space").wait_for()
    assert Backbone.load(tmp_path / "page" / "encoders" / "mine").base_record["source"] == "tiny"

    with page.expect_download() as download:
        page.get_by_text("Save the settings").click()
    settings = json.loads(Path(download.value.path()).read_text())
    assert settings["prompt"] == "a red circle on the left" and "tc_lightning mix" in settings["command"]
    page.set_viewport_size({"width": 390, "height": 844})
    shot(page, "narrow")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), "it scrolls sideways"
    assert page.hosts == {address.split("/")[2]}, "something was fetched from elsewhere"


@pytest.mark.timeout(600)
def test_the_server_refuses(serve, tmp_path):
    address = serve("app", "chain.steps=1", "reward=[]")  # with the three text encoders that ship

    def status(path="", data=None, **headers):
        try:
            return urllib.request.urlopen(urllib.request.Request(address + path, data, headers), timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    assert status() == 200
    assert status(Host="evil.example") == 403
    assert status("gradio_api/upload", b"x") == 403
    assert status("gradio_api/queue/join", b"x" * 100_000) == 413
    (tmp_path / "secret.txt").write_text("secret")
    assert status(f"gradio_api/file={tmp_path / 'secret.txt'}") in (403, 404)
    assert status(f"gradio_api/file={tmp_path / 'page' / '.hydra' / 'config.yaml'}") in (403, 404)


@pytest.mark.timeout(600)
def test_rating_from_the_keyboard(serve, browse, tmp_path):
    folder = evaluation(tmp_path / "evaluation", ("base", "mine"), seeds=1, kept=2)
    address = serve("rate", f"images={folder}")
    page = browse(address)
    answers = tmp_path / "page" / "ratings.csv"
    for number, key in enumerate(("ArrowLeft", "ArrowDown", "ArrowRight", "ArrowLeft")):
        page.wait_for_selector(f'[data-token="{number}"]')
        shot(page, f"rate_{number}")
        assert "mine" not in page.inner_text("body") and "base" not in page.inner_text("body")
        page.keyboard.press(key)
    page.get_by_text("All 4 questions are answered").wait_for()
    assert [row["answer"] for row in read_answers(answers)] == ["left", "tie", "right", "left"]
    page.wait_for_selector("#rates table")
    assert "mine" in page.inner_text("#rates") and "%" in page.inner_text("#rates")
    shot(page, "rated")
    assert page.hosts == {address.split("/")[2]}
