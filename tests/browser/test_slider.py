"Sliders on a page opened from disk: keyboard and mouse move every one of them and its pictures, and nothing else."
import pytest, torch
from disdiff_tutorial import show

LABELS = ["radius", "brightness", "place"]

def disc(z):
    xs = torch.linspace(-1, 1, 32)
    r, b, s = z.T[:, :, None, None]
    return (torch.sigmoid(20 * (r - ((xs[None, None] - s) ** 2 + xs[None, :, None] ** 2).sqrt())) * b * 2 - 1)[:, None]

@pytest.fixture(scope="module")
def sliders():
    values = torch.linspace(.1, .9, 9)
    plain = show.slider(show.traversal(disc, torch.tensor([[.4, .9, -.3], [.6, .6, .2]]), values), values, LABELS)
    pairs = torch.cartesian_prod(values, values[::2])
    joint = show.slider(disc(torch.stack([pairs[:, 1], pairs[:, 0], torch.zeros(45)], 1)).unflatten(0, (9, 5)), (values, values[::2]), ["brightness", "radius"], joint=True, start=(8, 0))
    return plain, joint

def pictures(page): return page.eval_on_selector_all(".disdiff-slider canvas", "all => all.map(c => c.toDataURL())")

def move(page, slider, how):
    "Move a slider and return which pictures of the page changed."
    before = pictures(page)
    how(slider)
    return [a != b for a, b in zip(before, pictures(page))]

def to_the_end(slider):
    box = slider.bounding_box()
    slider.page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)

def test_keyboard_and_mouse_move_each_slider(page, screen, sliders, tmp_path):
    page.goto(sliders[0].save(tmp_path / "plain.html").as_uri())
    page.wait_for_selector(".disdiff-slider canvas >> nth=2")
    screen(page, "slider")
    for i, label in enumerate(LABELS):
        slider, only = page.get_by_role("slider", name=label), [j == i for j in range(3)]
        assert slider.get_attribute("aria-valuetext") == "0.50"
        page.keyboard.press("Tab")                                                      # reached without a mouse
        assert slider.evaluate("s => s === document.activeElement")
        assert move(page, slider, lambda s: s.press("ArrowRight")) == only
        assert page.locator("output").nth(i).text_content() == slider.get_attribute("aria-valuetext") == "0.60"
        assert move(page, slider, to_the_end) == only
        assert page.get_by_role("img", name=f"{label} at 0.90").count() == 1
    screen(page, "slider-moved")

def test_two_sliders_on_one_picture(page, screen, sliders, tmp_path):
    page.goto(sliders[1].save(tmp_path / "joint.html").as_uri())
    canvas = page.get_by_role("img", name="brightness at 0.90, radius at 0.10"); canvas.wait_for()
    assert move(page, page.get_by_role("slider", name="radius"), lambda s: s.press("End")) == [True]
    assert move(page, page.get_by_role("slider", name="brightness"), lambda s: s.press("Home")) == [True]
    assert page.get_by_role("img", name="brightness at 0.10, radius at 0.90").count() == 1
    screen(page, "slider-joint")

def test_the_picture_is_the_frame(page, sliders, tmp_path):
    "What stands on the page is the frame that was asked for, pixel by pixel."
    page.goto(sliders[1].save(tmp_path / "joint.html").as_uri())
    page.wait_for_selector("canvas")
    page.get_by_role("slider", name="radius").press("End")
    shown = page.evaluate("() => { const c = document.querySelector('canvas'); return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).filter((_, i) => i % 4 == 0) }")
    assert shown == show.to_uint8(disc(torch.tensor([[.9, .9, 0.]]))).flatten().tolist()

def test_several_on_one_page_do_not_clash(page, sliders, tmp_path):
    "Two sliders, and the first once more: each canvas obeys its own range."
    (tmp_path / "many.html").write_text("<meta charset=utf-8>" + "".join(s.html for s in (*sliders, sliders[0])))
    page.goto((tmp_path / "many.html").as_uri())
    page.wait_for_selector("canvas >> nth=6")
    ranges = page.locator("input[type=range]")
    owner = [0, 1, 2, 3, 3, 4, 5, 6]
    assert ranges.count() == len(owner)
    for i, own in enumerate(owner): assert move(page, ranges.nth(i), lambda s: s.press("ArrowLeft" if own == 3 and i == 3 else "ArrowRight")) == [j == own for j in range(7)]

def test_without_script_all_pictures_are_there(browser, sliders, tmp_path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(sliders[0].save(tmp_path / "plain.html").as_uri())
    image = page.get_by_role("img", name="All pictures at once: radius, brightness, place, 9 steps")
    assert image.is_visible() and image.bounding_box()["width"] == 9 * 34 - 2 and page.locator("input").count() == 0
    context.close()

def test_on_a_phone_in_the_dark(browser, screen, sliders, tmp_path):
    "Nothing sticks out of a narrow page; the text takes the page's colour."
    context = browser.new_context(viewport={"width": 320, "height": 700}, color_scheme="dark")
    page = context.new_page()
    (tmp_path / "dark.html").write_text(f"<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'><body style='background:#222;color:#eee'>{sliders[0].html}")
    page.goto((tmp_path / "dark.html").as_uri())
    page.wait_for_selector("canvas")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.locator("label").first.evaluate("l => getComputedStyle(l).color") == "rgb(238, 238, 238)"
    screen(page, "slider-phone-dark")
    context.close()

def test_on_paper_all_pictures_are_there(page, sliders, tmp_path):
    page.goto(sliders[0].save(tmp_path / "plain.html").as_uri())
    page.wait_for_selector("canvas")
    image = page.locator(".disdiff-slider img")
    assert image.is_hidden()
    page.emulate_media(media="print")
    assert image.is_visible() and page.locator("canvas").first.is_hidden()
