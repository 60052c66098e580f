"""Protects the page itself, in a real browser: keys, buttons, what it shows, how it fits small and large screens."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from review_data import FAILED_KEY, FRAMES, STRIP, keys, reviewing, serving, thought, write_annotated
from training_data import INSTRUCTION

from dtvla.cot.review.bundle import BundleMaterial, write_bundle
from dtvla.cot.review.decisions import Key, read_decisions
from dtvla.cot.review.material import DatasetMaterial, Material

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
BROWSER, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: apt-get install chromium chromium-driver installs one"
)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

PATIENCE = 30  # seconds


class Page:
    """What a reviewer sees and does."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    def wait(self, condition: Callable[[], Any]) -> None:
        WebDriverWait(self.browser, PATIENCE, poll_frequency=0.02).until(lambda _: condition())

    def open(self, address: str) -> None:
        self.browser.get(address)

    def press(self, *pressed: str) -> None:
        """Keys to whatever has the focus."""
        webdriver.ActionChains(self.browser).send_keys(*pressed).perform()

    def press_with(self, modifier: str, pressed: str) -> None:
        """A key while another is down."""
        webdriver.ActionChains(self.browser).key_down(modifier).send_keys(pressed).key_up(modifier).perform()

    def write(self, text: str) -> None:
        """Replace what is in the editor, and save it."""
        self.press_with(Keys.CONTROL, "a")
        self.press(text)
        self.press_with(Keys.CONTROL, Keys.ENTER)

    def click(self, name: str) -> None:
        self.browser.find_element(By.ID, name).click()

    def seen(self, name: str) -> bool:
        return bool(self.browser.find_element(By.ID, name).is_displayed())

    def text(self, name: str) -> str:
        return str(self.browser.find_element(By.ID, name).text)

    def script(self, code: str) -> Any:
        return self.browser.execute_script(f"return {code}")

    def at(self, key: Key) -> None:
        """Wait until a frame is shown, with all its pictures."""
        self.wait(lambda: self.text("place") == f"episode {key[0]} · frame {key[1]} of {FRAMES}")
        self.wait(lambda: self.script("[...document.images].every(i => i.complete && i.naturalWidth > 0)"))

    def cut_off(self, offline: bool) -> None:
        """Take the network away, or give it back."""
        self.browser.execute_cdp_cmd("Network.enable", {})
        limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.browser.execute_cdp_cmd("Network.emulateNetworkConditions", {"offline": offline, **limits})

    def resize(self, width: int, height: int, mobile: bool) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


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


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    page = Page(browser)
    page.resize(1280, 800, mobile=False)
    browser.get_log("browser")
    yield page
    # A page that is left must not be able to hold up the next test.
    browser.execute_script("window.onbeforeunload = null")
    browser.get("about:blank")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> DatasetMaterial:
    return DatasetMaterial(write_annotated(tmp_path_factory.mktemp("data") / "soup"))


@pytest.fixture
def decisions(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def address(material: Material, decisions: Path) -> Iterator[str]:
    with reviewing(material, decisions) as review, serving(review) as address:
        yield address


def made(decisions: Path) -> dict[Key, tuple[str, str]]:
    return {key: (d.decision, d.thought) for key, d in read_decisions(decisions).items()}


def test_a_frame_is_shown_with_everything_that_belongs_to_it(page: Page, address: str) -> None:
    page.open(f"{address}/#{FAILED_KEY[0]}/{FAILED_KEY[1]}")
    page.at(FAILED_KEY)
    assert page.text("instruction") == INSTRUCTION
    assert page.text("thought") == thought(*FAILED_KEY)
    assert "length" in page.text("failed")
    assert page.text("origin") == "annotated"
    assert page.text("count") == "1 of 12 reviewed"
    assert page.text("strip").split() == [f"{away:+d}" if away else "here" for away in sorted((0, *STRIP))]
    assert page.script("document.querySelectorAll('#cameras img').length") == 2
    assert page.script("document.querySelectorAll('#trace polyline').length") == 3
    assert page.script("document.querySelectorAll('#trace .tick').length") == 4
    ours = {entry.split("/")[2] for entry in page.script("performance.getEntriesByType('resource').map(e => e.name)")}
    assert ours == {address.split("/")[2]}  # works without internet
    assert not [entry for entry in page.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_whole_review_by_keyboard(page: Page, address: str, decisions: Path) -> None:
    order = keys()
    page.open(address)
    page.at(order[0])
    page.press("a")
    page.at(order[1])
    page.press("r")
    page.at(order[2])
    assert made(decisions) == {order[0]: ("accept", thought(*order[0])), order[1]: ("reject", "")}
    page.press("u")
    page.at(order[1])
    assert page.text("state") == ""
    assert list(made(decisions)) == [order[0]]
    page.press("e")
    page.write("a r e u.")
    page.wait(lambda: "words" in page.text("reasons"))
    assert list(made(decisions)) == [order[0]]
    page.write(f"{thought(*order[1])} go on.")
    page.at(order[2])
    assert made(decisions)[order[1]] == ("edit", f"{thought(*order[1])} go on.")
    page.press("e", "never mind")
    assert [page.seen(name) for name in ("editor", "save", "thought", "accept")] == [True, True, False, False]
    page.press(Keys.ESCAPE)
    assert [page.seen(name) for name in ("editor", "save", "thought", "accept")] == [False, False, True, True]
    assert page.text("thought") == thought(*order[2])
    page.press(Keys.ARROW_LEFT)
    page.at(order[1])  # what was just decided can be looked at again
    assert (page.text("state"), page.text("thought")) == ("edited", f"{thought(*order[1])} go on.")
    assert page.text("before") == f"before: {thought(*order[1])}"
    page.press(Keys.ARROW_RIGHT)
    page.at(order[2])
    for after in [*order[3:-1], order[-2]]:
        page.press("a")
        page.at(after)
    page.wait(lambda: "Every frame is reviewed" in page.text("message"))
    assert page.text("count") == "12 of 12 reviewed"
    assert set(made(decisions)) == set(order[:-1])  # the last one was reviewed before


def test_keys_of_the_browser_and_held_keys_decide_nothing(page: Page, address: str, decisions: Path) -> None:
    page.open(address)
    page.at(keys()[0])
    for modifier in (Keys.CONTROL, Keys.ALT, Keys.META):
        page.press_with(modifier, "a")
    page.script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'a', repeat: true, bubbles: true}))")
    page.press(Keys.ARROW_RIGHT)
    page.at(keys()[1])
    assert made(decisions) == {}


def test_a_reload_goes_on_where_it_was_and_reviewed_frames_are_shown_on_demand(page: Page, address: str) -> None:
    first, second, third = keys()[:3]
    page.open(address)
    page.at(first)
    page.press("a")
    page.at(second)
    page.browser.refresh()
    page.at(second)
    assert page.script("document.getElementById('previous').disabled")
    page.click("all")
    page.press(Keys.ARROW_LEFT)
    page.at(first)
    assert page.text("state") == "accepted"
    page.click("trace")  # its middle lies between frames 9 and 17
    page.wait(lambda: page.text("place") != f"episode 0 · frame 0 of {FRAMES}")
    assert page.text("place") in {f"episode 0 · frame {frame} of {FRAMES}" for _, frame in (second, third)}


def test_after_a_decision_comes_the_next_frame_that_needs_one_from_the_beginning_if_need_be(
    page: Page, address: str
) -> None:
    page.open(f"{address}/#{keys()[-2][0]}/{keys()[-2][1]}")
    page.at(keys()[-2])
    page.click("all")
    page.press("a")
    page.at(keys()[0])  # the last one is reviewed


def test_a_neighbour_is_looked_at_in_large(page: Page, address: str) -> None:
    page.open(address)
    page.at(keys()[0])
    own = page.script("document.querySelector('#cameras img').src")
    page.browser.find_elements(By.CSS_SELECTOR, "#strip button")[1].click()
    page.wait(lambda: "frame 3" in page.text("cameras"))
    assert page.script("document.querySelector('#cameras img').src") == own.replace("/0/0/", "/0/3/")
    page.browser.find_elements(By.CSS_SELECTOR, "#strip button")[1].click()
    page.wait(lambda: page.script("document.querySelector('#cameras img').src") == own)


@pytest.mark.parametrize(
    ("width", "height", "mobile"),
    [(320, 568, True), (390, 844, True), (820, 1180, True), (1280, 800, False), (2560, 1440, False)],
)
def test_it_fits_the_screen_and_is_worked_by_buttons(
    page: Page, address: str, decisions: Path, width: int, height: int, mobile: bool
) -> None:
    first, second, third = keys()[:3]
    page.resize(width, height, mobile)
    page.open(address)
    page.at(first)
    assert page.script("document.documentElement.scrollWidth") <= width
    assert page.script("innerWidth") == width
    for name in ("previous", "undo", "reject", "edit", "accept", "next"):
        box = page.script(f"document.getElementById('{name}').getBoundingClientRect().toJSON()")
        assert box["left"] >= 0 and box["right"] <= width and box["bottom"] <= height  # noqa: PT018
        assert box["height"] >= 40 and box["width"] >= 36  # noqa: PT018  for fingers
        assert page.script(f"(b => b.scrollWidth <= b.clientWidth)(document.getElementById('{name}'))"), name
    page.click("accept")
    page.at(second)
    page.click("edit")
    page.browser.find_element(By.ID, "editor").send_keys(" go on.")
    page.click("save")
    page.at(third)
    page.click("undo")
    page.at(second)
    page.click("reject")
    page.at(third)
    assert {key: kind for key, (kind, _) in made(decisions).items()} == {first: "accept", second: "reject"}


def test_thoughts_are_text_whatever_they_hold(page: Page, tmp_path: Path, decisions: Path) -> None:
    evil = " <img src=x onerror='document.title=\"taken\"'><script>document.title='taken'</script>"
    material = DatasetMaterial(write_annotated(tmp_path / "soup", mark=evil))
    with reviewing(material, decisions) as review, serving(review) as address:
        page.open(address)
        page.at(keys()[0])
        assert page.text("thought") == thought(*keys()[0]) + evil
        page.press("e")
        page.write(f"{thought(*keys()[0])} <think>.")
        page.wait(lambda: "<think>" in page.text("reasons"))
        assert page.script("document.title") == "soup – review"


def test_a_server_that_does_not_answer_is_said_and_nothing_is_lost(page: Page, address: str, decisions: Path) -> None:
    page.open(address)
    page.at(keys()[0])
    page.cut_off(True)
    page.press("a")
    page.wait(lambda: "does not answer" in page.text("reasons"))
    assert (page.text("state"), page.text("count")) == ("", "1 of 12 reviewed")
    page.cut_off(False)
    page.press("a")
    page.at(keys()[1])
    assert list(made(decisions)) == [keys()[0]]


def test_a_bundle_is_reviewed_without_its_dataset(page: Page, material: Material, tmp_path: Path) -> None:
    write_bundle(tmp_path / "soup.zip", material, material.frames, STRIP)
    elsewhere = BundleMaterial(tmp_path / "soup.zip")
    with reviewing(elsewhere, tmp_path / "d.jsonl", strip=STRIP) as review, serving(review) as address:
        page.open(address)
        for key, after in zip(keys()[:3], keys()[1:4], strict=True):
            page.at(key)
            page.press("a")
            page.at(after)
    assert list(made(tmp_path / "d.jsonl")) == keys()[:3]
