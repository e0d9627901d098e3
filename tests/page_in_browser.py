"""The page in a browser: a conversation, a stop, the charts; screenshots to look at.

    pip install playwright       (and Chromium, whose path is given)
    python tests/page_in_browser.py [--chromium /usr/bin/chromium] [--out FOLDER] [--model MODEL]

Starts a server with an API key, talks with it as a person would, in a wide light window and a narrow dark
one, and fails on any error in the page and on any request to elsewhere. Prints where the screenshots are.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastllm.formats.source import DEFAULT_MODEL

KEY = "a-key-for-this-page-alone"
WINDOWS = (("light", 1200, 760), ("dark", 420, 900))
UNAUTHORIZED = "401"  # what the page meets before it has the key


def talk(page: Any, url: str) -> None:
    elsewhere: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: None if request.url.startswith(url) else elsewhere.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.wait_for_timeout(500)
    assert "key" in page.text_content("#state")
    page.fill("#key", KEY)
    page.dispatch_event("#key", "change")
    page.wait_for_timeout(500)
    assert page.text_content("#state") == "ready"
    page.fill("#max_tokens", "60")
    page.fill("#temperature", "0")
    page.fill("#input", "Name three rivers of Europe.")
    page.press("#input", "Enter")
    for _ in range(150):
        page.wait_for_timeout(200)
        if page.is_enabled("#send"):
            break
    text = page.text_content(".message.assistant")
    assert "60 tokens" in text, text
    page.wait_for_timeout(2500)
    assert page.eval_on_selector_all("#figures path", "found => found.length") == 4
    page.fill("#max_tokens", "2000")
    page.fill("#input", "Tell a long story.")
    page.press("#input", "Enter")
    page.wait_for_timeout(1200)
    page.click("#stop")
    page.wait_for_timeout(500)
    assert "stopped" in page.text_content(".message.assistant >> nth=1")
    assert not elsewhere, elsewhere
    assert all(UNAUTHORIZED in error for error in errors), errors


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path, default=Path("build"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fastllm.serve", "--model", options.model, "--port", "0"]
    environment = {**os.environ, "FASTLLM_API_KEY": KEY}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        found = next(filter(None, (re.search(r"listening on \S+:(\d+)", line) for line in server.stderr)))
        url = f"http://127.0.0.1:{found[1]}"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
            for scheme, width, height in WINDOWS:
                window = {"width": width, "height": height}
                page = browser.new_page(viewport=window, color_scheme=scheme)
                talk(page, url)
                page.screenshot(path=options.out / f"page-{scheme}.png")
                print(options.out / f"page-{scheme}.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
