"""The page, in a browser, as people use it."""

import contextlib
import itertools
import math
import re
import shutil
import socket
import subprocess
import time

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


def served(model, *args):
    """The address of a page that tools.demo serves for a while."""
    return served_by(command("tools.demo", f"--model={model}", *args))


@contextlib.contextmanager
def served_by(line, folder=ROOT):
    """The address of the page that a command, run in a folder, serves for a while."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = environment(GRADIO_SERVER_PORT=port)
    process = subprocess.Popen(line, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert any(f"127.0.0.1:{port}" in line for line in process.stdout), "it ended before it served"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Page:
    """The page of one person, in a window of the browser."""

    def __init__(self, browser, address):
        self.browser, self.window, self.address = browser, browser.current_window_handle, address
        self.open()

    def open(self):
        self.browser.get(self.address)
        self.until(lambda: self.all("textarea"))

    def until(self, condition):
        return WebDriverWait(self.browser, 60, 0.1, [StaleElementReferenceException]).until(lambda _: condition())

    def all(self, selector):
        """The elements in sight."""
        by = By.XPATH if selector.startswith("//") else By.CSS_SELECTOR
        return [element for element in self.browser.find_elements(by, selector) if element.is_displayed()]

    def shows(self, words):
        self.until(lambda: re.search(words, self.browser.page_source))

    def box(self, label):
        return self.browser.find_element(By.XPATH, f"//label[.//span[normalize-space()='{label}']]//textarea")

    def type(self, text, label="Prompt"):
        self.box(label).send_keys(Keys.CONTROL, "a")
        self.box(label).send_keys(text)

    def press(self, *names):
        for name in names:
            self.all(f"//button[normalize-space()='{name}']")[0].click()

    def text(self, label="Text"):
        return self.box(label).get_property("value")

    def finished(self):
        """The text, once it does not change any more."""

        def twice():
            before = self.text()
            time.sleep(1)
            return before if before and before == self.text() else None

        return self.until(twice)

    def write(self, prompt, least=1):
        """A text that the page, opened anew, has written to its end; below it stand the tokens that it is made of.

        Tokens are drawn: a text that ended before it had enough characters beyond its prompt is written again, and one
        with a special token, which only the tokens show.
        """

        def once():
            self.open()
            self.type(prompt)
            self.press("Start")
            self.until(self.tokens)  # at its end
            return len(text := self.text()) >= len(prompt) + least and text == self.read_tokens() and text

        return self.until(once)

    def tokens(self):
        return self.all(".tokens .score-token .text")

    def read_tokens(self):
        return "".join(token.get_property("textContent") for token in self.tokens()).replace("\u21b5", "")

    def fits_a_phone(self):
        phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        return self.browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    flags = "headless no-sandbox disable-gpu disable-background-networking disable-component-update disable-sync"
    for flag in (*flags.split(), "no-first-run", f"user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A model whose card suggests another prompt than the default."""
    folder = shutil.copytree(trained / "checkpoint-000040", tmp_path_factory.mktemp("demo") / "model")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("Once upon a time", "8: The old dog"))
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with served(folder, "--max_prompt=50", "--max_new_tokens=30") as address:
        yield address


def test_type_and_read(address, browser):
    page = Page(browser, address)
    assert page.text("Prompt") == "8: The old dog"
    text = page.write("7: A cat")
    assert text.startswith("7: A cat")
    page.until(lambda: page.write("7: A cat") != text)  # the same prompt again: another text
    page.tokens()[0].click()
    page.shows(r"cost [\d.]+ bits")
    page.press("The capital of France is")  # an example
    page.until(lambda: page.text("Prompt") == "The capital of France is")
    page.press("Stop")  # when nothing runs: nothing happens
    time.sleep(2)
    page.shows(r"cost [\d.]+ bits")
    assert not page.all(".toast-body, .progress-text, .generating")
    past_the_limit = """const box = arguments[0]; box.removeAttribute("maxlength"); box.value = "x".repeat(51);
                        box.dispatchEvent(new Event("input", {bubbles: true}))"""
    browser.execute_script(past_the_limit, page.box("Prompt"))
    page.press("Start")
    page.shows("51 characters are too many")
    assert page.fits_a_phone()
    urls = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert urls and all(url.startswith((address, "data:", "blob:")) for url in urls)


def test_what_else_was_expected(folder, address, browser):
    """Each token of a text shows its candidates on a click; a text that was typed has its bits per byte."""
    writer, tokenizer, _ = sample.load(sample.Settings(model=str(folder)))
    page = Page(browser, address)
    assert browser.title == "SmolLM2: model" and page.all("//h1")[0].text == "model"
    page.shows(r"\b[\d,]+ parameters, trained on 10,240 tokens of talk.jsonl. It continues what you type.")
    text = page.write("8: The old dog", least=7)
    page.shows("tokens per second, the first after")
    place = len(tokenizer.encode("8: The old").ids)
    page.tokens()[place].click()
    page.shows(r"cost [\d.]+ bits")
    _, likeliest = demo.predictions(writer.model, tokenizer.encode(text).ids)[place]
    shown = browser.find_elements(By.CSS_SELECTOR, ".confidence-set")
    assert len(shown) == 5
    for row, (probability, token) in zip(shown, likeliest, strict=True):
        assert row.text.split()[0] == demo.spell(tokenizer, token), row.text
        assert f"{100 * probability:.0f}%" in row.text
    page.press("Surprise", "Look")
    bits = sum(bits for bits, _ in demo.predictions(writer.model, tokenizer.encode("8: The old dog").ids))
    page.shows(f"{bits / len('8: The old dog'):.2f} bits per byte")
    assert page.read_tokens() == "8: The old dog"
    page.shows("0 bits.*12 bits or more")
    assert page.fits_a_phone()
    page.type(lines := "A cat\n" * 7 + "A dog", "A text")
    page.press("Look")
    page.until(lambda: page.read_tokens() == lines)
    boxes = [token.rect for token in page.tokens()]
    gaps = [right["x"] - left["x"] - left["width"] for left, right in itertools.pairwise(boxes)]
    assert max(gaps) < 3, "gaps between tokens look like spaces"
    assert boxes[-1]["y"] > boxes[0]["y"] + 10, "a line break does not break the line"
    page.tokens()[0].click()
    bottom = "return arguments[0].getBoundingClientRect().bottom <= window.innerHeight"
    page.until(lambda: (rows := page.all(".confidence-set")) and browser.execute_script(bottom, rows[-1]))
    page.type(Keys.DELETE, "A text")
    page.press("Look")
    page.until(lambda: not page.tokens())
    assert not page.all(".toast-body")


def test_two_people_at_once_do_not_mix(address, browser):
    pages = {}
    for prompt in ("1: A cat", "2: Her bird"):
        if pages:
            browser.switch_to.new_window("window")
        pages[prompt] = Page(browser, address)
        pages[prompt].type(prompt)
    assert len({page.window for page in pages.values()}) == 2
    for page in pages.values():
        browser.switch_to.window(page.window)
        page.press("Start")
    for prompt, page in pages.items():
        browser.switch_to.window(page.window)
        assert page.finished().startswith(prompt)


def test_two_models_side_by_side(trained, browser):
    folders = [trained / f"checkpoint-0000{step}" for step in (20, 40)]
    with served(folders[0], f"--compare={folders[1]}", "--prompt=7: A cat", "--max_new_tokens=30") as address:
        page = Page(browser, address)
        page.press("Start")

        def texts():
            return [page.text(f"Text: {demo.short_name(str(folder))}") for folder in folders]

        page.until(lambda: len(page.all(".tokens")) == 2)  # both are at their ends
        assert all(text.startswith("7: A cat") for text in texts()) and page.read_tokens().count("7: A cat") >= 2
        page.press("Surprise", "Look")
        page.until(lambda: browser.page_source.count("bits per byte") == 2)


@pytest.mark.parametrize("name", ["trained", "instruct"])
def test_predictions_are_those_of_the_model(name, request):
    """Of a document, also for a model whose bos_token_id begins a message."""
    model = request.getfixturevalue(name)
    writer, tokenizer, _ = sample.load(sample.Settings(model=str(model), dtype="float32"))
    ids = tokenizer.encode(text := "7: A cat sees \u00e9t\u00e9. " * 4).ids
    found = demo.predictions(writer.model, ids)
    with torch.no_grad():
        logs = writer.model(torch.tensor([[0, *ids[:-1]]]))[0].log_softmax(-1)
    for (bits, likeliest), row, id in zip(found, logs, ids, strict=True):
        assert bits == pytest.approx(-row[id].item() / math.log(2), abs=1e-4)
        assert [token for _, token in likeliest] == row.topk(5).indices.tolist()
        assert [p for p, _ in likeliest] == pytest.approx(row.exp().topk(5).values.tolist(), abs=1e-5)
    shown = demo.pieces(tokenizer, ids, found)
    assert "".join(piece for piece, *_ in shown) == text
    assert sum(bits for _, bits, *_ in shown) == pytest.approx(sum(bits for bits, _ in found))
    with pytest.raises(ValueError, match="max_position_embeddings"):
        demo.predictions(writer.model, ids * 20)


def test_stop(trained, browser, tmp_path):
    """A model that writes for minutes, because its end token is none of its vocabulary."""
    torch.manual_seed(0)
    shape = dict(hidden_size=192, intermediate_size=512, num_attention_heads=3, num_key_value_heads=1)
    SmolLM2(SmolLM2Config(vocab_size=300, eos_token_id=300, **shape)).save_pretrained(tmp_path)
    shutil.copy(trained / "checkpoint-000040" / "tokenizer.json", tmp_path)
    with served(tmp_path, "--prompt=A cat", "--max_new_tokens=8000") as address:
        page = Page(browser, address)
        browser.find_element(By.XPATH, "//button[contains(., 'Choices')]").click()
        (length,) = page.until(lambda: page.all("//input[@type='number' and @max='8000']"))
        length.send_keys(Keys.CONTROL, "a")
        length.send_keys("8000", Keys.TAB)
        page.press("Start")
        page.until(lambda: len(page.text()) > 40)
        grown = len(page.text())
        page.until(lambda: len(page.text()) > grown)
        page.press("Stop")
        assert len(page.finished()) < 6000
        page.type("The old dog")
        page.press("Start")  # what was stopped is not in the way of the next
        page.until(lambda: page.text().startswith("The old dog") and len(page.text()) > 40)


def test_a_conversation(instruct, browser):
    with served(instruct, "--max_new_tokens=30") as address:
        page = Page(browser, address)
        assert page.fits_a_phone()
        page.shows("parameters. It answers; what it says need not be true.")
        page.press("Why is the sky blue?")  # an example
        page.until(lambda: any(answer.text.strip() for answer in page.all(".message.bot, .bot.message")))
        page.until(lambda: not page.all(".stop-button"))
        (choices,) = page.all("//button[contains(., 'Choices')]")
        choices.click()
        page.until(lambda: page.all("//input[@type='number' and @max='2']"))
        for number, question in enumerate(("What does A cat see?", "And her bird?"), 2):
            page.all("textarea")[0].send_keys(question, Keys.ENTER)
            page.until(lambda number=number: len(page.all(".message.bot, .bot.message")) == number)
            page.until(lambda: page.all(".message.bot, .bot.message")[-1].text.strip())
            page.until(lambda: not page.all(".stop-button"))
            assert question in browser.page_source
        assert page.fits_a_phone()


def test_names_and_descriptions(trained, tmp_path):
    """Of a run, a checkpoint, a hub id; of a model without a card, a published one, one that began from another."""
    names = [demo.short_name(str(name)) for name in (trained, f"{trained}/checkpoint-000040/", "someone/model")]
    assert names == ["run", "run, step 40", "someone/model"]
    config, card = SmolLM2Config(), tmp_path / "README.md"
    says = "134,515,008 parameters{}. It continues what you type.".format
    assert demo.describe(config, tmp_path, None) == says("")
    card.write_text("---\n: [\n---\n")
    assert demo.describe(config, tmp_path, None) == says("")
    card.write_text("---\ndatasets: [someone/texts]\nwidget:\n- messages: [{role: user, content: 'Why?'}]\n---\n")
    assert demo.describe(config, tmp_path, None) == says(", trained on someone/texts")
    card.write_text("---\nbase_model: [someone/model]\n---\nA published one.\n")
    assert demo.describe(config, tmp_path, None) == says(", from the weights of someone/model")
    card.write_text("---\ndatasets: [someone/texts]\nwidget:\n- messages: [{role: user, content: 'Why?'}]\n---\n")
    assert demo.sample_prompt(tmp_path) == "Why?"
    mix = "someone/texts, a.parquet at 0123456, 90.0% of the mix<br>b.txt, 10.0% of the mix"
    rows = f"| data | {mix} |\n| tokens trained on | 2,048, in 2 steps |\n"
    card.write_text(f"A language model, from the weights of other. It continues texts.\n\n| | |\n|---|---|\n{rows}")
    trained_on = ", from the weights of other, trained on 2,048 tokens of someone/texts, b.txt"
    assert demo.describe(config, tmp_path, None) == says(trained_on)
    assert demo.sample_prompt(tmp_path) is None


def test_what_cannot_be_served(trained, instruct):
    with pytest.raises(SystemExit, match="/nowhere"):
        demo.build_page(demo.Settings(model="/nowhere"))
    with pytest.raises(SystemExit, match="--compare is for models that continue texts"):
        demo.build_page(demo.Settings(model=str(instruct), compare=str(trained)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for option in (f"--port={port}", "--port=99999", "--host=192.0.2.1"):
            assert option in refused("tools.demo", f"--model={trained}", option)
