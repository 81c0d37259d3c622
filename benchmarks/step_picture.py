"""Draws docs/images/step.svg, the picture of docs/a-step.md: `python benchmarks/step_picture.py`.

Two ranks side by side, one training step from top to bottom. Letters are large enough for a page of a phone's width, and
the background is part of the picture, so that it can be read on light and dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "step.svg"

WIDTH, MARGIN, GAP = 720, 24, 32
HALF = (WIDTH - 2 * MARGIN - GAP) // 2  # a rank's column
LEFT = (MARGIN, MARGIN + HALF + GAP)
BETWEEN = 268  # middle of what lies between the matrices of both
OWN = ("#2b6cb0", "#c05621")  # samples and rows of rank 0, of rank 1
PALE = ("#bcd7f0", "#f6cfae")
INK, GREY, LINE, PAPER, TARGET = "#1a202c", "#4a5568", "#718096", "#ffffff", "#1a202c"
SAMPLES = 4  # of a rank
CLASSES = 10  # of a shard
SELECTED = ({0: "own", 2: "drawn", 3: "own", 6: "drawn", 9: "own"}, {1: "drawn", 2: "own", 5: "own", 7: "drawn"})
"""Class of a shard -> why its row takes part."""
TARGETS = ((0, 0), (2, 3), (5, 9)), ((1, 2), (4, 5), (6, 2), (3, 5), (7, 5))
"""(sample, class of the shard): each sample has its target on one of the ranks."""
CELL = 26


class Drawing:
    """Lines of an SVG file, and how far down it is drawn."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.y = 0

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = LINE, more: str = "") -> None:
        shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.lines.append(f'{shape} fill="{fill}" stroke="{line}" {more}/>')

    def text(self, x: float, y: float, words: str, kind: str = "t", anchor: str = "start", fill: str = INK) -> None:
        self.lines.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float, colour: str = INK) -> None:
        mark = {INK: "ink", OWN[0]: "r0", OWN[1]: "r1"}[colour]
        self.lines.append(
            f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{colour}" stroke-width="3" fill="none" marker-end="url(#{mark})"/>'
        )

    def title(self, number: int, words: str, *below: str) -> None:
        """A numbered heading with lines below it; a rule above it where ranks were apart."""
        self.y += 36
        self.lines.append(f'<path d="M{MARGIN} {self.y}H{WIDTH - MARGIN}" stroke="#cbd5e0" stroke-width="2"/>')
        self.y += 40
        self.lines.append(f'<circle cx="{MARGIN + 18}" cy="{self.y - 10}" r="19" fill="{INK}"/>')
        self.text(MARGIN + 18, self.y - 1, str(number), "h", "middle", PAPER)
        self.text(MARGIN + 50, self.y, words, "h")
        for line in below:
            self.y += 32
            self.text(MARGIN, self.y, line, fill=GREY)
        self.y += 22

    def samples(self, x: float, y: float, width: float, which: tuple[int, ...] = (0, 1), height: int = 15) -> None:
        """Rows of an [n, D] matrix, in the colours of the ranks that they come from."""
        for place in range(SAMPLES * len(which)):
            self.box(x, y + place * height, width, height - 2, OWN[which[place // SAMPLES]], "none")

    def classes(self, rank: int, x: float, y: float, moved: bool = False) -> None:
        """The shard of a rank, a cell for each row."""
        for place in range(CLASSES):
            why = SELECTED[rank].get(place)
            fill = {None: PAPER, "own": OWN[rank], "drawn": PALE[rank]}[why]
            more = (
                'stroke-width="2"'
                if why
                else 'stroke-width="2" stroke-dasharray="4 3"'
                if moved
                else 'stroke-width="2"'
            )
            self.box(x + place * CELL, y, CELL - 3, 34, fill, OWN[rank] if why else LINE, more)

    def tiles(self, rank: int, x: float, y: float, wide: int, high: int) -> float:
        """The logits [N, S], in tiles of T = 2 classes; the second is the one in work. Return their width."""
        classes = sorted(SELECTED[rank])
        at = x
        for column, place in enumerate(classes):
            at = x + column * wide + (column // 2) * 10
            for sample in range(2 * SAMPLES):
                busy = column // 2 == 1
                self.box(at, y + sample * high, wide - 2, high - 2, PALE[rank] if busy else "#edf2f7", LINE)
                if (sample, place) in TARGETS[rank]:
                    self.lines.append(
                        f'<circle cx="{at + wide / 2 - 1:g}" cy="{y + sample * high + high / 2 - 1:g}" r="6" fill="{TARGET}"/>'
                    )
        return at + wide - x


def draw() -> str:
    """The picture as SVG."""
    d = Drawing()
    d.y = 44
    for rank in (0, 1):
        d.text(LEFT[rank] + HALF / 2, d.y, f"rank {rank}", "h", "middle", OWN[rank])
    d.y -= 20

    d.title(1, "Gather", "Every rank gets the samples of all ranks.")
    top = d.y
    for rank in (0, 1):
        x = LEFT[rank]
        d.box(x, top, HALF, 44, PALE[rank], OWN[rank], 'rx="6" stroke-width="2"')
        d.text(x + HALF / 2, top + 31, "backbone in DDP", "t", "middle")
        d.arrow(x + 70, top + 46, x + 70, top + 66, OWN[rank])
        d.samples(x + 20, top + 72, 100, (rank,))
        d.text(x + 134, top + 108, "[N_local, D]")
    after = top + 72 + SAMPLES * 15
    for rank in (0, 1):
        for to in (0, 1):
            d.arrow(LEFT[rank] + 70, after + 4, LEFT[to] + (50 if rank == 0 else 90), after + 62, OWN[rank])
    d.text(BETWEEN, after + 90, "all-gather", "b", "middle")
    for rank in (0, 1):
        d.samples(LEFT[rank] + 20, after + 68, 100)
    for rank in (0, 1):
        d.text(LEFT[rank] + 134, after + 134, "X [N, D]")
        d.text(LEFT[rank] + 134, after + 164, "labels [N]")
    d.y = after + 68 + 2 * SAMPLES * 15

    d.title(2, "Select rows", "Of its own classes: those of the batch, and", "drawn ones. No communication.")
    for rank in (0, 1):
        d.classes(rank, LEFT[rank], d.y)
    d.y += 70
    for x, fill, words in (
        (LEFT[0], "own", "in the batch"),
        (LEFT[0] + 226, "drawn", "drawn"),
        (LEFT[0] + 378, None, "not this time"),
    ):
        for rank in (0, 1):
            colour = {"own": OWN[rank], "drawn": PALE[rank], None: PAPER}[fill]
            if fill is not None or rank == 0:
                d.box(x + rank * 22, d.y - 20, 20, 22, colour, LINE if fill is None else OWN[rank], 'stroke-width="2"')
        d.text(x + (52 if fill is not None else 30), d.y, words)
    d.y += 2

    d.title(
        3,
        "Forward, tile by tile",
        "Logits of all N samples with the rank's S rows.",
        "Only one tile of T rows is in work.",
    )
    for rank in (0, 1):
        x = LEFT[rank]
        d.samples(x, d.y, 60, height=22)
        d.text(x + 72, d.y + 98, "·", "h")
        end = d.tiles(rank, x + 92, d.y, 34, 22)
        d.text(x + 92, d.y + 206, "s · x · wᵀ", "m")
        assert end <= HALF - 92
    d.y += 214
    d.y += 32
    d.lines.append(f'<circle cx="{MARGIN + 8}" cy="{d.y - 8}" r="7" fill="{TARGET}"/>')
    d.text(MARGIN + 26, d.y, "a sample and its own class: on one rank only,")
    d.y += 30
    d.text(MARGIN + 26, d.y, "computed before the tiles, with the margin")

    d.title(4, "All-gather of sums", "Of each sample 3 numbers, not its S logits.")
    top = d.y
    for rank, x in enumerate((LEFT[0] + 20, LEFT[1] + 50)):
        for column in range(3):
            for sample in range(2 * SAMPLES):
                d.box(x + column * 26, top + sample * 15, 24, 13, PALE[rank], OWN[rank])
    d.arrow(LEFT[0] + 108, top + 58, WIDTH / 2 - 62, top + 58, OWN[0])
    d.arrow(LEFT[1] + 42, top + 58, WIDTH / 2 + 42, top + 58, OWN[1])
    d.text(WIDTH / 2 - 8, top + 66, "lse [N]", "b", "middle")
    for line, words in enumerate(("Σ exp,", "target logit,", "its cosine")):
        d.text(LEFT[1] + 142, top + 40 + 30 * line, words)
    d.y = top + 150
    d.text(WIDTH / 2, d.y, "loss = mean (lse − target logit), on every rank", "b", "middle")

    d.title(5, "Backward, tile by tile", "g = s (softmax − target) / N, then two products.")
    top = d.y
    for rank in (0, 1):
        x = LEFT[rank]
        d.tiles(rank, x, top, 22, 14)
        d.arrow(x + 134, top + 30, x + 170, top + 30, INK)
        d.text(x + 178, top + 38, "dW = gᵀ·X", "m")
        d.text(x + 178, top + 68, "stays here")
        d.arrow(x + 60, top + 114, x + 60, top + 134, INK)
        d.samples(x + 20, top + 140, 100, height=11)
        d.text(x + 134, top + 176, "dX = g·W", "m")
        d.text(x + 134, top + 206, "a part only")
    after = top + 140 + 2 * SAMPLES * 11
    for rank in (0, 1):
        for to in (0, 1):
            d.arrow(LEFT[rank] + 70, after + 4, LEFT[to] + (50 if rank == 0 else 90), after + 62, OWN[to])
    d.text(BETWEEN, after + 86, "reduce-scatter", "b", "middle")
    for rank in (0, 1):
        d.samples(LEFT[rank] + 20, after + 68, 100, (rank,))
        d.text(LEFT[rank] + 134, after + 118, "its own dX")
    d.arrow(LEFT[0] + 70, after + 132, LEFT[0] + 70, after + 152, OWN[0])
    d.arrow(LEFT[1] + 70, after + 132, LEFT[1] + 70, after + 152, OWN[1])
    d.y = after + 180
    for rank in (0, 1):
        d.text(LEFT[rank], d.y, "backbone’s backward")

    d.title(
        6,
        "Update",
        "Each rank moves its selected rows; no other rank",
        "has them. The others make this step later, when",
        "they are next used.",
    )
    for rank in (0, 1):
        d.classes(rank, LEFT[rank], d.y, moved=True)
    d.y += 34 + 28

    style = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}"
        ".h{font-size:28px;font-weight:700}.t{font-size:24px}.b{font-size:24px;font-weight:700}"
        ".m{font-size:24px;font-style:italic}"
    )
    marks = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="4.5" markerHeight="4.5" orient="auto">'
        f'<path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for name, colour in (("ink", INK), ("r0", OWN[0]), ("r1", OWN[1]))
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {d.y}" role="img" aria-labelledby="title">'
        '<title id="title">One training step on two ranks: gather, select, forward, sums, backward, update</title>'
        f"<style>{style}</style><defs>{marks}</defs>"
        f'<rect width="{WIDTH}" height="{d.y}" rx="12" fill="{PAPER}"/>'
    )
    return "\n".join([head, *d.lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(Path(__file__).parents[1]))
