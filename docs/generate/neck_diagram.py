"""The diagram of the neck on the page of models. Its colours are in docs/styles/extra.css."""

# Middle of each level's row, and width of its boxes: the higher the level, the smaller the map.
ROWS = {5: 140, 4: 220, 3: 300, 2: 380}
WIDTHS = {5: 44, 4: 60, 3: 78, 2: 96}
BACKBONE, FPN_SUM, FPN, CBAM, PAN_SUM, PAN, OUT = 80, 210, 312, 446, 570, 690, 800
HALF, RADIUS = 17, 9  # of a box's height; of a sum


def neck_diagram() -> str:
    """An SVG without empty lines, so that it can stand in a page."""
    parts = [
        '<svg class="diagram" viewBox="0 0 860 460" role="img" xmlns="http://www.w3.org/2000/svg">',
        "<title>Backbone, FPN, CBAM on each level, bottom-up path</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    headings = (
        (BACKBONE, "Backbone", "ResNet or timm"),
        (FPN, "FPN", "top-down path"),
        (CBAM, "CBAM", "IMR-CNN only"),
        (PAN, "Bottom-up path", "IBMR-CNN and IMR-CNN"),
    )
    for x, title, below in headings:
        parts += [_text(x, 24, title, "heading"), _text(x, 42, below, "small")]
    for level, y in ROWS.items():
        parts += _level(level, y, WIDTHS[level] / 2)
    # The input, and p6 at the top.
    parts += [
        _text(BACKBONE, 450, "image"),
        _line((BACKBONE, 436), (BACKBONE, ROWS[2] + HALF)),
        _box(PAN, 82, 34, "", "stock"),
        _text(OUT, 86, "p6"),
        _line((PAN, ROWS[5] - HALF), (PAN, 82 + HALF)),
        _text(PAN + 8, 113, "max pool, stride 2", "small left"),
        _line((PAN + 17, 82), (OUT - 14, 82)),
        "</svg>",
    ]
    return "\n".join(parts)


def _level(level, y, half):
    """One level, and the path to the next one."""
    parts = [
        _box(BACKBONE, y, 2 * half, f"res{level}", "stock"),
        _line((BACKBONE + half, y), (FPN_SUM - RADIUS, y)),
        _text((BACKBONE + 48 + FPN_SUM) / 2, y - 6, "1×1", "small"),
        _sum(FPN_SUM, y, "stock"),
        _line((FPN_SUM + RADIUS, y), (FPN - half, y)),
        _text(FPN_SUM + 30, y - 6, "3×3", "small"),
        _box(FPN, y, 2 * half, f"P{level}", "stock"),
        _line((FPN + half, y), (CBAM - 34, y)),
        _box(CBAM, y, 68, f"cbam{level}", "attention"),
        _box(PAN, y, 2 * half, f"N{level}", "new"),
        _line((PAN + half, y), (OUT - 14, y)),
        _text(OUT, y + 4, f"p{level}"),
    ]
    if level == 2:
        parts.append(_line((CBAM + 34, y), (PAN - half, y)))
    else:
        parts += [
            _line((CBAM + 34, y), (PAN_SUM - RADIUS, y)),
            _text((CBAM + 34 + PAN_SUM - RADIUS) / 2, y - 6, f"A{level}", "small"),
            _sum(PAN_SUM, y, "new"),
            _line((PAN_SUM + RADIUS, y), (PAN - half, y), "new"),
            _text((PAN_SUM + RADIUS + PAN - 48) / 2 + 4, y - 6, "3×3, ReLU", "small"),
        ]
    if level < 5:
        above = ROWS[level + 1]
        turn = (y - HALF + above + HALF) / 2
        parts += [
            _line((BACKBONE, y - HALF), (BACKBONE, above + HALF)),
            _line((FPN_SUM, above + RADIUS), (FPN_SUM, y - RADIUS)),
            _text(FPN_SUM + 6, turn + 4, "2× up", "small left"),
            _path([(PAN, y - HALF), (PAN, turn), (PAN_SUM, turn), (PAN_SUM, above + RADIUS)]),
            _text((PAN + PAN_SUM) / 2, turn + 13, "3×3, stride 2, ReLU", "small"),
        ]
    return parts


def _box(x, y, width, text, kind):
    rectangle = (
        f'<rect class="{kind}" x="{x - width / 2:g}" y="{y - HALF}" width="{width:g}" '
        f'height="{2 * HALF}" rx="4"/>'
    )
    return rectangle + (_text(x, y + 4, text) if text else "")


def _sum(x, y, kind):
    return (
        f'<circle class="{kind}" cx="{x}" cy="{y}" r="{RADIUS}"/>'
        f'<path class="{kind}" d="M{x - 5} {y}h10M{x} {y - 5}v10"/>'
    )


def _line(start, end, kind="stock"):
    return _path([start, end], kind)


def _path(points, kind="new"):
    line = "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="{kind} arrow" marker-end="url(#tip)" d="M{line}"/>'


def _text(x, y, text, kind=""):
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'
