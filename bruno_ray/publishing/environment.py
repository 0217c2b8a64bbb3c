"""The Jinja environment of the card and the report."""

from importlib import resources

import jinja2


def environment() -> jinja2.Environment:
    """Templates of this package. HTML is escaped, Markdown is not; a name that is missing is an error."""
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: resources.files("bruno_ray.publishing").joinpath("templates", name).read_text(encoding="utf-8")
        ),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
    )
