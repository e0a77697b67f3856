"""A headless Chromium that opens a page and reports what it found there, without any driver package."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The page lives in a frame of its own width and keeps its security policy; the frame's parent looks in from outside.
WRAPPER = """<!doctype html><meta charset="utf-8">
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{document}"></iframe>
<pre id="found"></pre>
<script>
frame.addEventListener("load", () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  found.textContent = JSON.stringify((() => {{ {probe} }})());
}});
</script>
"""


def browse(document: str, probe: str, folder: Path, width: int = 1000, dark: bool = False) -> tuple[object, list[str]]:
    """What ``probe`` (the body of a function of ``page`` and ``view``) returns, and the lines of the page's console."""
    assert CHROMIUM
    file = folder / "wrapper.html"
    file.write_text(WRAPPER.format(width=width, document=html.escape(document), probe=probe), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=4000"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [CHROMIUM, *flags, "--dump-dom", file.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (text,) = re.findall(r'<pre id="found">(.*?)</pre>', result.stdout, flags=re.S)
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(text)) if text else None, console
