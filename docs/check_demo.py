"""Uses the built demo page in headless Chromium, through a server that isolates it and one that doesn't.

    python docs/check_demo.py DIR/demo [--screenshot FILE]

Fails where its answers aren't Python's, a message is missing, a control has no name, it is slower than it may be, or it
scrolls sideways on a phone. Needs what docs/check_pages.py needs, and scikit-image.
"""

import argparse
import contextlib
import functools
import http.server
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from check_pages import chromium
from PIL import Image
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from mobilenets_zoo_cli import cli

# Three times what a quiet machine of two cores stays below: this one may be slower, or shared.
FIRST_ANSWER_S, FASTEST_MS = 9.0, 30.0
TRIES = 3  # of what is timed
TOLERANCE = 0.01
# Larger pictures are shrunk twice, and the first time the browser's way.
LARGE_TOLERANCE = 0.03
PHONE_WIDTH = 380
SLOW_S = 1.5  # what the server waits with a slow file

STATE = """
const text = (node, query) => node.querySelector(query)?.textContent;
return {
  status: text(document, "#status"), error: document.querySelector("#error").hidden ? "" : text(document, "#error"),
  caption: text(document, "#caption"), width: document.documentElement.scrollWidth,
  now: performance.now(),
  hosts: [...new Set(performance.getEntriesByType("resource").map((e) => new URL(e.name).host))],
  cards: [...document.querySelectorAll("article")].map((card) => ({
    name: text(card, "h3"), ms: parseFloat(text(card, ".time")),
    facts: Object.fromEntries([...card.querySelectorAll("dt")].map((t) => [t.textContent, t.nextSibling.textContent])),
    answers: Object.fromEntries([...card.querySelectorAll("li")].map((row) =>
      [text(row, "span").replaceAll(" ", "_"), parseFloat(text(row, "span + span")) / 100])),
  })),
  rows: [...document.querySelectorAll("#rows tr")].map((row) => [...row.children].map((cell) => cell.textContent)),
};
"""
FORGET = 'document.querySelector("#status").textContent = ""; document.querySelector("#error").hidden = true;'
# A file that arrives by event: "drop" or "paste".
ARRIVE = """
const [kind, url] = arguments, done = arguments[2], transfer = new DataTransfer();
fetch(url).then((r) => r.blob()).then((blob) => {
  transfer.items.add(new File([blob], `${kind}.jpg`, { type: "image/jpeg" }));
  const init = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, { ...init, dataTransfer: transfer })
    : new ClipboardEvent(kind, { ...init, clipboardData: transfer }));
  done();
});
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: Any, isolated: bool, missing: set[str], slow: set[str], **kwargs: Any):
        self.isolated, self.missing, self.slow = isolated, missing, slow
        super().__init__(*args, **kwargs)

    def send_head(self) -> Any:
        if Path(self.path).name in self.slow:
            time.sleep(SLOW_S)
        if Path(self.path).name in self.missing:
            return self.send_error(404)
        return super().send_head()

    def end_headers(self) -> None:
        if self.isolated:
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path, isolated: bool, missing: set[str], slow: set[str]) -> Iterator[str]:
    handler = functools.partial(Handler, directory=str(folder), isolated=isolated, missing=missing, slow=slow)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def python_answers(model: str, images: list[Path]) -> list[dict[str, float]]:
    """Returns the five classes of each image and their probabilities, as `mobilenets-zoo predict` gives them."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main(["predict", *map(str, images), "--model", f"{model}_cifar100", "--json"], standalone_mode=False)
    results = json.loads(output.getvalue())["images"]
    return [{row["class"]: row["probability"] for row in result["predictions"]} for result in results]


class Page:
    """The open page, with what was found wrong with it."""

    def __init__(self, browser: Any, folder: Path):
        self.browser, self.folder = browser, folder
        self.catalogue = json.loads((folder / "networks.json").read_text(encoding="utf-8"))
        self.faults: list[str] = []

    def expect(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)

    def state(self) -> dict[str, Any]:
        return self.browser.execute_script(STATE)

    def wait(self, until: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        try:
            WebDriverWait(self.browser, 60, 0.02).until(lambda _: until(self.state()))
        except TimeoutException:
            raise ValueError(f"waited a minute for {what}; the page says {self.state()}") from None
        return self.state()

    def open(self, url: str, ready: str = "Pick a picture") -> dict[str, Any]:
        self.browser.get(url)
        return self.wait(lambda state: state["status"].startswith(ready) or state["error"], "the page to start")

    def answer(self, act: Callable[[], object]) -> dict[str, Any]:
        """Returns what the page shows once what `act` asks for is measured."""
        self.browser.execute_script(FORGET)
        act()
        state = self.wait(lambda state: " ms" in state["status"] or state["error"], "an answer")
        if state["error"]:
            raise ValueError(f"the page says: {state['error']}")
        return state

    def refused(self, act: Callable[[], object], *words: str) -> None:
        """Expects one line with these words, and that the page goes on."""
        act()
        error = self.wait(lambda state: state["error"], f"a message with {words}")["error"]
        self.expect(all(word in error for word in words) and "\n" not in error, f"the message {error!r} lacks {words}")
        self.answer(self.sample(0))  # raises where nothing works any more

    def sample(self, index: int) -> Callable[[], object]:
        return self.browser.find_elements(By.CSS_SELECTOR, "#samples button")[index].click

    def file(self, path: Path) -> Callable[[], object]:
        return lambda: self.browser.find_element(By.ID, "file").send_keys(str(path))

    def choose(self, select: str, file: str) -> Callable[[], object]:
        script = "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.onchange();"
        return lambda: self.browser.execute_script(script, select, file)

    def click(self, name: str) -> Callable[[], object]:
        return self.browser.find_element(By.ID, name).click

    def compare(self, state: dict[str, Any], truth: dict[str, float], what: str, tolerance: float = TOLERANCE) -> None:
        shown = state["cards"][0]["answers"]
        close = shown.keys() == truth.keys() and max(abs(shown[name] - truth[name]) for name in truth) < tolerance
        self.expect(close, f"{what}: the page answers {shown}, Python {truth}")


def check_speed(page: Page, url: str) -> None:
    """The first answer after opening the page, and a run of the smallest network."""
    first, fastest = [], []
    for _ in range(TRIES):
        page.browser.get(url)
        page.wait(lambda state: state["status"].startswith("Pick"), "the page to start")
        page.sample(0)()
        first.append(page.wait(lambda state: state["cards"], "the first answer")["now"])
        fastest.append(page.wait(lambda state: " ms" in state["status"], "the time")["cards"][0]["ms"])
        if min(first) < 1000 * FIRST_ANSWER_S and min(fastest) < FASTEST_MS:
            break
    print(f"first answer after {min(first) / 1000:.2f} s; {page.state()['cards'][0]['name']} takes {min(fastest)} ms")
    page.expect(min(first) < 1000 * FIRST_ANSWER_S, f"the first answers came after {first} ms")
    page.expect(min(fastest) < FASTEST_MS, f"the smallest network takes {fastest} ms")


def check_answers(page: Page, scratch: Path) -> None:
    """All samples and images of other kinds against `mobilenets-zoo predict`."""
    from skimage import data

    cat = Image.fromarray(data.chelsea())  # wider than high
    wide, upright, clear, large = (scratch / f"{name}" for name in ("wide.png", "exif.jpg", "clear.png", "large.jpg"))
    cat.save(wide)
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turned by a quarter
    cat.save(upright, quality=95, exif=orientation)
    alpha = np.linspace(0, 255, cat.width).astype(np.uint8)[None].repeat(cat.height, 0)
    Image.fromarray(np.dstack([np.asarray(cat), alpha])).save(clear)
    cat.resize((1804, 1200)).save(large, quality=95)
    files = [wide, upright, clear, large]
    samples = [page.folder / row["file"] for row in page.catalogue["samples"]]
    truths = python_answers(page.catalogue["networks"][0]["name"], [*samples, *files])
    for i, (path, truth) in enumerate(zip([*samples, *files], truths, strict=True)):
        state = page.answer(page.sample(i) if i < len(samples) else page.file(path))
        tolerance = LARGE_TOLERANCE if path == large else TOLERANCE
        page.compare(state, truth, path.name, tolerance)
    for kind in ("drop", "paste"):
        arrive = functools.partial(page.browser.execute_async_script, ARRIVE, kind, samples[0].name)
        state = page.answer(arrive)
        page.compare(state, truths[0], kind)
        page.expect(state["caption"] == f"{kind}.jpg", f"{kind}: the picture's name is {state['caption']!r}")


def check_comparison(page: Page) -> None:
    """Each model's fp32 network beside its int8 one: answers, what is said about them, the copied table."""
    rows = {(row["name"], row["precision"]): row for row in page.catalogue["networks"]}
    photo = page.folder / page.catalogue["samples"][0]["file"]
    page.answer(page.sample(0))
    for model in dict.fromkeys(name for name, _ in rows):
        pair = [rows[model, "fp32"], rows[model, "int8"]]
        page.choose("network", pair[0]["file"])()
        state = page.answer(page.choose("other", pair[1]["file"]))
        page.expect(len(state["cards"]) == 2, f"{model}: {len(state['cards'])} networks are compared")
        for card, row in zip(state["cards"], pair, strict=True):
            facts = [card["name"], card["facts"]["size"], card["facts"]["MACs"]]
            macs = f"{row['macs'] / 1e6:.1f}"
            expected = [f"{model} {row['precision']}", f"{row['bytes'] / 1e6:.1f} MB", f"{macs} M"]
            page.expect(facts == expected, f"the page shows {facts}, it should be {expected}")
            page.expect(f"{row['top1']:.2f} %" in card["facts"]["top-1"], f"{facts[0]} shows {card['facts']['top-1']}")
            listed = [cells for cells in state["rows"] if cells[0] == facts[0]]
            page.expect([cells[3:5] for cells in listed] == [[macs, f"{card['ms']:.2f}"]], f"the table has {listed}")
            page.expect((page.folder / row["file"]).stat().st_size == row["bytes"], f"{row['file']} has another size")
        page.compare(state, python_answers(model, [photo])[0], model)
        best = [max(card["answers"], key=card["answers"].__getitem__) for card in state["cards"]]
        page.expect(best[0] == best[1], f"{model}: fp32 sees {best[0]}, int8 {best[1]}")
    for button, pair in enumerate(page.catalogue["pairs"]):
        act = page.browser.find_elements(By.CSS_SELECTOR, "#pairs button")[button].click
        names = [f"{card['name'].replace(' ', '-')}.onnx" for card in page.answer(act)["cards"]]
        page.expect(names == pair["files"], f"{pair['label']!r} compares {names}")
    grant = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", grant)
    page.click("copy")()
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)));"
    text = page.browser.execute_async_script(read)
    for cells in page.state()["rows"]:
        page.expect(f"| {' | '.join(cells)} |" in text, f"the copied text lacks {cells}: {text}")
    page.answer(page.choose("other", ""))


def check_refusals(page: Page, url: str, scratch: Path, missing: set[str]) -> None:
    text, huge, heavy = scratch / "notes.txt", scratch / "huge.png", scratch / "heavy.png"
    text.write_text("not an image")
    Image.new("1", (8000, 6400)).save(huge)
    with open(heavy, "wb") as file:
        file.truncate(65 * 2**20)
    page.refused(page.file(text), "notes.txt", "is not an image")
    page.refused(page.file(huge), "huge.png", "8000 x 6400 pixels", "50 million")
    page.refused(page.file(heavy), "heavy.png", "64 MiB")
    first, other = (row["file"] for row in page.catalogue["networks"][:2])
    page.open(url)  # forgets the networks that it has
    page.answer(page.sample(0))
    missing.add(other)
    page.choose("network", other)()
    error = page.wait(lambda state: state["error"], "a message about a missing network")["error"]
    page.expect(other in error and "HTTP 404" in error, f"a missing network: {error!r}")
    missing.clear()
    page.expect(len(page.answer(page.choose("network", other))["cards"]) == 1, "a network stays missing")
    page.answer(page.choose("network", first))
    page.browser.execute_script("navigator.mediaDevices.getUserMedia = () => Promise.reject(new Error('no'));")
    page.refused(page.click("camera"), "camera", "isn't allowed")
    page.open(url)
    missing.add("networks.json")
    page.expect("networks.json" in page.open(url)["error"], "no message where networks.json is missing")
    missing.clear()
    command, remove = "Page.addScriptToEvaluateOnNewDocument", "Page.removeScriptToEvaluateOnNewDocument"
    script = page.browser.execute_cdp_cmd(command, {"source": "delete window.WebAssembly;"})
    page.open(url)
    page.sample(0)()
    error = page.wait(lambda state: state["error"], "a message about WebAssembly")["error"]
    page.expect("runs no WebAssembly" in error, f"without WebAssembly: {error!r}")
    page.browser.execute_cdp_cmd(remove, script)


def check_switching(page: Page, url: str, slow: set[str], missing: set[str]) -> None:
    """What was asked for last is shown, whichever file comes last, and nobody waits for what isn't wanted any more."""
    page.open(url)
    page.answer(page.sample(0))
    samples, networks = (page.catalogue[key] for key in ("samples", "networks"))
    late, wanted = networks[2]["file"], networks[0]["file"]
    slow.update((samples[1]["file"], late))
    missing.add(late)
    page.sample(1)()
    page.answer(page.sample(2))
    time.sleep(SLOW_S)
    caption = page.state()["caption"]
    page.expect(caption.startswith(samples[2]["name"]), f"{caption!r} is shown, which was not asked for last")
    start = time.perf_counter()
    page.choose("network", late)()
    status, bar = page.state()["status"], page.browser.find_element(By.ID, "progress")
    page.expect(status.startswith("Fetching") and bar.is_displayed(), f"while it fetches, the page says {status!r}")
    before = page.answer(page.choose("network", wanted))
    page.expect(time.perf_counter() - start < SLOW_S, "the answer waited for a network that isn't wanted any more")
    time.sleep(SLOW_S)
    after = page.state()
    page.expect(not after["error"] and after["status"] == before["status"], f"a late network left {after}")
    slow.clear()
    missing.clear()


def check_access(page: Page, url: str) -> None:
    """Names of all controls, the keyboard alone, the camera, both colour schemes, a phone's width."""
    page.open(url)
    page.browser.switch_to.active_element.send_keys(Keys.TAB, Keys.TAB)  # the link, then the first sample
    state = page.answer(lambda: page.browser.switch_to.active_element.send_keys(Keys.ENTER))
    page.expect(state["caption"] == page.catalogue["samples"][0]["name"], f"the keyboard chose {state['caption']!r}")
    outline = page.browser.switch_to.active_element.value_of_css_property("outline-style")
    page.expect(outline == "solid", "the focus isn't visible")
    for element in page.browser.find_elements(By.CSS_SELECTOR, "button, select, canvas, img, a, section"):
        if element.is_displayed():
            page.expect(bool(element.accessible_name), f"has no name: {element.get_attribute('outerHTML')[:80]}")
    page.click("camera")()
    playing = "return document.getElementById('video').videoWidth"
    WebDriverWait(page.browser, 10).until(lambda browser: browser.execute_script(playing), "no picture from the camera")
    page.expect(page.answer(page.click("shoot"))["caption"] == "Photograph", "the camera takes no picture")
    live = "return document.getElementById('video').srcObject.active"
    WebDriverWait(page.browser, 10).until_not(lambda browser: browser.execute_script(live), "the camera runs on")
    metrics: dict[str, Any] = dict(width=PHONE_WIDTH, height=800, deviceScaleFactor=1, mobile=True)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    state = page.answer(page.browser.find_elements(By.CSS_SELECTOR, "#pairs button")[0].click)
    page.expect(len(state["cards"]) == 2, "no comparison on a phone")
    page.expect(state["width"] <= PHONE_WIDTH, f"at {PHONE_WIDTH} pixels the page is {state['width']} wide")
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    colours = set()
    for scheme in ("light", "dark"):
        emulate_scheme(page.browser, scheme)
        colours.add(page.browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    page.expect(len(colours) == 2, f"dark and light are both {colours}")


def emulate_scheme(browser: Any, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def save_screenshot(page: Page, url: str, file: Path) -> None:
    emulate_scheme(page.browser, "light")
    page.browser.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    metrics: dict[str, Any] = dict(width=960, height=1000, deviceScaleFactor=1, mobile=False)
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.open(url)
    first, second = page.catalogue["pairs"][0]["files"]
    page.choose("network", first)()
    page.choose("other", second)()
    for _ in range(2):  # the second time everything is compiled
        page.answer(page.sample(0))
    page.browser.execute_script("scrollTo(0, 0); document.activeElement.blur();")
    bottom = page.browser.execute_script("return document.querySelector('#result').getBoundingClientRect().bottom")
    metrics["height"] = int(bottom) + 16
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.browser.save_screenshot(str(file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder that benchmarks/build_demo.py wrote")
    parser.add_argument("--screenshot", type=Path, help="write the README's picture and check nothing")
    args = parser.parse_args(argv)
    folder = args.demo.resolve()
    if not (folder / "networks.json").is_file():
        print(f"error: {folder} holds no demo page; python benchmarks/build_demo.py DIR writes it", file=sys.stderr)
        return 2
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        print("error: no chromium or chromedriver; on Debian, apt install chromium chromium-driver", file=sys.stderr)
        return 2
    missing: set[str] = set()
    slow: set[str] = set()
    start = time.perf_counter()
    camera = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(folder, True, missing, slow) as isolated,
        served(folder, False, missing, slow) as plain,
    ):
        browser = chromium(f"{scratch}/profile", *camera)
        page = Page(browser, folder)
        try:
            if args.screenshot:
                save_screenshot(page, isolated, args.screenshot)
                return 0
            check_speed(page, isolated)
            check_answers(page, Path(scratch))
            check_comparison(page)
            check_access(page, isolated)
            several = page.state()["cards"][0]["facts"]["run on"]
            host = urlsplit(isolated).netloc
            page.expect(page.state()["hosts"] == [host], f"the page fetches from {page.state()['hosts']}")
            check_refusals(page, isolated, Path(scratch), missing)
            check_switching(page, isolated, slow, missing)
            page.open(plain)
            state = page.answer(page.sample(0))
            one = state["cards"][0]["facts"]["run on"]
            cores = min(4, browser.execute_script("return navigator.hardwareConcurrency"))
            expected = (f"CPU, {cores} thread{'s' if cores > 1 else ''}", "CPU, 1 thread")
            page.expect((several, one) == expected, f"isolated or not: {several}, {one}")
            network, photo = page.catalogue["networks"][0]["name"], folder / page.catalogue["samples"][0]["file"]
            page.compare(state, python_answers(network, [photo])[0], "one thread")
        except (ValueError, TimeoutException) as error:
            page.faults.append(str(error))
        finally:
            browser.quit()
    for fault in page.faults:
        print(fault, file=sys.stderr)
    print(f"demo page: {len(page.faults)} faults, {time.perf_counter() - start:.0f} s")
    return 1 if page.faults else 0


if __name__ == "__main__":
    sys.exit(main())
