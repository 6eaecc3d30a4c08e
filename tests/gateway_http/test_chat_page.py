"""The chat page in a real browser: by keyboard, by its accessibility tree, in the dark."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from cluster.errors import NotReady
from cluster.gateway.access import Access
from tests.gateway_http.browser import WAIT_S, Page, chromium, new_page, running_browser
from tests.gateway_http.conftest import TWO_CALLS, Site, answer, finished, started, thought, thoughts_ended

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[str]:
    with running_browser() as address:
        yield address


@pytest.fixture
async def page(site: Site, browser: str) -> AsyncIterator[Page]:
    async with new_page(browser) as page:
        await page.open(site.url)
        yield page
        assert page.errors == []


async def ask(page: Page, text: str) -> None:
    """Type into what has the focus, and press Enter."""
    await page.type(text)
    await page.press("Enter")


FIGURES = "document.querySelectorAll('.figures').length"


async def test_a_question_asked_by_keyboard_alone_is_answered(site: Site, page: Page) -> None:
    await ask(page, "What is 2+2?")
    await page.until(FIGURES)

    assert site.asked.conversation.messages[0].content == "What is 2+2?"
    assert await page.text(".mine") == "What is 2+2?"
    assert await page.text(".answer") == "It is 4."
    assert await page.value("document.activeElement.id") == "question"


async def test_thoughts_are_folded_above_the_answer(page: Page) -> None:
    await ask(page, "What is 2+2?")
    await page.until(FIGURES)

    assert await page.value("document.querySelector('.thoughts').open") is False
    assert (await page.text(".thoughts summary")).startswith("Thought for ")
    assert await page.value("document.querySelector('.thoughts pre').textContent") == "Two and two."
    assert await page.value("document.querySelector('.turn').firstChild.className") == "thoughts"


async def test_figures_tell_speed_and_time_to_the_answer(page: Page) -> None:
    await ask(page, "What is 2+2?")
    await page.until(FIGURES)
    figures = await page.text(".figures")

    assert "First answer" in figures
    assert "tokens/s" in figures
    assert "5 tokens" in figures
    assert "3 tokens" in figures


async def test_the_next_question_brings_the_history_without_thoughts(site: Site, page: Page) -> None:
    await ask(page, "What is 2+2?")
    await page.until(FIGURES)
    await ask(page, "And 3+3?")
    await page.until(f"{FIGURES} === 2")

    turns = [(turn.role, turn.content, turn.reasoning_content) for turn in site.asked.conversation.messages]
    assert turns == [("user", "What is 2+2?", ""), ("assistant", "It is 4.", ""), ("user", "And 3+3?", "")]


@pytest.mark.parametrize("way", ["button", "key"])
async def test_stopping_cancels_the_generation_and_keeps_what_is_there(site: Site, page: Page, way: str) -> None:
    site.core.batches = [[started(), thought("hm"), thoughts_ended(), answer("It is")], asyncio.Event()]
    await ask(page, "What is 2+2?")
    await page.until("document.querySelector('.answer')?.textContent === 'It is'")
    await (page.click("#stop") if way == "button" else page.press("Escape"))
    await asyncio.wait_for(site.core.closed.wait(), WAIT_S)

    await page.until(FIGURES)
    assert await page.text(".answer") == "It is"
    assert "stopped by you" in await page.text(".figures")
    assert await page.value("document.getElementById('stop').hidden")


async def test_tool_calls_are_shown_and_their_results_go_back(site: Site, page: Page) -> None:
    site.core.batches = TWO_CALLS
    await ask(page, "Weather in Ulm, and the time?")
    await page.until("document.querySelectorAll('.call form').length === 2")
    shown = await page.text(".call")
    site.core.batches = [[started(), answer("Rain at noon.")], [finished()]]
    await ask(page, "rain")
    await page.value("document.querySelector('.call input').focus()")
    await ask(page, "12:00")
    await page.until("document.querySelectorAll('.answer')[1]?.textContent === 'Rain at noon.'")

    assert "weather" in shown
    assert '{"city": "Ulm"}' in shown
    turns = site.asked.conversation.messages
    assert [call.name for call in turns[1].tool_calls] == ["weather", "clock"]
    assert [(turn.role, turn.tool_call_id, turn.content) for turn in turns[2:]] == [
        ("tool", "call_0", "rain"),
        ("tool", "call_1", "12:00"),
    ]


async def test_the_budget_slider_moves_by_keyboard_and_is_sent(site: Site, page: Page) -> None:
    await page.value("document.getElementById('budget').focus()")
    await page.press("Home")
    assert await page.text("#budget-shown") == "none"
    await page.press("ArrowRight")
    assert await page.value("document.getElementById('budget').getAttribute('aria-valuetext')") == "32 tokens"
    await page.value("document.getElementById('question').focus()")
    await ask(page, "hi")
    await page.until(FIGURES)

    assert site.asked.thinking_budget == 32


async def test_an_error_is_announced_and_the_question_stays(site: Site, page: Page) -> None:
    site.core.batches = [NotReady("the ranks are loading")]
    await ask(page, "What is 2+2?")
    await page.until("document.querySelector('[role=alert]')")

    assert await page.text("[role=alert]") == "the ranks are loading"
    assert await page.value("document.getElementById('question').value") == "What is 2+2?"


async def test_markup_that_the_model_writes_stays_text(site: Site, page: Page) -> None:
    text = "<img src=x onerror=alert(1)> `a<b` **bold**\n```\n<script>\n```"
    site.core.batches = [[started(), answer(text)], [finished()]]
    await ask(page, "hi")
    await page.until(FIGURES)

    assert await page.value("document.querySelectorAll('.answer img, .answer script').length") == 0
    assert await page.value("[...document.querySelectorAll('.answer code')].map(e => e.textContent)") == [
        "a<b",
        "<script>",
    ]
    assert "<img src=x" in await page.text(".answer")


async def test_every_control_has_a_name_and_news_are_live(page: Page) -> None:
    await ask(page, "What is 2+2?")
    await page.until(FIGURES)
    await page.value("document.querySelector('.settings').open = true")
    tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]

    roles = {"button", "textbox", "slider", "spinbutton", "DisclosureTriangle", "link"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles and not node["ignored"]]
    assert len(controls) >= 8
    assert [node for node in controls if not node["name"]["value"]] == []
    assert await page.value("document.querySelector('[aria-live=polite]').textContent") == "It is 4."


async def test_the_page_is_dark_where_the_reader_wants_it(page: Page) -> None:
    async def brightness() -> int:
        colour = await page.value("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    light = await brightness()
    await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])

    assert light > 600
    assert await brightness() < 150


async def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    reply = await site.client.get("/")

    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert "https://" not in reply.text
    assert " src=" not in reply.text


async def test_a_key_that_was_entered_goes_with_every_request(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str | None] = []
    caller = Access.caller
    monkeypatch.setattr(
        Access, "caller", lambda self, authorization: [shown.append(authorization), caller(self, authorization)][1]
    )

    await ask(page, "What is 2+2?")
    await page.until(FIGURES)
    await page.value("document.getElementById('key').value = 'mull-a-b'")
    await ask(page, "And 3+3?")
    await page.until(f"{FIGURES} === 2")

    assert (shown[0], shown[-1]) == (None, "Bearer mull-a-b")
