"""Settings as flags of the command line: taken apart here, since argparse would guess at values and abbreviations."""

import difflib
from collections.abc import Mapping, Sequence

from bruno_ray.errors import SettingsError
from bruno_ray.settings.keys import FIELDS, FLAGS, flag_of, is_switch, nearest, parse_text
from bruno_ray.settings.source_values import Provenance, SourceValues

_TRUTH = frozenset({"true", "false", "1", "0", "yes", "no", "on", "off", "none"})


def join_flags(argv: Sequence[str], flags: Mapping[str, str] = FLAGS) -> list[str]:
    """Rewrites `--flag value` as `--flag=value` (and a bare switch as `--switch=true`) for settings.

    argparse then cannot take a value such as `-0.25,1.5` for an option, or MODEL for a switch's value.
    Underscores in a flag's name are accepted. Everything else passes through.
    """
    joined: list[str] = []
    tokens = iter(range(len(argv)))
    for i in tokens:
        name, equals, _ = argv[i].partition("=")
        if argv[i] == "--":
            return [*joined, *argv[i:]]
        flag = name.replace("_", "-")
        if flag not in flags:
            joined.append(argv[i])
            continue
        following = argv[i + 1] if i + 1 < len(argv) else None
        if equals:
            joined.append(flag + argv[i][len(name) :])
        elif is_switch(FIELDS[flags[flag]]) and (following is None or following.lower() not in _TRUTH):
            joined.append(flag + "=true")
        elif following is None or following.split("=")[0] in flags:
            raise SettingsError(f"{flag}: expects a value; write {flag} VALUE")
        else:
            joined.append(f"{flag}={following}")
            next(tokens)
    return joined


def flag_values(argv: Sequence[str], flags: Mapping[str, str] = FLAGS) -> SourceValues:
    """Settings given as flags. Anything that is not one is an error."""
    said: SourceValues = {}
    for token in join_flags(argv, flags):
        flag, _, text = token.partition("=")
        if flag not in flags:
            raise unknown_flag(flag, flags)
        key = flags[flag]
        value = parse_text(FIELDS[key], text, flag)
        if key in said and said[key].value != value:
            earlier = said[key]
            if isinstance(value, list) and isinstance(earlier.value, list):
                value = earlier.value + value  # a repeated list flag adds to the list
            else:
                both = (
                    "is given twice, with different values" if earlier.label == flag else f"and {earlier.label} differ"
                )
                raise SettingsError(f"{flag} {both}; leave one out")
        said[key] = Provenance(value, "command line", flag)
    return said


def unknown_flag(flag: str, flags: Mapping[str, str] = FLAGS, others: Sequence[str] = ()) -> SettingsError:
    if not flag.startswith("-"):
        return SettingsError(f"command line: {flag!r} is one argument too many; quote values that contain spaces")
    close = difflib.get_close_matches(flag, [*others, *flags], 1, 0.75)
    key = nearest(flag.lstrip("-").replace("-", "_"))
    guess = close[0] if close else flag_of(key) if key in FIELDS and flag_of(key) in flags else None
    hint = f"; did you mean {guess!r}?" if guess else "; --help lists all options"
    return SettingsError(f"command line: unknown option {flag!r}{hint}")
