"""Sections of documentation that benches write."""


def replace_between(page, begin, end, text):
    """Puts `text` between the lines `begin` and `end` of a page, each of which it has once."""
    head, rest = page.read_text().split(f"{begin}\n")
    page.write_text(f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")
