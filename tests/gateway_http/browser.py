"""A headless Chromium, driven by its DevTools protocol over a websocket."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.request import Request, urlopen

import websockets.asyncio.client

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage",
    "--no-first-run", "--remote-debugging-port=0", "--window-size=1100,900",
)  # fmt: skip
WAIT_S = 60.0
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Home": (36, ""), "ArrowRight": (39, "")}


def chromium() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def running_browser() -> Iterator[str]:
    """A browser of its own; gives the HTTP address of its DevTools."""
    path = chromium()
    assert path is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            assert process.stderr is not None
            # It prints others' complaints first; at its end the pipe closes.
            line = next((line for line in process.stderr if "DevTools listening on ws://" in line), None)
            assert line is not None, f"{path} ended with {process.wait(WAIT_S)}"
            yield "http://" + line.split("ws://")[1].split("/")[0]
        finally:
            process.kill()
            process.communicate()


class Page:
    """One tab."""

    def __init__(self, socket: websockets.asyncio.client.ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.errors: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        number = next(self._numbers)
        await self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(WAIT_S):
            while True:
                message = json.loads(await self._socket.recv())
                if message.get("method") == "Runtime.exceptionThrown":
                    self.errors.append(str(message["params"]["exceptionDetails"]))
                if message.get("id") == number:
                    assert "error" not in message, message
                    return message["result"]

    async def open(self, url: str) -> None:
        await self.call("Runtime.enable")
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && document.getElementById('model')?.textContent")

    async def value(self, expression: str) -> Any:
        """What a JavaScript expression is."""
        done = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait in the page, frame by frame, until an expression is true."""
        promise = (
            f"new Promise((ok, no) => {{ const end = performance.now() + {WAIT_S * 900}; const look = () => {{ "
            f"const value = ({expression}); if (value) ok(value); else if (performance.now() > end) "
            f"no(new Error('waited for ' + {json.dumps(expression)} + ' in ' + document.body?.innerText)); "
            "else setTimeout(look, 10); }; look(); })"
        )
        return await self.value(promise)

    async def text(self, selector: str) -> str:
        return str(await self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def click(self, selector: str) -> None:
        await self.value(f"document.querySelector({json.dumps(selector)}).click()")

    async def screenshot(self) -> bytes:
        """What it looks like, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])


@asynccontextmanager
async def new_page(browser: str) -> AsyncIterator[Page]:
    """A new tab, closed in the end."""
    made = await asyncio.to_thread(_new_target, browser)
    async with websockets.asyncio.client.connect(made["webSocketDebuggerUrl"], max_size=None) as socket:
        page = Page(socket)
        yield page
        await page.call("Page.close")


def _new_target(browser: str) -> Any:
    with urlopen(Request(f"{browser}/json/new?about:blank", method="PUT"), timeout=WAIT_S) as reply:
        return json.load(reply)
