"""Replacements in a text that keep every line where it was."""

from __future__ import annotations


class Edits:
    def __init__(self, text: str) -> None:
        self.text = text
        self.made: list[tuple[int, int, str]] = []

    def replace(self, start: int, end: int, by: str) -> None:
        """Lines that ``text[start:end]`` has and ``by`` lacks are added at its end."""
        lost = self.text.count("\n", start, end) - by.count("\n")
        self.made.append((start, end, by + "\n" * lost))

    def insert(self, at: int, text: str) -> None:
        self.replace(at, at, text)

    def result(self) -> str:
        parts, at = [], 0
        for start, end, by in sorted(self.made):
            if start < at:
                continue  # inside an edit of something larger
            parts += [self.text[at:start], by]
            at = end
        return "".join([*parts, self.text[at:]])


def one_line(text: str) -> str:
    return " ".join(line for line in text.split() if line)
