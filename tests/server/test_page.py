"""The page, in a real browser: Debian's chromium without a window."""

import base64
import hashlib
import re
import shutil

import pytest

from tests.server.harness import serving, wait_until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_what_the_page_may_do(server):
    """Without a browser: nothing from elsewhere, and no other script than its own."""
    status, headers, body = server.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    content = body.decode()
    for element, name in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{element}>(.*?)</{element}>", content, re.DOTALL)
        assert policy[name] == f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"
    assert "innerHTML" not in content
    assert not re.search(r"https?://|\son\w+=|\sstyle=", content)
    assert b"tiny" not in body  # it is served without the key


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    """An empty page; what it tells as a fault or as against the policy ends the test."""
    context = browser.new_context()
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    yield page
    context.close()
    assert faults == []


def state_of(page, text):
    page.wait_for_function("text => document.getElementById('state').textContent.includes(text)", arg=text)
    return page.locator("#state").text_content()


def test_a_text_is_made_as_the_settings_say(page, server):
    page.goto(server.url)
    page.get_by_label("Prompt").fill("<b>ab</b>")
    page.get_by_label("Tokens at most").fill("30")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Generate").click()
    assert re.match(r"Done: \d+ tokens, ", state_of(page, "Done"))
    _, answer = server.complete(prompt="<b>ab</b>", max_tokens=30, temperature=0, top_p=0.95)
    # A browser shows some characters otherwise; all but those are the same.
    made = page.locator("#made").text_content()
    assert made == answer["choices"][0]["text"]
    assert page.locator("#given").text_content() == "<b>ab</b>"
    assert page.locator("#answer b").count() == 0
    assert page.locator("#model").text_content() == " on tiny"


def test_by_keyboard_alone(page, server, pace):
    pace.delay = 0.02
    page.goto(server.url)
    page.keyboard.press("Tab")
    page.keyboard.type("ab")
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed", "key"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == name
        assert page.evaluate("document.activeElement.labels.length") == 1
        if name == "max_tokens":
            page.keyboard.press("End")
            assert page.locator("output[for=max_tokens]").text_content() == "1000"
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => document.getElementById('made').textContent.length > 0")
    assert page.locator("#answer").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    state_of(page, "Stopped.")
    wait_until(lambda: server.is_idle)
    # And once more, with the buttons.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "generate"
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.getElementById('made').textContent.length > 0")
    page.locator("#stop").click()
    state_of(page, "Stopped.")
    wait_until(lambda: server.is_idle)


def test_a_mistake_is_told(page, server):
    page.goto(server.url)
    page.get_by_label("Prompt").fill("a" * 65)
    page.get_by_role("button", name="Generate").click()
    assert "64 tokens, got 65" in state_of(page, "shorten")
    assert page.locator("#state").get_attribute("class") == "bad"


def test_the_key_is_asked_for(page, made):
    with serving(made, sizes=(1,), api_key=b"secret") as server:
        page.goto(server.url)
        page.get_by_role("button", name="Generate").click()
        assert "asks for its key" in state_of(page, "key")
        page.get_by_label("Key").fill("secret")
        page.get_by_role("button", name="Generate").click()
        state_of(page, "Done")


def luminance(color):
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(page, server, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(server.url)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for element in ("#prompt", "#made", "label", "#state"):
        ink = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).color")
        low, high = sorted((luminance(ink), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) > 7
