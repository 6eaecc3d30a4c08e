"""Writes mull/client/sync.py from mull/client/aio.py, the one source of both. With --check: fails where it is stale.

Lines between `# async only` and `# end` are left out, and `# sync: …` is uncommented; the rest is words.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLIENT = Path(__file__).parent / "mull" / "client"
WORDS = {
    "AsyncClient": "Client",
    "AsyncReply": "Reply",
    "AsyncIterator": "Iterator",
    "async def": "def",
    "async for": "for",
    "async with": "with",
    "await it, or iterate": "iterate",
    "await ": "",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "__aiter__": "__iter__",
    "aclose": "close",
    "import asyncio": "import time",
    "asyncio.sleep": "time.sleep",
    "grpc.aio.": "grpc.",
    "import grpc.aio\n": "",
    "several tasks": "several threads",
    "Callable, Generator, Sequence": "Callable, Iterator, Sequence",
    "Iterator, Callable, Iterator": "Callable, Iterator",
}
HEAD = '"""Client: every call of mull, for threads. proto/generate_sync_client.py makes it of aio.py."""'


def synchronous(source: str) -> str:
    """The text of sync.py."""
    source = re.sub(r"^ *# async only\n.*?^ *# end\n", "", source, flags=re.MULTILINE | re.DOTALL)
    source = re.sub(r"# sync: ", "", source)
    for word, other in WORDS.items():
        source = source.replace(word, other)
    return HEAD + source[source.index("\n") :]


def main() -> int:
    target = CLIENT / "sync.py"
    made = synchronous((CLIENT / "aio.py").read_text())
    if sys.argv[1:] == ["--check"]:
        if target.read_text() != made:
            print("proto/mull/client/sync.py is stale: run 'make proto'", file=sys.stderr)
            return 1
        return 0
    target.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
