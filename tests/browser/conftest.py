"A real browser: Debian's Chromium, driven by Playwright. Without either of them these tests are skipped, and say so. Pictures of what they saw are kept in _run/screens."
import shutil
from pathlib import Path
import pytest

SCREENS = Path(__file__).resolve().parents[2] / "_run" / "screens"

@pytest.fixture(scope="session")
def browser():
    "Chromium, headless. It reaches this machine only: any other address fails at once."
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path: pytest.skip("no Chromium here: apt install chromium")
    with api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"])
        yield chromium
        chromium.close()

@pytest.fixture
def page(browser):
    "A fresh page that collects the errors of its scripts in `page.errors`, and asserts at the end that there were none."
    context = browser.new_context(viewport={"width": 900, "height": 1000})
    page = context.new_page(); page.errors = []; page.set_default_timeout(20_000)
    page.on("pageerror", lambda err: page.errors.append(str(err)))
    yield page
    context.close()
    assert not page.errors

@pytest.fixture(scope="session")
def screen():
    "screen(page, name): keep a picture of the page for people to look at."
    SCREENS.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=SCREENS / f"{name}.png")
