"""Where the files that are not Python live."""

from __future__ import annotations

from pathlib import Path


def kernels_dir() -> Path:
    """The folder of Metal sources.

    A wheel carries it as ``moefast/kernels``; an editable install and a plain checkout
    have it beside the package, as ``kernels``.

    Raises:
        FileNotFoundError: neither exists; the message names both.
    """
    package = Path(__file__).resolve().parent
    places = (package / "kernels", package.parent / "kernels")
    for place in places:
        # The README tells our folder from any other `kernels` beside the package:
        # in site-packages that is a project of its own.
        if (place / "README.md").is_file():
            return place
    looked_at = " and ".join(str(place) for place in places)
    raise FileNotFoundError(f"[kernels_dir] Metal sources must be installed, looked at {looked_at}.")
