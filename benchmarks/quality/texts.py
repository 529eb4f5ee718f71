"""Texts of three sources, so that calibration, tuning and reporting never see the same one.

Calibration uses news (the Lee corpus) and reporting uses Wikipedia articles of 2016: both come with the package gensim
as data for its tests. Tuning uses the held-out half of Python's documentation that lies in ``tests/assets``.
"""

import bz2
import html
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from hqqtensor.demo import DOCLM

GENSIM = "gensim==4.4.0"
_FOLDER = "gensim/test/test_data"
_WIKIPEDIA = f"{_FOLDER}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = f"{_FOLDER}/lee_background.cor"


def documentation() -> str:
    """Python's documentation: for choosing settings."""
    return (DOCLM / "valid.txt").read_text(encoding="utf-8")


def news(cache: Path) -> str:
    """The Lee corpus, an article a line: the text that methods may calibrate on."""
    return _member(cache, _NEWS).decode("utf-8", errors="replace")


def wikipedia(cache: Path) -> str:
    """Paragraphs of Wikipedia articles without their markup: for the figures that are reported."""
    dump = bz2.decompress(_member(cache, _WIKIPEDIA)).decode("utf-8")
    articles = re.findall(r"<text[^>]*>(.*?)</text>", dump, flags=re.DOTALL)
    return "\n".join(p for article in articles for p in _paragraphs(html.unescape(article)))


def _paragraphs(article: str, most: int = 6) -> list[str]:
    """The first ``most`` paragraphs of an article that are prose."""
    text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<[^>]+>", "", article, flags=re.DOTALL)
    for _ in range(4):  # templates within templates
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\[\[(?:File|Image):[^\[\]]*(?:\[\[[^\]]*\]\][^\[\]]*)*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^\]|]*\|)?([^\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text).replace("'''", "").replace("''", "")
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if len(line) >= 300 and line[0].isalpha()][:most]


def _member(cache: Path, name: str) -> bytes:
    """A file of the gensim wheel, which is fetched into ``cache`` where it is not there yet."""
    wheels = list(cache.glob("gensim-*.whl"))
    if not wheels:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(cache), GENSIM]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wheels = list(cache.glob("gensim-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        return wheel.read(name)
