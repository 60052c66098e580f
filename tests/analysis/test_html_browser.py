"""The HTML report in a real browser: how it fits small and large screens, by day and night, and its films."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from html_data import render, write_evaluation, write_training

from dtvla.analysis.sources import find_sources

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver installs one"
)

from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

PATIENCE = 30  # seconds
CARD = "document.querySelector('.card:has(video):has(.moments)')"
EVIL = "<img src=x onerror='document.title=\"taken\"'><script>document.title='taken'</script>" + "x" * 200


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("page")
    write_training(root / "runs" / "nano")
    for place, mode in enumerate(("think", "mask")):
        write_evaluation(root / "e" / mode, mode, 0.6, seed=place, filmed=[0], words=EVIL)
    write_evaluation(root / "e" / ("long_name_" * 9), "random", 0.6, render="full")
    page = root / "report.html"
    page.write_text(render(find_sources([root / "runs", root / "e"], root), "A report", 6, 8))
    return page.as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    # Root, as in containers, has no sandbox; shared memory is small there.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def show(browser: Any, address: str, width: int = 1280, scheme: str = "light") -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(address)
    wait(browser, "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")


def wait(browser: Any, condition: str) -> None:
    WebDriverWait(browser, PATIENCE, poll_frequency=0.02).until(lambda b: b.execute_script(f"return {condition}"))


def ask(browser: Any, code: str) -> Any:
    return browser.execute_script(f"return {code}")


@pytest.mark.parametrize("width", [320, 390, 820, 1280, 2560])
def test_nothing_is_wider_than_the_screen(browser: Any, address: str, width: int) -> None:
    show(browser, address, width)
    assert ask(browser, "innerWidth") == width
    assert ask(browser, "document.documentElement.scrollWidth") <= width
    outside = ask(
        browser,
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, details:not([open]), svg'))"
        ".filter(e => (b => b.right > innerWidth + 1 || b.left < -1)(e.getBoundingClientRect()))"
        ".map(e => e.tagName + '.' + e.className)",
    )
    assert outside == []


def test_tables_are_whole_on_paper(browser: Any, address: str) -> None:
    show(browser, address, 720)  # of A4, in CSS's pixels
    widths = "[...document.querySelectorAll('.scroll:has(table)')].map(e => [e.scrollWidth, e.clientWidth])"
    assert any(needed > there for needed, there in ask(browser, widths))  # on a screen they scroll
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    found = ask(browser, widths)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert all(needed <= there for needed, there in found)


@pytest.mark.parametrize("width", [390, 1280])
def test_figures_are_drawn_large_enough_to_read(browser: Any, address: str, width: int) -> None:
    """Letters of 8 points or more, in a figure that is shown at 0.8 of its size or more, have 8 pixels or more."""
    show(browser, address, width)
    shown = ask(browser, "[...document.querySelectorAll('img')].map(i => [i.complete, i.naturalWidth, i.width])")
    assert len(shown) >= 5
    assert all(complete and drawn >= 0.79 * natural > 200 for complete, natural, drawn in shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_letters_are_readable_by_day_and_night(browser: Any, address: str, width: int, scheme: str) -> None:
    """All text has a contrast of 4.5 to the paper; letters have 12 pixels or more."""
    show(browser, address, width, scheme)
    found = ask(browser, CONTRASTS)
    assert len(found["text"]) > 50
    assert min(found["text"]) >= 4.5
    assert min(found["sizes"]) >= 12
    assert (found["paper"] > 0.5) == (scheme == "light")


def test_it_works_offline_and_loads_nothing(browser: Any, address: str) -> None:
    browser.get_log("browser")
    browser.execute_cdp_cmd("Network.enable", {})
    limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": True, **limits})
    try:
        show(browser, address)
        names = ask(browser, "performance.getEntriesByType('resource').map(e => e.name.split(':')[0])")
    finally:
        browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": False, **limits})
    assert set(names) <= {"data", "blob"}
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert ask(browser, "document.title") == "A report"  # what stands in thoughts is not executed
    assert EVIL[:40] in ask(browser, "document.querySelector('.thought').textContent")


def test_a_film_plays_and_its_thoughts_go_with_it(browser: Any, address: str) -> None:
    show(browser, address)
    assert ask(browser, "document.querySelectorAll('video').length") == 4
    assert ask(browser, "document.querySelector('video').src.split(':')[0]") == "blob"
    now = f"[...{CARD}.querySelectorAll('.now')].map(t => t.dataset.first)"
    browser.execute_script(f"{CARD}.querySelectorAll('.moments li')[1].click()")
    wait(browser, f"{now}.join() === '10'")
    assert ask(browser, f"{CARD}.querySelector('video').currentTime") == pytest.approx(10.5 / 20)
    browser.execute_script(f"const film = {CARD}.querySelector('video'); film.currentTime = 0.3; film.play()")
    wait(browser, f"{now}.join() === '0'")
    wait(browser, f"{now}.join() === '10'")
    wait(browser, f"{CARD}.querySelector('video').ended")


CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    const linear = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
    return a === 0 ? null : 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const paper = (element) => {
    const own = luminance(getComputedStyle(element).backgroundColor);
    return own === null && element.parentElement ? paper(element.parentElement) : own ?? 1;
  };
  const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const seen = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest("video"));
  const text = seen.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return {
    text: text.map((e) => contrast(luminance(getComputedStyle(e).color), paper(e))),
    sizes: text.map((e) => parseFloat(getComputedStyle(e).fontSize)),
    paper: paper(document.body),
  };
})()"""
