"""The pictures of docs/view.md: ``python docs/view_pictures.py``, with Chromium and the extras browser and plot.

Everything in them is what the page's own commands give, with the embedded model.
"""

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

HOME = Path(__file__).parent
sys.path.insert(0, str(HOME.parent / "tests"))

from browser import launched


def saved(page: Page, name: str) -> None:
    """A screenshot in 256 colours, which is a third of its size."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(HOME / name, optimize=True)
    print(f"{name}: {(HOME / name).stat().st_size / 1024:.0f} KiB")


def main() -> None:
    text = (HOME / "view.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    shell = next(code for kind, code in blocks if kind == "bash")
    python = "\n".join([code for kind, code in blocks if kind == "python"][:2])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        subprocess.run(["bash", "-ec", shell], cwd=folder, check=True)
        subprocess.run([sys.executable, "-c", python], cwd=folder, check=True)
        chromium = launched(playwright)
        page = chromium.new_page(viewport={"width": 1100, "height": 700}, color_scheme="light")
        page.goto((Path(folder) / "answers.view.html").as_uri())
        page.keyboard.press("c")
        page.mouse.move(0, 0)
        saved(page, "view-page.png")
        page = chromium.new_page(viewport={"width": 1000, "height": 430}, color_scheme="light")
        page.goto((Path(folder) / "answer.html").as_uri())
        saved(page, "view-notebook.png")
        page = chromium.new_page(viewport={"width": 390, "height": 640}, color_scheme="dark")
        page.goto((Path(folder) / "answers.view.html").as_uri())
        page.click(".row >> nth=1")
        saved(page, "view-narrow.png")
        chromium.close()


if __name__ == "__main__":
    main()
