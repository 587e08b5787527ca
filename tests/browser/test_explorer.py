"JupyterLab on this machine: the chapter with slider and explorer is run from the browser; a slider of the explorer is moved, a picture uploaded, two codes compared."
import io, shutil, sys
from pathlib import Path
import pytest
import lab

ROOT = Path(__file__).resolve().parents[2]

@pytest.fixture(scope="module")
def chapter(tmp_path_factory, browser):
    "The address of a copy of the chapter in a JupyterLab, and its folder."
    pytest.importorskip("jupyterlab", reason="jupyterlab is not installed: pip install 'disdiff-tutorial[notebooks]'")
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"; work.mkdir()
    shutil.copy(ROOT / "nbs" / "01_show.ipynb", work)
    with lab.serve(work, home, sys.executable, OMP_NUM_THREADS="1", DISDIFF_SCALE="smoke") as address: yield address("01_show.ipynb"), work

def disc_file(shift):
    "A disc as a PNG file of 96 x 64 pixels: larger than the model's, and not square."
    import numpy as np
    from PIL import Image
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 96), np.linspace(-1, 1, 64))
    file = io.BytesIO(); Image.fromarray(((np.hypot(x - shift, y) < .5) * 200).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()

def test_the_chapter_runs_and_its_sliders_and_explorer_obey(page, screen, chapter):
    address, work = chapter
    page.set_default_timeout(150_000)
    lab.open_notebook(page, address)
    lab.run_all(page)
    page.wait_for_function(r"() => /\[\d+\]/.test([...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].at(-1).textContent)")     # all cells are done
    slider, canvas = page.get_by_role("slider", name="brightness").first, page.locator(".disdiff-slider canvas").nth(1)
    before = canvas.evaluate("c => c.toDataURL()")
    slider.press("ArrowRight")                                                                     # the slider's script runs in a trusted notebook
    assert canvas.evaluate("c => c.toDataURL()") != before
    screen(page, "slider-jupyterlab")

    widget = page.locator(".jp-OutputArea-output .widget-hbox").filter(has=page.locator(".noUi-handle")).first
    says = widget.locator(".widget-label", has_text="drawn in")
    says.wait_for(); widget.scroll_into_view_if_needed()

    def pixels():
        "The red of the picture in the widget, 0 to 255."
        return widget.locator("img").evaluate("""i => { const c = document.createElement("canvas"), t = c.getContext("2d"); c.width = i.naturalWidth; c.height = i.naturalHeight; t.drawImage(i, 0, 0);
            return Array.from(t.getImageData(0, 0, c.width, c.height).data).filter((_, k) => k % 4 == 0) }""")

    def apart(a, b): return max(abs(x - y) for x, y in zip(a, b)) if len(a) == len(b) else 255

    def changed(do):
        "Do something, and wait for another picture."
        source = widget.locator("img").get_attribute("src")
        do()
        page.wait_for_function("([img, old]) => img.src != old && img.complete", arg=[widget.locator("img").element_handle(), source])
        return pixels()

    changed(lambda: widget.get_by_role("button", name="reset").click())
    start = pixels()
    handle = widget.get_by_role("slider").nth(0)
    assert apart(changed(lambda: handle.press("End")), start) > 50                               # keyboard
    screen(page, "explorer")
    changed(lambda: handle.press("ArrowLeft"))
    assert apart(changed(lambda: widget.get_by_role("button", name="reset").click()), start) <= 12  # the page rounds values to the steps of the slider, a hundredth of its range
    with page.expect_file_chooser() as chooser: widget.get_by_role("button", name="own picture").click()
    changed(lambda: chooser.value.set_files(dict(name="disc.png", mimeType="image/png", buffer=disc_file(.4))))
    assert "own picture | A" in says.text_content()
    changed(lambda: widget.get_by_role("button", name="compare with B").click())
    changed(lambda: widget.get_by_role("button", name="randomise").click())
    assert "own picture | A | B" in says.text_content()
    screen(page, "explorer-compare")
    with page.expect_file_chooser() as chooser: widget.get_by_role("button", name="own picture").click()
    chooser.value.set_files(dict(name="words.png", mimeType="image/png", buffer=b"no picture"))
    widget.get_by_text("ValueError: expected a picture (PNG, JPEG, ...) in words.png").wait_for()
    widget.get_by_role("button", name="save").click()
    widget.get_by_text("written to picture-1.png").wait_for()
    assert (work / "picture-1.png").read_bytes()[:4] == b"\x89PNG"
