"""The page, in a browser, as people use it."""

import math
import re
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, command, environment, refused
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import sample
from model import SmolLM2, SmolLM2Config
from tools import demo

BROWSER = shutil.which("chromium") and shutil.which("chromedriver")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="needs chromium and chromedriver")]


@contextmanager
def served(model, *args):
    """The address of a page that tools.demo serves for a while."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        command("tools.demo", f"--model={model}", f"--port={port}", *args),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if f"127.0.0.1:{port}" in line:
                break
        else:
            pytest.fail("it ended before it served")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        f"user-data-dir={tmp_path / 'chromium'}",
    ):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(browser, condition, seconds=60):
    return WebDriverWait(browser, seconds, 0.1, [StaleElementReferenceException]).until(lambda _: condition())


class Page:
    """One person's page in the browser."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        until(browser, lambda: browser.find_elements(By.TAG_NAME, "textarea"))

    def box(self, label):
        return self.browser.find_element(By.XPATH, f"//label[.//span[normalize-space()='{label}']]//textarea")

    def press(self, name):
        buttons = self.browser.find_elements(By.XPATH, f"//button[normalize-space()='{name}']")
        next(button for button in buttons if button.is_displayed()).click()

    def type(self, text):
        box = self.box("Prompt")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def text(self):
        return self.box("Text").get_property("value")

    def finished(self):
        """The text, once it does not change any more."""

        def twice():
            before = self.text()
            time.sleep(1)
            return before if before and before == self.text() else None

        return until(self.browser, twice)

    def fits(self):
        return self.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def on_a_phone(browser):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)


def test_type_and_read(trained, browser):
    with served(trained, "--prompt=7: A cat", "--max_prompt=50", "--max_new_tokens=40") as address:
        page = Page(browser, address)
        assert page.box("Prompt").get_property("value") == "7: A cat"
        page.type("8: The old dog")
        page.press("Start")
        text = page.finished()
        assert text.startswith("8: The old dog") and len(text) > 30
        page.press("Start")  # the same prompt again: another text
        until(browser, lambda: page.text() and page.finished() != text)
        past_the_limit = """const box = arguments[0]; box.removeAttribute("maxlength"); box.value = "x".repeat(51);
                            box.dispatchEvent(new Event("input", {bubbles: true}))"""
        browser.execute_script(past_the_limit, page.box("Prompt"))
        page.press("Start")
        until(browser, lambda: "51 characters are too many" in browser.page_source)
        on_a_phone(browser)
        assert page.fits()
        urls = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert urls and all(url.startswith((address, "data:", "blob:")) for url in urls)


def tokens(browser):
    """The tokens that are shown, of all views that are in sight."""
    return [
        token for token in browser.find_elements(By.CSS_SELECTOR, ".tokens .score-token .text") if token.is_displayed()
    ]


def read(tokens):
    return "".join(token.get_property("textContent") for token in tokens).replace("\u21b5", "\n")


def test_what_else_was_expected(trained, browser, tmp_path):
    """The page begins with the prompt of the run; each token of a text shows its candidates on a click."""
    folder = shutil.copytree(trained / "checkpoint-000040", tmp_path / "model")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("Once upon a time", "8: The old dog"))
    model, tokenizer, _ = sample.load(sample.Settings(model=str(folder)))
    with served(folder, "--max_new_tokens=30") as address:
        page = Page(browser, address)
        assert page.box("Prompt").get_property("value") == "8: The old dog"
        page.press("Start")
        text = page.finished()
        until(browser, lambda: read(tokens(browser)) == text)
        assert "tokens per second, the first after" in browser.page_source
        place = len(tokenizer.encode("8: The old").ids)
        tokens(browser)[place].click()
        until(browser, lambda: re.search(r"cost [\d.]+ bits", browser.page_source))
        _, likeliest = demo.predictions(model, tokenizer.encode(text).ids)[place]
        shown = browser.find_elements(By.CSS_SELECTOR, ".confidence-set")
        assert len(shown) == 5
        for row, (probability, token) in zip(shown, likeliest, strict=True):
            assert row.text.split()[0] == demo.spell(tokenizer, token), row.text
            assert f"{100 * probability:.0f}%" in row.text
        page.press("Surprise")
        page.press("Look")
        bits = sum(bits for bits, _ in demo.predictions(model, tokenizer.encode("8: The old dog").ids))
        until(browser, lambda: f"{bits / len('8: The old dog'):.2f} bits per byte" in browser.page_source)
        assert read(tokens(browser)) == "8: The old dog"
        on_a_phone(browser)
        assert page.fits()


def test_two_models_side_by_side(trained, browser):
    first, second = (trained / f"checkpoint-0000{step}" for step in (20, 40))
    with served(first, f"--compare={second}", "--prompt=7: A cat", "--max_new_tokens=30") as address:
        page = Page(browser, address)
        page.press("Start")

        def texts():
            return [page.box(f"Text: {folder}").get_property("value") for folder in (first, second)]

        until(browser, lambda: all(len(text) > 12 for text in texts()))
        assert all(text.startswith("7: A cat") for text in texts())
        until(browser, lambda: len(browser.find_elements(By.XPATH, "//*[contains(text(), 'tokens per second')]")) == 2)
        page.press("Surprise")
        page.press("Look")
        until(browser, lambda: browser.page_source.count("bits per byte") == 2)


def test_predictions_are_those_of_the_model(trained):
    model, tokenizer, _ = sample.load(sample.Settings(model=str(trained), dtype="float32"))
    ids = tokenizer.encode("7: A cat sees \u00e9t\u00e9. " * 4).ids
    found = demo.predictions(model, ids)
    with torch.no_grad():
        logs = model(torch.tensor([[0, *ids[:-1]]]))[0].log_softmax(-1)
    for (bits, likeliest), row, id in zip(found, logs, ids, strict=True):
        assert bits == pytest.approx(-row[id].item() / math.log(2), abs=1e-4)
        assert [token for _, token in likeliest] == row.topk(5).indices.tolist()
        assert [p for p, _ in likeliest] == pytest.approx(row.exp().topk(5).values.tolist(), abs=1e-5)
    shown = demo.pieces(tokenizer, ids, found)
    assert "".join(text for text, *_ in shown) == "7: A cat sees \u00e9t\u00e9. " * 4
    assert sum(bits for _, bits, *_ in shown) == pytest.approx(sum(bits for bits, _ in found))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        demo.predictions(model, ids * 20)


@pytest.fixture(scope="module")
def tireless(trained, tmp_path_factory):
    """A model that writes for minutes: its end token is none of its vocabulary."""
    folder = tmp_path_factory.mktemp("tireless")
    torch.manual_seed(0)
    config = SmolLM2Config(
        vocab_size=300,
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=3,
        num_key_value_heads=1,
        eos_token_id=300,
    )
    SmolLM2(config).save_pretrained(folder)
    shutil.copy(trained / "checkpoint-000040" / "tokenizer.json", folder)
    return folder


def test_stop(tireless, browser):
    with served(tireless, "--prompt=A cat", "--max_new_tokens=8000") as address:
        page = Page(browser, address)
        browser.find_element(By.XPATH, "//button[contains(., 'Choices')]").click()
        (length,) = until(browser, lambda: browser.find_elements(By.XPATH, "//input[@type='number' and @max='8000']"))
        until(browser, length.is_displayed)
        length.send_keys(Keys.CONTROL, "a")
        length.send_keys("8000", Keys.TAB)
        page.press("Start")
        until(browser, lambda: len(page.text()) > 40)
        grown = len(page.text())
        until(browser, lambda: len(page.text()) > grown)
        page.press("Stop")
        stopped = page.finished()
        assert len(stopped) < 6000
        page.type("The old dog")
        page.press("Start")  # what was stopped is not in the way of the next
        until(browser, lambda: page.text().startswith("The old dog") and len(page.text()) > 40)


def test_two_people_at_once_do_not_mix(trained, browser):
    with served(trained) as address:
        first, pages = browser.current_window_handle, {}
        for prompt in ("1: A cat", "2: Her bird"):
            if pages:
                browser.switch_to.new_window("window")
            pages[prompt] = (browser.current_window_handle, Page(browser, address))
            pages[prompt][1].type(prompt)
        assert first in {handle for handle, _ in pages.values()}
        for handle, page in pages.values():
            browser.switch_to.window(handle)
            page.press("Start")
        for prompt, (handle, page) in pages.items():
            browser.switch_to.window(handle)
            assert page.finished().startswith(prompt)


def test_a_conversation(instruct, browser):
    with served(instruct, "--max_new_tokens=30") as address:
        on_a_phone(browser)
        page = Page(browser, address)
        for number, question in enumerate(("What does A cat see?", "And her bird?"), 1):
            box = browser.find_element(By.TAG_NAME, "textarea")
            box.send_keys(question, Keys.ENTER)

            def answered(number=number):
                answers = browser.find_elements(By.CSS_SELECTOR, ".message.bot, .bot.message")
                return len(answers) == number and answers[-1].text.strip()

            until(browser, answered)
            until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".stop-button"))
            assert question in browser.page_source
        assert page.fits()


def test_what_cannot_be_served(tmp_path, trained):
    assert "/nowhere" in refused("tools.demo", "--model=/nowhere")
    assert "--max_prompt=0" in refused("tools.demo", f"--model={trained}", "--max_prompt=0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port={port}" in refused("tools.demo", f"--model={trained}", f"--port={port}")
