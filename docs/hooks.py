"""What mkdocs does with the pages of this folder beyond its own.

The pages are read in the repository as well, where links to files outside of docs/ lead somewhere. On the site there
are no such files: what is linked stays as text.
"""

import re

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    return OUTSIDE.sub(r"\1", markdown)
