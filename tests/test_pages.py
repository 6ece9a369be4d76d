"""`python -m variants NAME`: nothing that a reader asks is missing from any page."""

import re

import pytest

import variants
from variants.__main__ import page
from variants._registry import AXES, index

# Where there is no paper with a number: an article, a custom, a blog, a conference's own site.
UNNUMBERED = {"factorized", "full", "orthogonal", "hira"}
# Tuners, starts and optimizers of PEFT 0.21, by the names that they have here.
IN_PEFT = {
    "adalora", "bat", "bitfit", "boft", "c3a", "corda", "delora", "dora", "eva", "fourierft",
    "gaussian", "gralora", "hira", "hra", "ia3", "kasa", "ln_tuning", "loha", "lokr", "lora",
    "lora_fa", "lora_ga", "lora_plus", "mica", "miss", "oft", "olora", "orthogonal", "pissa",
    "qlora", "randlora", "riemannian", "road", "rslora", "shira", "vblora", "vera",
}  # fmt: skip
LABELS = ("rank", "alpha", "lr", "targets", "parameters", "starts", "base", "frozen",
          "calibration", "file")  # fmt: skip


@pytest.mark.parametrize("name", variants.names())
def test_a_page_is_whole(name: str) -> None:
    known, text = variants.describe(name), page(name)
    if name in UNNUMBERED:
        assert re.search(r"https?://|\.net|\.github\.io|article|anchor", known["paper"])
    else:
        assert re.search(r"arXiv:\d{4}\.\d{5}", known["paper"])
    assert known["equation"] and all(line in text for line in known["equation"].splitlines())
    for label in (*AXES, *LABELS):
        assert re.search(rf"^  {label} +\S", text, re.MULTILINE), label
    for axis, part in known["axes"].items():
        assert set(part) - {"name"} == set(known["settings"][axis])
        assert all(known["settings"][axis].values())
    flat = " ".join(text.split())
    for axis, part in known["axes"].items():
        for key, doc in known["settings"][axis].items():
            assert f"{key}={part[key]} {' '.join(doc.split())}" in flat
    notes = " ".join(known["notes"].split(">>>")[0].split())
    if name not in UNNUMBERED | {"gaussian"}:
        assert re.search(r"[Oo]fficial (code|repo|dir)|no (official )?code|authors' code", notes)
    if name in IN_PEFT:
        assert "PEFT" in notes
    assert max(map(len, text.split("\nNotes\n")[0].splitlines())) <= 110


@pytest.mark.parametrize("axis", AXES)
def test_every_setting_of_every_part_has_its_line(axis: str) -> None:
    for part in index()[0][axis].values():
        assert set(part.docs) == set(part.fields), part.name
        assert all("\n" not in doc for doc in part.docs.values()), part.name
        assert part.doc, part.name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pissa", "base        moved once, at the start, by init pissa; the original is kept"),
        ("relora", "base        moved while training, by allocation relora; the original is kept"),
        ("full", "base        form full trains in place of W; the original is kept"),
        ("qlora", "base        frozen, as it was loaded; rounded, by base nf4_dq"),
        ("lora_fa", "frozen      A (update lora_fa)"),
        ("mica", "frozen      B (init mica)"),
        (
            "tied_lora",
            "parameters  of a matrix W [m, n]: m + r, and r*(m + n) once for layers that share",
        ),
        ("lora_one", "starts      away from the base, by init lora_one"),
        (
            "gora",
            "calibration 32 batches, for the gradient of each layer: init gora and allocation",
        ),
        ("kasa", "loss        allocation kasa adds a term to the training loss"),
        ("adalora", "schedule    allocation adalora changes during the run, and must know its"),
    ],
)
def test_pages_say_what_a_variant_does(name: str, line: str) -> None:
    assert f"\n  {line}" in page(name)
