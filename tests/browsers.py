"""A headless Chromium for the pages that the package writes."""

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver, Debian's chromium-driver"
)


@contextmanager
def chromium():
    """A browser that keeps what pages say on its console."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1300,900"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield found
    finally:
        found.quit()


def complaints(browser):
    """Errors and warnings on the console, but for what a test's own reading of canvases causes."""
    said = [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"]
    return [entry for entry in said if entry["level"] in ("SEVERE", "WARNING")]


# A chart is a canvas in the shadow of its element; what is drawn has a color of a curve.
DRAWN = """
const canvases = (node) => [...node.querySelectorAll("*")].flatMap((e) => [
  ...(e.tagName === "CANVAS" ? [e] : []), ...(e.shadowRoot ? canvases(e.shadowRoot) : [])]);
return [...document.querySelectorAll(".chart")].map((chart) => canvases(chart).some((canvas) => {
  if (canvas.width < 300 || canvas.height < 150) return false;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colors = [[0, 114, 178], [213, 94, 0]];
  const is = (i, color) => color.every((value, k) => Math.abs(pixels[i + k] - value) < 40);
  for (let i = 0; i < pixels.length; i += 4) if (colors.some((color) => is(i, color))) return true;
  return false;
}));
"""
