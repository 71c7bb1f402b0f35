"""What to expect of a first model, by the number of labelled images: a line of `cxrloop init`.

The figures come from bench/adults/features_study.py, which anyone can run; a test compares them with its result file.
"""

RAW_PIXELS, NO_BACKBONE, BACKBONE = "raw pixels", "random weights", "pretrained backbone"
# AUC of "abnormal" on adults of the NIH set, on patients that the model never saw, by number of labelled images
FIRST_MODEL: dict[int, dict[str, float]] = {
    40: {RAW_PIXELS: 0.71, NO_BACKBONE: 0.81, BACKBONE: 0.82},
    80: {RAW_PIXELS: 0.76, NO_BACKBONE: 0.83, BACKBONE: 0.84},
    160: {RAW_PIXELS: 0.79, NO_BACKBONE: 0.85, BACKBONE: 0.85},
}


def expectation(backbone: str) -> str:
    """Return the line for a new site, which has no labels yet; backbone: the setting `learn.backbone`."""
    start = NO_BACKBONE if backbone == "random" else BACKBONE
    counts = [str(count) for count in FIRST_MODEL]
    values = [f"{row[start]:.2f}" for row in FIRST_MODEL.values()]
    pixels = [f"{row[RAW_PIXELS]:.2f}" for row in FIRST_MODEL.values()]
    return (
        f"expect: no labels yet. On public images of adults, {_listed(counts)} labelled images gave a first model "
        f"({start}) with AUC {_listed(values)} for abnormal; raw pixels {_listed(pixels)}. Findings that are rare or "
        "small stay lower"
    )


def _listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"
