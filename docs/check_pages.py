"""Looks at every page of the built documentation in headless Chromium, as wide as a desktop and as narrow as a phone.

    python docs/check_pages.py docs/_build [--screenshots DIR]

Fails where a page scrolls sideways, an image doesn't load, or a link inside the documentation leads nowhere. Tables and
code may scroll within themselves. Needs Chromium and its driver (Debian: `apt install chromium chromium-driver`) and
selenium.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

VIEWPORTS = {"desktop": (1280, 900), "phone": (390, 844)}

# Elements that stick out of the page, but for those inside something that scrolls within the article.
OVERFLOW = """
const width = document.documentElement.clientWidth;
function scrolls(e) {
    for (; e.tagName != "ARTICLE"; e = e.parentElement)
        if (["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)) return true;
    return false;
}
return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > width + 1 && !scrolls(e))
    .slice(0, 3).map(e => e.outerHTML.slice(0, 80));
"""
# Tables that must be scrolled.
WIDE_TABLES = """
return [...document.querySelectorAll("article table")]
    .filter(e => e.scrollWidth > e.parentElement.clientWidth).map(e => e.querySelector("th").innerText);
"""
BROKEN_IMAGES = "return [...document.images].filter(i => !i.naturalWidth).map(i => i.getAttribute('src'));"
LINKS = "return [...document.querySelectorAll('a[href]')].map(a => a.href);"
IDS = "return [...document.querySelectorAll('[id]')].map(e => e.id);"


def chromium(profile: str, *arguments: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", *arguments):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-component-update")
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build", type=Path, help="folder that Sphinx wrote")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each page and width")
    args = parser.parse_args(argv)
    pages = sorted(args.build.resolve().glob("*.html"))
    if not pages:
        print(f"error: {args.build} holds no pages; build them with python -m sphinx -b html docs DIR", file=sys.stderr)
        return 2
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        print("error: no chromium or chromedriver; on Debian, apt install chromium chromium-driver", file=sys.stderr)
        return 2
    if args.screenshots:
        args.screenshots.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    links: dict[Path, list[str]] = {}
    ids: dict[Path, set[str]] = {}
    with tempfile.TemporaryDirectory() as profile:
        browser = chromium(profile)
        try:
            for name, (width, height) in VIEWPORTS.items():
                metrics: dict[str, Any] = dict(width=width, height=height, deviceScaleFactor=1, mobile=name == "phone")
                browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                for page in pages:
                    browser.get(page.as_uri())
                    faults += [f"{page.name}, {name}: sticks out: {e}" for e in browser.execute_script(OVERFLOW)]
                    faults += [f"{page.name}: no image {src}" for src in browser.execute_script(BROKEN_IMAGES)]
                    if name == "desktop":
                        faults += [f"{page.name}: too wide a table: {e}" for e in browser.execute_script(WIDE_TABLES)]
                    links[page], ids[page] = browser.execute_script(LINKS), set(browser.execute_script(IDS))
                    if args.screenshots:
                        browser.save_screenshot(str(args.screenshots / f"{page.stem}-{name}.png"))
        finally:
            browser.quit()
    for page, targets in links.items():
        for target in targets:
            url = urlsplit(target)
            path, fragment = Path(unquote(url.path)), unquote(url.fragment)
            known = path.is_file() and (not fragment or path not in ids or fragment in ids[path])
            if url.scheme == "file" and not known:
                faults.append(f"{page.name}: a link leads nowhere: {path.name}#{fragment}")
    faults = list(dict.fromkeys(faults))  # both widths find the same broken image
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(pages)} pages at {len(VIEWPORTS)} widths: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
