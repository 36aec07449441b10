"""Valid IOVA ranges: apertures clip, reserved regions cut.  Ranges are (first, last), ascending.

Source: type1.md 3.2, 3.3.
"""


def clip(ranges, first, last):
    """Clip to an aperture."""
    if not ranges:
        return [(first, last)]
    for index, (start, end) in enumerate(ranges):
        if start <= first < end:
            ranges = [(first, end), *ranges[index + 1:]]
            break
    ranges = [(start, end) for start, end in ranges if start >= first]
    out = []
    for start, end in ranges:
        if last > end:
            out.append((start, end))
        elif start < last:
            out.append((start, last))
    return out


def cut(ranges, regions):
    """Cut reserved regions out."""
    for first, last in regions:
        out = []
        for start, end in ranges:
            if last < start or first > end:
                out.append((start, end))
                continue
            if first > start:
                out.append((start, first - 1))
            if last < end:
                out.append((last + 1, end))
        ranges = out
    return ranges


def page_sizes(bitmaps, page):
    """Return the page sizes that all domains share, nothing below the CPU's page."""
    shared = (1 << 64) - 1
    for bitmap in bitmaps:
        shared &= bitmap
    if shared & (page - 1):
        shared = shared & ~(page - 1) | page
    return shared
