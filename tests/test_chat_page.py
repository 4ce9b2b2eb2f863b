"""The chat page in a real browser: headless Chromium, driven by playwright."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import candle_llama

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

MARKUP = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>'


@pytest.fixture(scope="module")
def url(demo_llm: candle_llama.Llama) -> Iterator[str]:
    from candle_llama.server import build_app

    app = build_app(demo_llm, served_model_name="smol")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    until(page, "document.title === 'smol'")
    yield page
    context.close()
    # Among others, the browser reports what the content security policy forbids.
    assert complaints == []


def until(page: Any, condition: str) -> None:
    """Waits for a condition. playwright's own function evaluates text, which the page's policy forbids."""
    end = time.monotonic() + 20
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.01)


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.press("#question", "Enter")


def answered(page: Any) -> str:
    until(page, "!document.getElementById('send').disabled && document.querySelector('.assistant')")
    return str(page.locator(".assistant").last.text_content())


def test_an_answer_streams_and_the_conversation_goes_on(page, demo_llm):
    page.locator("summary").click()
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "24")
    question = "What is the capital of France?"
    ask(page, question)
    first = answered(page)
    messages = [{"role": "user", "content": question}]
    expected = demo_llm.chat(messages, temperature=0, max_new_tokens=24)
    assert first == expected.text
    assert "Paris" in first
    assert "tokens/s" in page.locator(".note").last.text_content()
    ask(page, "And of Italy?")
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Italy?"}]
    until(page, "document.querySelectorAll('.assistant').length === 2")
    assert answered(page) == demo_llm.chat(messages, temperature=0, max_new_tokens=24).text
    page.click("#fresh")
    assert page.locator(".message").count() == 0


def test_text_appears_while_it_is_generated_and_stop_ends_it(page, demo_llm):
    def endless(route):
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), "ignore_eos": True}))

    page.route("**/v1/chat/completions", endless)
    page.locator("summary").click()
    page.fill("#max_tokens", "8000")
    ask(page, "Count from one to one thousand.")
    until(page, "document.querySelector('.assistant')?.textContent.length > 20")
    assert page.locator("#send").is_disabled()
    page.click("#stop")
    text = answered(page)
    assert page.locator(".note").last.text_content() == "stopped"
    end = time.monotonic() + 2
    while demo_llm.metrics().running and time.monotonic() < end:
        time.sleep(0.01)
    assert demo_llm.metrics().running == 0
    assert page.locator(".assistant").last.text_content() == text


def test_escape_stops_and_the_question_comes_back(page):
    page.route("**/v1/chat/completions", lambda route: None)
    ask(page, "a question\nof two lines")
    page.keyboard.press("Escape")
    until(page, "!document.getElementById('send').disabled")
    assert page.input_value("#question") == "a question\nof two lines"


def test_markup_stays_text(page):
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": MARKUP}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    ask(page, MARKUP)
    assert answered(page) == MARKUP
    assert page.locator(".user").last.text_content() == MARKUP
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "smol"


def test_an_error_is_shown_and_the_question_comes_back(page):
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            status=200,
            body='data: {"error": {"message": "out of luck"}}\n\n',
            content_type="text/event-stream",
        ),
    )
    ask(page, "hello")
    until(page, "document.querySelector('.error')")
    assert page.locator(".error").text_content() == "out of luck"
    assert page.input_value("#question") == "hello"


def test_it_fits_a_phone_and_changes_its_theme(page):
    page.set_viewport_size({"width": 360, "height": 640})
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != before


def test_the_page_allows_nothing_else(url):
    import httpx

    response = httpx.get(url)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "//" not in response.text.split("<script>")[0], "nothing is loaded from elsewhere"
