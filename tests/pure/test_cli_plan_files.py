"""``narrows plan --html``, ``--code`` and ``--save``: the files a user gets, the page looked at in a real browser."""

import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from patience import PATIENCE_S
from PIL import Image

from narrows.cli.main import main

COMMAND = ("plan", "deepseek-v3", "--device", "h20", "--dp", "2", "--tp", "4", "--rows", "4096")


@pytest.mark.slow
def test_code_prints_a_program_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--layout", "norm-before-gather", "--code"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# layout norm-before-gather on dp 2 x tp 4")
    compile(out, "plan", "exec")


@pytest.mark.slow
def test_save_keeps_the_requested_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--layout", "sequence-parallel", "--save", str(tmp_path / "plan.json")]) == 0
    assert '"layout": "sequence-parallel"' in (tmp_path / "plan.json").read_text()
    assert main([*COMMAND, "--save", str(tmp_path / "plan.json")]) == 0
    assert '"layout": "auto"' in (tmp_path / "plan.json").read_text()


@pytest.mark.slow
def test_an_unwritable_page_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--html", str(tmp_path / "no" / "page.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


class _Links(HTMLParser):
    """Everything in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data")]


@pytest.fixture
def page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    file = tmp_path / "plan.html"
    assert main([*COMMAND, "--html", str(file)]) == 0
    return file


@pytest.mark.slow
def test_the_page_is_self_contained_and_draws_every_layout(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = _Links()
    links.feed(text)
    assert links.found == []
    assert "url(" not in text and "@import" not in text
    drawings = [
        ElementTree.fromstring(part.split("</svg>")[0] + "</svg>")
        for part in ("<svg" + rest for rest in text.split("<svg")[1:])
    ]
    names = [drawing.attrib["aria-label"] for drawing in drawings]
    assert names == ["all-reduce", "attn-tp-input-scattered", "norm-before-gather", "sequence-parallel", "auto"]
    for drawing in drawings:
        rects = list(drawing.iter("rect"))
        assert len(rects) >= 8
        right = max(float(rect.attrib["x"]) + float(rect.attrib["width"]) for rect in rects)
        assert right <= float(drawing.attrib["width"])


@pytest.mark.slow
def test_a_narrow_gather_is_drawn_narrow(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    drawing = text.split('aria-label="attn-tp-input-scattered"')[1].split("</svg>")[0]
    heights = {}
    for part in drawing.split("<g>")[1:]:
        title = part.split("<title>")[1].split("</title>")[0]
        heights[title.split(":")[0]] = float(part.split('height="')[1].split('"')[0])
    assert heights["all_gather of qkv_latent"] == pytest.approx(
        heights["reduce_scatter of hidden"] * 2112 / 7168, rel=0.02
    )


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: install the package chromium")
def test_a_browser_shows_the_page(page: Path, tmp_path: Path) -> None:
    """The screenshot is not one colour: it has the page's ink and the red of communication."""
    picture = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    flags += ["--window-size=1180,900", "--force-device-scale-factor=1", f"--screenshot={picture}", page.as_uri()]
    assert BROWSER is not None
    subprocess.run([BROWSER, *flags], check=True, timeout=PATIENCE_S, capture_output=True)
    with Image.open(picture) as image:
        assert image.size == (1180, 900)
        counts = {colour[:3]: count for count, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert counts[0xE1, 0x57, 0x59] > 20_000, "communication is drawn"
    assert counts[0x4E, 0x79, 0xA7] > 2_000, "the low-rank projection is drawn"
