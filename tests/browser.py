"""A page in headless Chromium, for tests of what people see: ``pytest_plugins = ["browser"]`` in their module.

Chromium is ``$CHROMIUM`` or what the PATH has; nothing is downloaded, and without it or playwright (extra ``browser``) the tests are
skipped. A page reaches loopback and files alone, and whatever its console calls an error fails its test.
"""

import os
import shutil
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",  # for what no page asks for, too
)  # fmt: skip


def loopback(url: str) -> bool:
    """Whether nothing outside of this machine is asked."""
    found = urlsplit(url)
    return found.scheme not in ("http", "https", "ws", "wss") or found.hostname in ("localhost", "127.0.0.1", "::1")


def launched(playwright):
    """Chromium, started with a profile of its own, which is gone when it is closed."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: install it, or name it by $CHROMIUM")
    return playwright.chromium.launch(executable_path=path, args=list(_FLAGS), chromium_sandbox=os.geteuid() != 0)


# Of a module and not of the session: playwright's loop runs in this thread for as long as it is open, and asyncio.run of other tests
# cannot run beside it.
@pytest.fixture(scope="module")
def browser():
    """Playwright's ``Browser``."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'reflective-kernels[browser]'")
    with sync_api.sync_playwright() as playwright:
        chromium = launched(playwright)
        yield chromium
        chromium.close()


@pytest.fixture
def errors():
    """What the pages' consoles called errors, what their scripts threw, and what they asked of the network. A test that means to see some
    looks at them and clears the list."""
    return []


@pytest.fixture
def page(browser, errors):
    """Playwright's ``Page`` of a fresh profile, 1280 x 800. ``page.context.new_page()`` opens another of the same."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, service_workers="block")
    context.set_default_timeout(120_000)  # ms; no measure of how fast a machine is

    def refuse(route):
        errors.append(f"asked for {route.request.url}")
        route.abort()

    context.route(lambda url: not loopback(url), refuse)
    context.on("console", lambda message: message.type == "error" and errors.append(message.text))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context.new_page()
    context.close()
    assert not errors, errors
