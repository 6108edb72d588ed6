"""python docs/index.py: line numbers of README's index, line counts of its file tree."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def row(match):
    """| `name` | [file.py:12](file.py#L12) |: 12 becomes the line that defines that name."""
    name, file = match["name"], match["file"]
    for line, text in enumerate((ROOT / file).read_text().splitlines(), 1):
        if re.match(rf"\s*(def|class) {name}\b", text):
            return f"`{name}` | [{file}:{line}]({file}#L{line})"
    raise SystemExit(f"README's index: {file} defines no {name}")


def count(match):
    """file.py   123  what it is; a folder's count is that of all its Python."""
    path = ROOT / match["path"]
    files = sorted(path.glob("**/*.py")) if path.is_dir() else [path]
    lines = sum(len(f.read_text().splitlines()) for f in files)
    return f"{match['path']:24}{lines:>6,}  "


def renumbered(text):
    text = re.sub(r"`(?P<name>\w+)` \| \[(?P<file>\S+?):\d+\]\(\S+\)", row, text)
    return re.sub(r"^(?P<path>[\w/]+(?:\.py|/)) +[\d,]+  ", count, text, flags=re.M)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(renumbered(readme.read_text()))
